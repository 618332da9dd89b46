"""Linear attention that hands on its state: the operator of prefill and decode graphs for engines.

``effc::RecurrentAttention`` has the inputs and attributes of ``effc::LinearAttention``, ``past_state [batch, kv_heads,
head_dim, head_dim]`` and ``past_normaliser [batch, kv_heads, head_dim]`` behind them where something lies before the
first key, and gives ``present_*`` of the same shapes besides its output; all of these are in fp32. Its attribute
``inputs`` names the optional inputs it has.
"""

from __future__ import annotations

import onnx_ir as ir

from effc.exporters.generation_bodies import RECURRENT_ATTENTION
from effc.plugins.bodies.linear_state import recurrent_text, step_text
from effc.plugins.function_body import ATTRIBUTES, geometry_of
from effc.plugins.function_text import parse_function
from effc.plugins.operator import DOMAIN, KEY_MASK, AttentionGeometry

RECURRENT = RECURRENT_ATTENTION
STATES = ("state", "normaliser")


def past_states() -> list[str]:
    """Names of the operator's inputs of a state."""
    return [f"past_{name}" for name in STATES]


def state_shapes(geometry: AttentionGeometry) -> dict[str, list[int | str]]:
    """Shapes of the tensors of a state, by name."""
    kv_heads, head_dim = geometry.kv_heads, geometry.head_dim
    return {"state": ["batch", kv_heads, head_dim, head_dim], "normaliser": ["batch", kv_heads, head_dim]}


def with_state(model: ir.Model, node: ir.Node, past: list[ir.Value]) -> list[ir.Value]:
    """Put the operator that hands on its state in the place of one of linear attention.

    Args:
        past: the state that one new token goes into, or nothing: any number of tokens, before which there are none.

    Returns:
        The state behind the last key, in the order of :data:`STATES`.
    """
    geometry = geometry_of(node)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    given = [] if mask is None else [KEY_MASK]
    names = [*given, *(past_states() if past else [])]
    function = _function(geometry, names)
    model.functions[function.identifier()] = function
    attributes = [*node.attributes.values(), ir.AttrString("inputs", ",".join(names))]
    inputs = [*node.inputs[:3], *([] if mask is None else [mask]), *past]
    made = ir.Node(
        DOMAIN, RECURRENT, inputs, attributes, overload=function.overload, name=node.name, num_outputs=1 + len(STATES)
    )
    former, fresh = node.outputs[0], made.outputs[0]
    model.graph.insert_before(node, made)
    fresh.shape, fresh.type = former.shape, former.type
    name, former.name = former.name, None
    ir.convenience.replace_all_uses_with(former, fresh, replace_graph_outputs=True)
    fresh.name = name
    model.graph.remove(node, safe=True)
    for value, shape in zip(made.outputs[1:], state_shapes(geometry).values(), strict=True):
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
    return list(made.outputs[1:])


def _function(geometry: AttentionGeometry, names: list[str]) -> ir.Function:
    """The body for ONNX Runtime: a step from a state, or a whole text from an empty one."""
    given = frozenset(name for name in names if name == KEY_MASK)
    step = past_states()[0] in names
    text = step_text(geometry, given) if step else _empty(geometry) + recurrent_text(geometry, given)
    outputs = ["output", *(f"present_{name}" for name in STATES)]
    overload = f"{'step' if step else 'whole'}_{geometry.overload(given)}"
    inputs, attributes = ["query", "key", "value", *names], (*ATTRIBUTES, "inputs")
    return parse_function(RECURRENT, overload, inputs, outputs, text, attributes=attributes)


def _empty(geometry: AttentionGeometry) -> str:
    """Define the state of no keys."""
    lines = ["no_batch = Shape <start: int = 0, end: int = 1> (query)"]
    for name, (_, *sizes) in state_shapes(geometry).items():
        lines += [
            f"no_{name}_sizes = Constant <value_ints: ints = {sizes}> ()",
            f"no_{name}_shape = Concat <axis: int = 0> (no_batch, no_{name}_sizes)",
            f"past_{name} = ConstantOfShape (no_{name}_shape)",
        ]
    return "\n".join(["", *lines, ""])
