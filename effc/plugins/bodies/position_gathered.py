"""The gathered part: a loop over blocks of queries, each with one list of keys and one softmax."""

from __future__ import annotations

from dataclasses import dataclass

from effc.plugins.bodies.position_block import Attended, attend_block, contiguous_bias, distance_bias, merge
from effc.plugins.bodies.position_inputs import Inputs
from effc.plugins.bodies.position_plan import GatheredPart
from effc.plugins.bodies.position_slots import Slots, make_slots
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import UNBOUNDED, limit_of, near_visible


@dataclass(frozen=True)
class _Shared:
    """What holds in every block, with slots as the last axis; None where that is not needed or not so.

    Attributes:
        near: ``[block, slots]`` limits of the window's own terms.
        behind: ``[block, slots]`` limits of causality, where ``near`` does not hold it already.
        bias: ``[heads, block, window]``.
    """

    near: Value | None
    behind: Value | None
    bias: Value | None


def gathered(
    s: Statements, inputs: Inputs, part: GatheredPart, causal: bool, may_see_nothing: bool, earlier: Attended | None
) -> Value:
    """Attention of all queries over the gathered keys, merged with what ``earlier`` parts computed.

    Returns:
        ``[batch, queries, heads * head_dim]``.
    """
    table = make_slots(s, inputs, part, causal)
    shared = _shared(s, inputs, part, table, causal)
    sequences = {
        "query_rows": table.query_rows,
        "key_rows": table.key_rows,
        "usable": table.usable,
        "start": table.starts,
        "positions": table.positions,
    }
    if table.also_visible is not None:
        sequences["also"] = table.also_visible
    needed = _needed(inputs, part, causal, table)
    sequences = {name: value for name, value in sequences.items() if name in needed}

    def step(b: Statements, elements: list[Value]) -> list[Value]:
        given = dict(zip(sequences, elements, strict=True))
        rows, key_rows = given["query_rows"], given["key_rows"]
        own = attend_block(
            b,
            inputs.geometry,
            b("Gather", inputs.query_rows, rows, axis=0, to="block_query"),
            b("Gather", inputs.key_rows, key_rows, axis=0, to="block_key"),
            b("Gather", inputs.value_rows, key_rows, axis=0, to="block_value"),
            queries=part.block,
            limit=_limit(b, part, shared, given, causal),
            bias=_bias(b, inputs, part, shared, given),
            may_see_nothing=may_see_nothing,
            with_statistic=earlier is not None,
        )
        if earlier is None:
            return [own.output]
        return [merge(b, earlier.rows(b, rows), own, with_statistic=False).output]

    by_block = s.scan(list(sequences.values()), step, to="attended_blocks")[0]
    packed = s.reshape(by_block, inputs.batch, -1, inputs.geometry.num_heads * inputs.geometry.head_dim)
    return trim(s, packed, table.front, inputs.queries)


def trim(s: Statements, padded: Value, front: Value, queries: Value) -> Value:
    """``padded[:, front : front + queries]``."""
    start = s("Unsqueeze", front, [0])
    return s("Slice", padded, start, s("Add", start, s("Unsqueeze", queries, [0])), [1], to="trimmed")


def _sees_whole_window(part: GatheredPart, causal: bool) -> bool:
    return part.whole_blocks is not None and not causal


def _needed(inputs: Inputs, part: GatheredPart, causal: bool, table: Slots) -> set[str]:
    """Which tables the loop reads; the others are left out of the graph's loop."""
    needed = {"query_rows", "key_rows", "usable", "also"}
    ragged = not part.shift_invariant and not _sees_whole_window(part, causal)
    only_window = table.also_visible is None and part.whole_blocks is None
    if ragged or part.excluded or (inputs.has_bias and not only_window):
        needed |= {"start", "positions"}
    if _sees_whole_window(part, causal):
        needed.discard("also")
    return needed


def _shared(s: Statements, inputs: Inputs, part: GatheredPart, table: Slots, causal: bool) -> _Shared:
    near = behind = bias = None
    if part.window and part.shift_invariant and not _sees_whole_window(part, causal):
        # A block in the middle of a long sequence, where no key has a negative position.
        start = -(-part.left // part.block) * part.block
        query = s("Unsqueeze", s("Add", s.range(part.block), start), [1])
        key = s("Unsqueeze", s("Add", s.range(part.window), start - part.left), [0])
        flags = near_visible(s, part.terms, query, key, causal)
        order = s("LessOrEqual", key, query) if causal else None
        if table.also_visible is None:
            flags = s.all_of(flags, order)
            near = None if flags is None else limit_of(s, flags, to="window_limit")
        else:
            near = None if flags is None else _widen(s, limit_of(s, flags), table.positions, -UNBOUNDED)
            behind = None if order is None else _widen(s, limit_of(s, order), table.positions, UNBOUNDED)
    if inputs.has_bias and part.window and part.whole_blocks is None:
        bias = contiguous_bias(s, inputs, s.value(-part.left), s.value(part.block), s.value(part.window))
    return _Shared(near, behind, bias)


def _widen(s: Statements, window: Value, positions: Value, filling: float) -> Value:
    """Columns for the slots behind the window."""
    more = s("Sub", s("Shape", positions, start=1, end=2), s("Shape", window, start=1, end=2))
    return s("Pad", window, s("Concat", [0, 0, 0], more, axis=0), filling, to="widened")


def _limit(b: Statements, part: GatheredPart, shared: _Shared, given: dict[str, Value], causal: bool) -> Value:
    near, behind, excluded = shared.near, shared.behind, None
    ragged = not part.shift_invariant and not _sees_whole_window(part, causal)
    if ragged or part.excluded:
        query = b("Unsqueeze", b("Add", given["start"], b.range(part.block)), [1])
        key = b("Unsqueeze", given["positions"], [0])
        if ragged:
            flags = near_visible(b, part.terms, query, key, causal)
            assert flags is not None
            near = limit_of(b, flags)
            behind = limit_of(b, b("LessOrEqual", key, query)) if causal else None
        if part.excluded:
            flags = near_visible(b, part.excluded, query, key, causal)
            assert flags is not None
            excluded = b("Neg", limit_of(b, flags), to="not_excluded")
    also = given.get("also")
    seen = near if also is None else also if near is None else b("Max", near, also)
    result = given["usable"]
    for other in (seen, behind, excluded):
        if other is not None:
            result = b("Min", result, other)
    # [slots] where no query differs from another, [block, slots] otherwise.
    return b.reshape(result, 1, -1) if seen is also and behind is None and excluded is None else result


def _bias(b: Statements, inputs: Inputs, part: GatheredPart, shared: _Shared, given: dict[str, Value]) -> Value | None:
    if not inputs.has_bias:
        return None
    pieces = []
    if part.window:
        pieces.append(shared.bias)
        if shared.bias is None:
            first = b("Squeeze", b("Slice", given["positions"], [0], [1]), [0])
            pieces[0] = contiguous_bias(
                b, inputs, b("Sub", first, given["start"]), b.value(part.block), b.value(part.window)
            )
    if part.keys > part.window or part.marked:
        query = b("Unsqueeze", b("Add", given["start"], b.range(part.block)), [1])
        others = b("Slice", given["positions"], [part.window], [2**31], [0])
        pieces.append(distance_bias(b, inputs, b("Sub", others, query)))
    return pieces[0] if len(pieces) == 1 else b("Concat", *pieces, axis=2, to="slot_bias")
