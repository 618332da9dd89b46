"""Giving operator nodes their function bodies.

A node's ``overload`` names the body that fits its attributes; a runtime with effc's native library uses the kernel
instead.
"""

from __future__ import annotations

import onnx_ir as ir

from effc.errors import PassFailedError
from effc.plugins.bodies import body_text
from effc.plugins.forms.registry import parse_form
from effc.plugins.function_text import parse_function
from effc.plugins.operator import DOMAIN, KEY_MASK, LAYER_ATTRIBUTE, AttentionGeometry, optional_inputs

ATTRIBUTES = ("pattern", "causal", "num_heads", "kv_num_heads", "scale")
"""Of every operator."""
_ALL_VISIBLE = """
    any_batch = Shape <start: int = 0, end: int = 1> (key)
    any_length = Shape <start: int = 1, end: int = 2> (key)
    any_shape = Concat <axis: int = 0> (any_batch, any_length)
    any_true = Constant <value: tensor = bool {1}> ()
    key_mask = Expand (any_true, any_shape)
"""


def is_attention(node: ir.Node) -> bool:
    """Whether a node is one of effc's attention operators."""
    return node.domain == DOMAIN and "pattern" in node.attributes


def function_body(geometry: AttentionGeometry, given: frozenset[str] = frozenset()) -> ir.Function:
    """Build the body for one layer geometry.

    Args:
        geometry: attributes of the node.
        given: names of the optional inputs that the node has, see :func:`effc.plugins.operator.optional_inputs`.
    """
    form = geometry.form
    names = list(optional_inputs(form))
    while names and names[-1] not in given:
        names.pop()
    # An input that the node leaves out still has its place; the body does not use it.
    parameters = ["query", "key", "value", *(name if name in given else f"no_{name}" for name in names)]
    mask = "" if KEY_MASK in given else _ALL_VISIBLE
    text = mask + body_text(form, geometry, given)
    return parse_function(form.op_type, geometry.overload(given), parameters, ["output"], text, attributes=ATTRIBUTES)


def attach_bodies(model: ir.Model) -> list[ir.Node]:
    """Give every operator node of an exported graph its name, its overload and its body.

    Returns:
        The operator nodes in graph order; ``node.name`` is the torch module's name.
    """
    nodes = [node for node in model.graph if is_attention(node)]
    for node in nodes:
        if LAYER_ATTRIBUTE in node.attributes:
            node.name = node.attributes.pop(LAYER_ATTRIBUTE).as_string()
        geometry = geometry_of(node)
        optional = zip(optional_inputs(geometry.form), node.inputs[3:], strict=False)
        body = function_body(geometry, frozenset(name for name, value in optional if value is not None))
        node.overload = body.overload
        node.version = None
        model.functions[body.identifier()] = body
    if nodes:
        model.opset_imports.setdefault(DOMAIN, 1)
    return nodes


def geometry_of(node: ir.Node) -> AttentionGeometry:
    """Read a node's attributes back."""
    heads = node.attributes["num_heads"].as_int()
    query = node.inputs[0]
    width = query.shape[-1] if query is not None and query.shape is not None else None
    if not isinstance(width, int):
        raise PassFailedError(f"The width of the queries of '{node.name}' is not static.", "Please report this model.")
    return AttentionGeometry(
        parse_form(node.attributes["pattern"].as_string()),
        bool(node.attributes["causal"].as_int()),
        heads,
        node.attributes["kv_num_heads"].as_int(),
        width // heads,
        node.attributes["scale"].as_float(),
    )
