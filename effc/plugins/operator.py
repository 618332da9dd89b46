"""The operators of domain ``effc``: their attributes and how torch emits them.

One operator type per family of forms (``SparseAttention``, ``LinearAttention``, ...), all of one shape. Inputs:
``query [batch, query_length, num_heads * head_dim]``, ``key`` and ``value``
``[batch, key_length, kv_num_heads * head_dim]``, then optionally ``key_mask [batch, key_length]`` (bool, False hides a
key) and the form's own ``extra_inputs``. Output: ``[batch, query_length, num_heads * head_dim]``. Attributes:
``pattern`` (the form's text), ``causal``, ``num_heads``, ``kv_num_heads``, ``scale``. The heads stay packed in the last
axis, as the projections produce them, so that the graph needs no transposes around the operator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.reference.dispatch import part_extras, select_heads

DOMAIN = "effc"
VERSION = 1
# Carries the module's name through torch's exporter, which names nodes itself; the exporter turns it into node.name.
LAYER_ATTRIBUTE = "layer"
KEY_MASK = "key_mask"


@dataclass(frozen=True)
class AttentionGeometry:
    """The attributes of one attention layer, all static."""

    form: AttentionForm
    causal: bool
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float

    def overload(self, given: frozenset[str]) -> str:
        """Name of the function body that computes exactly this, with the optional inputs ``given``."""
        direction = "causal" if self.causal else "bidirectional"
        parts = [str(self.form), direction, f"h{self.num_heads}", f"kv{self.kv_heads}", f"d{self.head_dim}"]
        parts += [f"s{self.scale:.6g}", "masked" if KEY_MASK in given else "unmasked"]
        parts += sorted(given - {KEY_MASK})
        text = "_".join(parts).replace("|", "_or_").replace(".", "p").replace("+", "_and_").replace("#", "id")
        return re.sub(r"[^0-9A-Za-z_]", "_", text.replace("-", "m"))


def optional_inputs(form: AttentionForm) -> tuple[str, ...]:
    """Names of the operator's inputs behind query, key and value, in order."""
    return (KEY_MASK, *form.extra_inputs)


def emit(
    geometry: AttentionGeometry,
    layer: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Put the layer's operator into the graph that torch is exporting; one for each part of a per-head form.

    Args:
        query: ``[batch, heads, length, head_dim]``, ``key`` and ``value`` ``[batch, kv_heads, length, head_dim]``.
        key_mask: ``[batch, length]`` bool, or None.
        extras: the form's further inputs by name.

    Returns:
        ``[batch, length, heads, head_dim]``, the layout that transformers expects from an attention function.
    """
    batch, heads, length, head_dim = query.shape
    form = geometry.form
    if isinstance(form, HeadForms):
        pieces: list[torch.Tensor] = []
        order: list[int] = []
        for number, (part, chosen) in enumerate(form.parts):
            rows, part_key, part_value = select_heads(chosen, query, key, value)
            own = replace(geometry, form=part, num_heads=len(chosen), kv_heads=part_key.shape[1])
            name = f"{layer}{HEADS_MARK}{number}"
            own_extras = part_extras(extras or {}, number, chosen)
            pieces.append(emit(own, name, rows, part_key, part_value, key_mask, own_extras))
            order.extend(chosen)
        joined = torch.cat(pieces, dim=2)
        if order == sorted(order):
            return joined
        return joined[:, :, [order.index(head) for head in range(heads)]]
    inputs = [query.transpose(1, 2).reshape(batch, length, heads * head_dim)]
    for states in (key, value):
        inputs.append(states.transpose(1, 2).reshape(batch, states.shape[2], geometry.kv_heads * head_dim))
    optional = [key_mask, *((extras or {}).get(name) for name in form.extra_inputs)]
    while optional and optional[-1] is None:
        optional.pop()
    packed = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{form.op_type}",
        [*inputs, *optional],
        attrs={
            "pattern": str(form),
            "causal": int(geometry.causal),
            "num_heads": geometry.num_heads,
            "kv_num_heads": geometry.kv_heads,
            "scale": geometry.scale,
            LAYER_ATTRIBUTE: layer,
        },
        dtype=query.dtype,
        shape=inputs[0].shape,
        version=VERSION,
    )
    return packed.view(batch, length, heads, head_dim)


HEADS_MARK = "/heads"
"""Between a layer's name and the number of the part of its heads, in the names of per-head operator nodes."""
