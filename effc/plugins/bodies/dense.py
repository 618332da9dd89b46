"""The ONNX function body of dense attention: ONNX Runtime's fused kernels where they apply, blocks of rows elsewhere.

The fused kernels know neither padding nor distance biases, and the causal one no queries behind the first ones. Blocks
of rows over all keys know all of that in memory O(length).
"""

from __future__ import annotations

from onnx import TensorProto

from effc.plugins.bodies.position_inputs import INPUTS, Inputs, read_inputs
from effc.plugins.bodies.position_rows import attend_rows
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.operator import AttentionGeometry


def dense_text(geometry: AttentionGeometry, given: frozenset[str]) -> str:
    """Statements of the body, see :func:`effc.plugins.bodies.dispatch.body_text`."""
    s = Statements()
    s.reserve(*INPUTS)
    inputs = read_inputs(s, geometry, given)
    if inputs.has_bias:
        s("Identity", _rows(s, inputs), to="output")
        return s.text()
    plain: list[Value | None] = []
    if inputs.mask_rows is not None:
        lowest = s("ReduceMin", s.cast("key_mask", TensorProto.INT32), keepdims=0)
        plain.append(s.cast(lowest, TensorProto.BOOL, to="no_padding"))
    if geometry.causal:
        plain.append(s("Equal", inputs.queries, inputs.keys, to="from_the_start"))
    condition = s.all_of(*plain)
    if condition is None:
        s("Identity", _fused(s, inputs), to="output")
    else:
        s.choose(condition, lambda b: _fused(b, inputs), lambda b: _rows(b, inputs), to="output")
    return s.text()


def _rows(s: Statements, inputs: Inputs) -> Value:
    places = s("Unsqueeze", s("Add", s.range(inputs.queries), inputs.offset), [0])
    causal = inputs.geometry.causal
    return attend_rows(
        s,
        inputs,
        "query",
        s("Expand", places, s.shape(inputs.batch, inputs.queries)),
        lambda b, query, key, marks: b("LessOrEqual", key, query) if causal else None,
        side_by_side=True,
        may_see_nothing=inputs.mask_rows is not None,
    )


def _fused(s: Statements, inputs: Inputs) -> Value:
    g = inputs.geometry
    if g.causal:
        count = s("Squeeze", s.cast(s("Shape", "key", start=1, end=2), TensorProto.INT32), [0])
        last = s("Sub", count, s.cast(s.value(1), TensorProto.INT32))
        last_of_each = s("Expand", last, s("Unsqueeze", inputs.batch, [0]))
        return s.many(
            "com.microsoft.GroupQueryAttention",
            3,
            "query",
            "key",
            "value",
            None,
            None,
            last_of_each,
            count,
            to="fused_attention",
            num_heads=g.num_heads,
            kv_num_heads=g.kv_heads,
            scale=float(g.scale),
        )[0]
    if g.kv_heads != g.num_heads:
        return s(
            "Attention",
            "query",
            "key",
            "value",
            q_num_heads=g.num_heads,
            kv_num_heads=g.kv_heads,
            scale=float(g.scale),
            to="fused_attention",
        )
    return s(
        "com.microsoft.MultiHeadAttention",
        "query",
        "key",
        "value",
        num_heads=g.num_heads,
        scale=float(g.scale),
        to="fused_attention",
    )
