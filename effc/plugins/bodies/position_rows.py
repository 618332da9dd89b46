"""Some rows of attention over every key: short sequences, decoding, global queries, and dense attention with a bias.

Blocks of rows pass over all keys, so that memory grows with the number of keys only.
"""

from __future__ import annotations

from collections.abc import Callable

from effc.plugins.bodies.position_block import attend_block, contiguous_bias, distance_bias
from effc.plugins.bodies.position_inputs import Inputs
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import limit_of

_BLOCK = 64

Predicate = Callable[[Statements, Value, Value, Value | None], Value | None]
"""Visible pairs, bool, of positions ``[rows, 1]`` and ``[1, keys]`` and the keys' marks ``[1, keys]``; None for all."""


def attend_rows(
    s: Statements,
    inputs: Inputs,
    query: Value,
    places: Value,
    predicate: Predicate,
    *,
    side_by_side: bool,
    bounded: tuple[int, int] | None = None,
    may_see_nothing: bool,
    block: int = _BLOCK,
) -> Value:
    """Attention of the rows ``query [batch, rows, width]`` at positions ``places [batch, rows]``.

    Args:
        side_by_side: whether rows are neighbours in the sequence.
        bounded: ``(left, first)`` if no more than the ``left`` keys before the first row, those behind it, and the
            ``first`` keys of all are visible.

    Returns:
        ``[batch, rows, width]``.
    """
    geometry = inputs.geometry
    heads, kv_heads, dim = geometry.num_heads, geometry.kv_heads, geometry.head_dim
    rows = s.size(query, 1, to="row_count")
    blocks = s("Div", s("Add", rows, block - 1), block)
    size = s("Div", s("Add", rows, s("Sub", blocks, 1)), blocks, to="rows_per_block")
    # The last block repeats the last row.
    padded = s.reshape(s("Min", s.range(s("Mul", blocks, size)), s("Sub", rows, 1)), blocks, size, to="padded_rows")
    # [batch, keys, ...]: views, so that each step of the loop over batches reads its own keys without a copy.
    sequences = {
        "query": s.reshape(query, inputs.batch, -1, heads, dim),
        "places": places,
        "key": s.reshape(inputs.key_rows, inputs.batch, -1, kv_heads, dim),
        "value": s.reshape(inputs.value_rows, inputs.batch, -1, kv_heads, dim),
    }
    if inputs.mask_rows is not None:
        sequences["mask"] = s.reshape(inputs.mask_rows, inputs.batch, inputs.keys)
    if inputs.mark_rows is not None:
        sequences["marks"] = s.reshape(inputs.mark_rows, inputs.batch, inputs.keys)

    def one_sequence(b: Statements, elements: list[Value]) -> list[Value]:
        own = dict(zip(sequences, elements, strict=True))
        positions = b.range(inputs.keys, to="key_places")
        if bounded is not None:
            first_row = b("Squeeze", b("Slice", own["places"], [0], [1]), [0])
            start = b("Max", b("Sub", first_row, bounded[0]), 0, to="first_near_key")
            positions = b("Range", start, inputs.keys, 1)
            if bounded[1]:
                positions = b("Concat", b.range(b("Min", start, bounded[1])), positions, axis=0)
            own |= {name: b("Gather", own[name], positions, axis=0) for name in ("key", "value", "mask") if name in own}

        def one_block(c: Statements, chosen: list[Value]) -> list[Value]:
            row_places = c("Gather", own["places"], chosen[0], to="row_places")
            row, key = c("Unsqueeze", row_places, [1]), c("Unsqueeze", positions, [0])
            marks = c("Unsqueeze", own["marks"], [0]) if "marks" in own else None
            padding = c("Unsqueeze", own["mask"], [0]) if "mask" in own else None
            visible = c.all_of(predicate(c, row, key, marks), padding)
            bias = None
            if inputs.has_bias and side_by_side and bounded is None:
                first = c("Squeeze", c("Slice", row_places, [0], [1]), [0])
                bias = contiguous_bias(c, inputs, c("Neg", first), size, inputs.keys)
            elif inputs.has_bias:
                bias = distance_bias(c, inputs, c("Sub", key, row))
            attended = attend_block(
                c,
                geometry,
                c("Gather", own["query"], chosen[0], axis=0, to="row_query"),
                own["key"],
                own["value"],
                queries=size,
                limit=None if visible is None else limit_of(c, visible),
                bias=bias,
                may_see_nothing=may_see_nothing,
            )
            return [attended.output]

        by_block = b.scan([padded], one_block, to="row_blocks")[0]
        joined = b.reshape(by_block, -1, heads * dim)
        return [b("Slice", joined, [0], b("Unsqueeze", rows, [0]), [0], to="rows_of_sequence")]

    return s.scan(list(sequences.values()), one_sequence, to="attended_rows")[0]
