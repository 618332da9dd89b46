"""Attention of a pattern in standard operators for TensorRT: one ``Attention`` with a mask over all pairs.

TensorRT fuses it into its own kernel: right for every pattern, and O(length^2).
"""

from __future__ import annotations

from onnx import TensorProto

from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import all_visible
from effc.plugins.caches import sees_itself
from effc.plugins.forms.terms import Sinks
from effc.plugins.operator import KEY_MASK, AttentionGeometry
from effc.plugins.pattern import Pattern

# Within the range of fp16, and out of reach of any score.
_HIDDEN = -30000.0


def write_masked(
    s: Statements,
    form: Pattern,
    geometry: AttentionGeometry,
    given: tuple[str, ...],
    dtype: int,
    past: bool,
    chosen: Value | None = None,
) -> None:
    """Define ``output`` from ``query``, ``key``, ``value`` and what else is given.

    Args:
        given: names of the optional inputs that there are.
        dtype: of the numbers, an ONNX type.
        past: whether there may be fewer queries than keys.
        chosen: ``[batch, heads, queries, keys]`` bool: pairs that content has chosen out of what the pattern lets see,
            among them a key for every query that sees any.
    """
    bias_given = "distance_bias" in given or "distance_slope" in given
    # Where queries and keys are the same tokens, the kernels know causality themselves.
    by_kernel = form.is_dense and geometry.causal and not past and not bias_given and chosen is None
    positions = None if form.is_dense and not bias_given and (by_kernel or not geometry.causal) else _positions(s)
    masks: list[Value | None] = []
    if positions is not None:
        query, key, keys = positions
        marked = _marked(s) if "marks" in given else None
        seen = all_visible(s, form.terms, query, key, keys, geometry.causal, marked)
        masks.append(None if seen is None else s("Identity", seen, to="pattern"))
    if KEY_MASK in given:
        masks.append(s("Unsqueeze", "key_mask", [1, 2], to="padding"))
    mask = s.all_of(*masks)
    never_empty = KEY_MASK not in given and (form.is_dense or sees_itself(form))
    some: Value | None = None
    if mask is not None:
        if not never_empty and not by_kernel:
            some = s.cast(s("ReduceMax", s.cast(mask, dtype), [-1], keepdims=1), TensorProto.BOOL, to="sees_some")
            # A row that sees nothing is made to see everything, and its result to be zero: a softmax over nothing is
            # not a number, and would spread.
            mask = s("Or", mask, s("Not", some), to="mask")
        mask = _four_axes(s, mask, len(masks) > 1 or KEY_MASK in given or "marks" in given)
    if chosen is not None:
        listed = chosen if some is None else s("Or", chosen, s("Not", some))
        mask = listed if mask is None else s("And", mask, listed, to="mask")
    bias = _distance(s, given, positions, dtype)
    if mask is not None and (bias is not None or by_kernel):
        # Finite, so that a row of padding that sees nothing but padding is a number.
        shown = bias or s.cast(s.value(0.0), dtype)
        bias = s("Where", mask, shown, s.cast(s.value(_HIDDEN), dtype), to="scores")
    if bias is None and mask is not None and chosen is None and _same_for_all_queries(form, positions is not None):
        rows = s("Concat", [1, 1], s("Shape", "query", start=1, end=2), [1], axis=0)
        mask = s("Expand", mask, rows, to="mask_of_each_query")
    elif bias is not None and by_kernel:
        rows = s("Concat", [1, 1], s("Shape", "query", start=1, end=2), [1], axis=0)
        bias = s("Expand", bias, rows, to="scores_of_each_query")
    attributes = {"q_num_heads": geometry.num_heads, "kv_num_heads": geometry.kv_heads, "scale": geometry.scale}
    if by_kernel:
        attributes["is_causal"] = 1
    attended = s("Attention", "query", "key", "value", bias or mask, to="attended", **attributes)
    if some is None:
        s("Identity", attended, to="output")
        return
    # [batch, 1, queries, 1], or without its batch, to [batch, queries, 1].
    rows = s("Reshape", some, s.value([0, -1, 1] if KEY_MASK in given or "marks" in given else [1, -1, 1]))
    s("Where", rows, attended, s.cast(s.value(0.0), dtype), to="output")


def _same_for_all_queries(form: Pattern, positions: bool) -> bool:
    """Whether the mask has one row, which ONNX Runtime does not spread over the queries by itself."""
    return not positions or all(isinstance(term, Sinks) for term in form.terms)


def _positions(s: Statements) -> tuple[Value, Value, Value]:
    """Positions of the queries ``[queries, 1]`` and of the keys ``[1, keys]``, and the number of keys."""
    queries, keys = s.size("query", 1, to="query_length"), s.size("key", 1, to="key_length")
    # The queries are the last positions.
    rows = s("Add", s.range(queries), s("Sub", keys, queries), to="query_places")
    return s("Unsqueeze", rows, [1]), s("Unsqueeze", s.range(keys), [0]), keys


def _marked(s: Statements) -> Value:
    """``[batch, 1, queries, keys]``: pairs with a marked token."""
    offset = s("Sub", s("Shape", "key", start=1, end=2), s("Shape", "query", start=1, end=2))
    rows = s("Slice", "marks", offset, [2**31 - 1], [1], to="query_marks")
    return s("Or", s("Unsqueeze", "marks", [1, 2]), s("Unsqueeze", rows, [1, 3]), to="marked")


def _four_axes(s: Statements, mask: Value, batched: bool) -> Value:
    return mask if batched else s("Unsqueeze", mask, [0, 1])


def _distance(
    s: Statements, given: tuple[str, ...], positions: tuple[Value, Value, Value] | None, dtype: int
) -> Value | None:
    """What is added to the scores by distance, ``[1, heads, queries, keys]``."""
    if positions is None:
        return None
    parts = []
    distance = s("Sub", positions[1], positions[0], to="key_distance")
    if "distance_bias" in given:
        width = s("Squeeze", s("Shape", "distance_bias", start=1, end=2), [0])
        reach = s("Div", width, 2)
        place = s("Min", s("Max", s("Add", distance, reach), 0), s("Sub", width, 1))
        parts.append(s("Unsqueeze", s("Gather", "distance_bias", place, axis=1), [0]))
    if "distance_slope" in given:
        slope = s("Unsqueeze", "distance_slope", [0, 2, 3])
        parts.append(s("Mul", slope, s.cast(distance, TensorProto.FLOAT)))
    if not parts:
        return None
    return s.cast(parts[0] if len(parts) == 1 else s("Add", *parts), dtype, to="distance_scores")
