"""Linear attention in standard operators for TensorRT: in fp32, because its sums go beyond what fp16 holds.

Bidirectional layers are computed through their state, in O(length). Causal ones compute all pairs of what they are
given: TensorRT takes no Scan inside a function, which the state that grows from token to token would need. What lies
before, a decode step has in its state.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.forms.linear import Linear
from effc.plugins.operator import KEY_MASK, AttentionGeometry

ATTENDED = "linear_attended"
"""In the name of the value that a written-out layer ends in."""
# Of a denominator: below it there is nothing to divide.
_SMALLEST = 1e-30


def write_linear(
    s: Statements,
    form: Linear,
    geometry: AttentionGeometry,
    masked: bool,
    dtype: int,
    past: Sequence[Value] | None = None,
    states: bool = False,
) -> None:
    """Define ``output`` from ``query``, ``key``, ``value`` and, if ``masked``, ``key_mask``; ``dtype`` is theirs.

    Args:
        past: ``past_state`` and ``past_normaliser`` of :mod:`effc.exporters.engine_states`; of causal layers only.
        states: define ``present_state`` and ``present_normaliser``, those behind the last key.
    """
    kv_heads, head_dim = geometry.kv_heads, geometry.head_dim
    groups = geometry.num_heads // kv_heads
    queries = s("Reshape", _features(s, form, "query"), [0, -1, kv_heads, groups, head_dim])
    queries = s("Transpose", queries, perm="[0, 2, 3, 1, 4]")
    folded = s("Reshape", queries, [0, kv_heads, -1, head_dim], to="query_features")
    keys = _heads(s, _features(s, form, "key"), kv_heads, head_dim)
    values = _heads(s, s.cast("value", TensorProto.FLOAT), kv_heads, head_dim)
    if masked:
        seen = s("Unsqueeze", s.cast(KEY_MASK, TensorProto.FLOAT), [1, 3])
        keys = s("Mul", keys, seen, to="seen_key_features")
    if past is not None or states or not geometry.causal:
        state = s("MatMul", s("Transpose", keys, perm="[0, 1, 3, 2]"), values, to="state")
        normaliser = s("ReduceSum", keys, [2], keepdims=1, to="normaliser")
    if geometry.causal:
        weights = s("MatMul", folded, s("Transpose", keys, perm="[0, 1, 3, 2]"), to="weights")
        weights = s("Mul", weights, _not_behind(s, groups), to="seen_weights")
        numerator = s("MatMul", weights, values)
        denominator = s("ReduceSum", weights, [-1], keepdims=1)
        if past is not None:
            before = s("Unsqueeze", past[1], [2], to="normaliser_before")
            numerator = s("Add", numerator, s("MatMul", folded, past[0]))
            denominator = s("Add", denominator, s("ReduceSum", s("Mul", folded, before), [-1], keepdims=1))
            state, normaliser = s("Add", state, past[0]), s("Add", normaliser, before)
        if states:
            s("Identity", state, to="present_state")
            s("Squeeze", normaliser, [2], to="present_normaliser")
    else:
        numerator = s("MatMul", folded, state)
        denominator = s("ReduceSum", s("Mul", folded, normaliser), [-1], keepdims=1)
    attended = s("Div", numerator, s("Max", denominator, _SMALLEST), to=ATTENDED)
    unfolded = s("Reshape", attended, [0, kv_heads, groups, -1, head_dim])
    joined = s("Transpose", unfolded, perm="[0, 3, 1, 2, 4]")
    s.cast(s("Reshape", joined, [0, 0, geometry.num_heads * head_dim]), dtype, to="output")


def _features(s: Statements, form: Linear, name: str) -> Value:
    """The feature map of packed heads."""
    numbers = s.cast(name, TensorProto.FLOAT)
    positive = s("Relu", numbers)
    if form.map == "relu":
        return positive
    # Elu(x) + 1 would lose the digits of exp(x) far below zero.
    return s("Add", positive, s("Exp", s("Min", numbers, 0.0)))


def _heads(s: Statements, packed: Value, kv_heads: int, head_dim: int) -> Value:
    """``[batch, kv_heads, length, head_dim]``."""
    return s("Transpose", s("Reshape", packed, [0, -1, kv_heads, head_dim]), perm="[0, 2, 1, 3]")


def _not_behind(s: Statements, groups: int) -> Value:
    """``[groups * queries, keys]``: 1 where a key is not behind the query; the queries are the last positions."""
    queries, keys = s.size("query", 1), s.size("key", 1)
    rows = s("Add", s.range(queries), s("Sub", keys, queries), to="query_places")
    seen = s("LessOrEqual", s("Unsqueeze", s.range(keys), [0]), s("Unsqueeze", rows, [1]))
    return s("Tile", s.cast(seen, TensorProto.FLOAT), [groups, 1], to="visible")
