"""One function for every form: the text of its ONNX function body."""

from __future__ import annotations

from functools import singledispatch

from effc.plugins.forms.base import AttentionForm
from effc.plugins.operator import AttentionGeometry

OPSET = 23


@singledispatch
def body_text(form: AttentionForm, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    """Statements of the function body in ONNX text form.

    They may use ``query``, ``key``, ``value``, ``key_mask`` (all True where the node has none) and the extra inputs
    named in ``given``, see :mod:`effc.plugins.operator`, and must define ``output``. Value names are the body's own.
    Standard operators of opset ``OPSET`` and ``com.microsoft`` ones; memory O(length).

    Args:
        form: ``geometry.form``, to dispatch on.
        geometry: attributes of the node.
        given: names of the optional inputs that the node has.
    """
    raise NotImplementedError(f"There is no function body of {type(form).__name__}.")
