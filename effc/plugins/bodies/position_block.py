"""Softmax attention of one block of queries over one list of keys: the core that all parts share."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from effc.plugins.bodies.position_inputs import Inputs
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.operator import AttentionGeometry

# Hidden scores are set this far below the smallest score of the block: exp(-24) is 4e-11. Setting them to -1e30 would
# make their weights denormal numbers, which quadruples the time of Softmax.
_MARGIN = 24.0
_NOTHING = -1e30


@dataclass(frozen=True)
class Attended:
    """What a part computed for each of its queries.

    Attributes:
        output: ``[queries, heads, head_dim]``.
        statistic: log-sum-exp of the visible scores, ``[queries, heads, 1]``, where it was asked for.
    """

    output: Value
    statistic: Value | None

    def rows(self, s: Statements, numbers: Value) -> Attended:
        """Of some queries only."""
        output = s("Gather", self.output, numbers, axis=0, to="earlier_output")
        statistic = self.statistic and s("Gather", self.statistic, numbers, axis=0, to="earlier_statistic")
        return Attended(output, statistic)


def attend_block(
    s: Statements,
    geometry: AttentionGeometry,
    query: Value,
    key: Value,
    value: Value,
    *,
    queries: int | Value,
    limit: Value | None,
    bias: Value | None = None,
    may_see_nothing: bool,
    with_statistic: bool = False,
) -> Attended:
    """Attention of ``query [queries, heads, head_dim]`` over ``key`` and ``value [keys, kv_heads, head_dim]``.

    The transposes below are not computed: ONNX Runtime folds them into the products.

    Args:
        queries: how many there are.
        limit: ``[queries or 1, keys]``, see ``position_visible.UNBOUNDED``; None if every pair is visible.
        bias: added to the scores, ``[heads, queries, keys]``.
        may_see_nothing: whether rows without a visible key can occur; they become zeros.
    """
    heads, kv_heads, dim = geometry.num_heads, geometry.kv_heads, geometry.head_dim
    groups = heads // kv_heads
    scaled = s("Mul", query, float(geometry.scale), to="scaled_query")
    if groups == 1:
        rows = s("Transpose", scaled, perm="[1, 0, 2]", to="query_by_head")
    else:
        split = s.reshape(scaled, queries, kv_heads, groups, dim)
        rows = s.reshape(s("Transpose", split, perm="[1, 2, 0, 3]"), kv_heads, -1, dim, to="query_by_group")
    scores = s("MatMul", rows, s("Transpose", key, perm="[1, 2, 0]"), to="scores")
    if groups > 1:
        scores = s.reshape(scores, heads, queries, -1, to="scores_by_head")
    if bias is not None:
        scores = s("Add", scores, bias, to="biased_scores")
    if limit is not None:
        floor = s("Sub", s("ReduceMin", scores, keepdims=0), _MARGIN, to="score_floor")
        scores = s("Min", scores, s("Max", limit, floor), to="visible_scores")
    weights = s("Softmax", scores, axis=-1, to="weights")
    grouped = weights
    if groups > 1:
        per_group = groups * queries if isinstance(queries, int) else s("Mul", queries, groups)
        grouped = s.reshape(weights, kv_heads, per_group, -1, to="grouped_weights")
    product = s("MatMul", grouped, s("Transpose", value, perm="[1, 0, 2]"), to="attended")
    if groups > 1:
        product = s.reshape(product, heads, queries, dim, to="attended_by_head")
    sees_any: Value | None = None
    if limit is not None and may_see_nothing:
        sees_any = s("Greater", s("ReduceMax", limit, [-1], keepdims=1), 0.0, to="sees_any")
        product = s("Mul", product, s.cast(sees_any, TensorProto.FLOAT), to="zeroed")
    output = s("Transpose", product, perm="[1, 0, 2]", to="attended_by_query")
    if not with_statistic:
        return Attended(output, None)
    # The largest weight is exp(largest score - log-sum-exp) and never small, so its logarithm is accurate.
    largest = s("ReduceMax", scores, [-1], keepdims=1, to="largest_score")
    statistic = s("Sub", largest, s("Log", s("ReduceMax", weights, [-1], keepdims=1)), to="log_sum_exp")
    if sees_any is not None:
        statistic = s("Where", sees_any, statistic, _NOTHING)
    return Attended(output, s("Transpose", statistic, perm="[1, 0, 2]", to="statistic"))


def merge(s: Statements, one: Attended, other: Attended, with_statistic: bool) -> Attended:
    """Attention over the keys of both, which are disjoint."""
    assert one.statistic is not None and other.statistic is not None
    larger = s("Max", one.statistic, other.statistic)
    first, second = (s("Exp", s("Sub", part.statistic, larger)) for part in (one, other))
    total = s("Add", first, second)
    output = s(
        "Add",
        s("Mul", one.output, s("Div", first, total)),
        s("Mul", other.output, s("Div", second, total)),
        to="merged",
    )
    return Attended(output, s("Add", larger, s("Log", total), to="merged_statistic") if with_statistic else None)


def distance_bias(s: Statements, inputs: Inputs, distance: Value) -> Value | None:
    """What is added to the scores at distances ``[queries, keys]``: ``[heads, queries, keys]``, or None."""
    total: Value | None = None
    if inputs.bias is not None:
        reach = s("Div", s.size(inputs.bias, 1), 2, to="bias_reach")
        clamped = s("Max", s("Min", distance, reach), s("Neg", reach))
        total = s("Gather", inputs.bias, s("Add", clamped, reach), axis=1, to="bias")
    if inputs.slope is not None:
        slope = s.reshape(inputs.slope, -1, 1, 1)
        sloped = s("Mul", slope, s.cast(distance, TensorProto.FLOAT), to="sloped")
        total = sloped if total is None else s("Add", total, sloped)
    return total


def contiguous_bias(s: Statements, inputs: Inputs, first: Value, queries: Value, keys: Value) -> Value | None:
    """:func:`distance_bias` of ``queries`` and ``keys`` (counts) that both stand side by side.

    ``first`` is the distance of the first key from the first query. Rows of such a matrix are one vector, shifted: a
    vector of ``keys + queries`` elements that repeats row after row, read with rows one element shorter, does that
    without a look-up for each pair.
    """
    if not inputs.has_bias:
        return None
    length = s("Add", keys, queries)
    # Wrapped so that the element before the first key, which the second query needs, is the vector's last one.
    place = s.range(length)
    wrapped = s("Where", s("Less", place, keys), place, s("Sub", place, length))
    vector = distance_bias(s, inputs, s("Unsqueeze", s("Add", wrapped, first), [0]))
    assert vector is not None
    heads = inputs.geometry.num_heads
    repeated = s("Expand", vector, s.shape(heads, queries, length))
    flat = s.reshape(repeated, heads, -1)
    shorter = s("Sub", length, 1)
    skewed = s("Slice", flat, [0], s("Unsqueeze", s("Mul", shorter, queries), [0]), [1])
    rows = s.reshape(skewed, heads, queries, shorter)
    return s("Slice", rows, [0], s("Unsqueeze", keys, [0]), [2], to="bias")
