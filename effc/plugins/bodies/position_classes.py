"""Strided and dilated terms: positions that are equal modulo the stride form sequences of their own.

Inside one of them (a class) a strided term is dense and a dilated one a window, so that blocks of its queries need no
more keys than they see.
"""

from __future__ import annotations

from collections.abc import Sequence

from effc.plugins.bodies.position_block import Attended, attend_block, distance_bias, merge
from effc.plugins.bodies.position_gathered import trim
from effc.plugins.bodies.position_inputs import Inputs
from effc.plugins.bodies.position_plan import ClassPart
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import limit_of, near_visible
from effc.plugins.forms.terms import Dilated, Strided

# Queries per block at most; blocks of a class are of equal size, so that none is nearly empty.
_BLOCK = 128


def class_part(
    s: Statements,
    inputs: Inputs,
    part: ClassPart,
    causal: bool,
    *,
    excluded: Sequence[Strided | Dilated],
    earlier: Attended | None,
    last: bool,
) -> Attended:
    """Attention of all queries over the visible keys of their classes, merged with what ``earlier`` parts computed.

    Args:
        excluded: terms whose pairs those parts have computed.
        last: whether no part follows, so that no statistic is needed.

    Returns:
        Rows as in :attr:`Inputs.query_rows`.
    """
    step = part.modulus
    first = s("Div", inputs.offset, step, to="first_member")
    members = s("Div", s("Add", inputs.keys, step - 1), step, to="class_length")
    rows = s("Sub", members, first)
    per_class = s("Div", s("Add", rows, _BLOCK - 1), _BLOCK, to="blocks_per_class")
    size = s("Div", s("Add", rows, s("Sub", per_class, 1)), per_class, to="class_block")
    # [batch, classes, blocks]
    axes = s.shape(inputs.batch, step, per_class)
    batch_index = s.reshape(s.range(inputs.batch), -1, 1, 1)
    class_index = s.reshape(s.range(step), -1, 1)
    starts = s("Add", s("Mul", s.range(per_class), size), first)
    flat = [
        s("Flatten", s("Expand", index, axes), axis=0, to=name)
        for index, name in ((s("Mul", batch_index, inputs.keys), "class_row"), (class_index, "class_index"))
    ]
    sequences = [s("Squeeze", index, [0]) for index in (*flat, s("Flatten", s("Expand", starts, axes), axis=0))]
    place = s("Add", s("Mul", s("Add", s("Unsqueeze", starts, [1]), s.range(size)), step), s("Unsqueeze", class_index, [2]))
    place = s("Max", s("Min", s("Sub", place, inputs.offset), s("Sub", inputs.queries, 1)), 0)
    query_rows = s("Add", place, s("Unsqueeze", s("Mul", batch_index, inputs.queries), [3]))
    sequences.append(s.reshape(query_rows, -1, size, to="class_query_rows"))

    span = members
    if part.reach is not None:
        # A class that is shorter than the window of a block is taken as a whole.
        span = s("Min", s("Add", size, sum(part.reach)), members, to="class_span")
    last_start = s("Sub", members, span)
    merged_excluded = [term for term in excluded]

    def body(b: Statements, elements: list[Value]) -> list[Value]:
        batch_row, class_number, start, own_rows = elements
        member = b.range(span)
        if part.reach is not None:
            member = b("Add", member, b("Max", b("Min", b("Sub", start, part.reach[0]), last_start), 0))
        positions = b("Add", b("Mul", member, step), class_number, to="class_positions")
        inside = b("Less", positions, inputs.keys)
        key_rows = b("Add", b("Min", positions, b("Sub", inputs.keys, 1)), batch_row)
        padding = None if inputs.mask_rows is None else b("Gather", inputs.mask_rows, key_rows)
        visible = b("Unsqueeze", b.all_of(inside, padding) or inside, [0])
        query_member = b("Unsqueeze", b("Add", b.range(size), start), [1])
        if part.reach is not None or causal:
            ahead = b("Sub", b("Unsqueeze", member, [0]), query_member)
            visible = b("And", visible, b("LessOrEqual", ahead, 0 if causal else part.reach[1] if part.reach else 0))
            if part.reach is not None:
                visible = b("And", visible, b("GreaterOrEqual", ahead, -part.reach[0]))
        if merged_excluded or inputs.has_bias:
            query = b("Add", b("Mul", query_member, step), class_number)
            key = b("Unsqueeze", positions, [0])
            seen = near_visible(b, merged_excluded, query, key, causal)
            visible = visible if seen is None else b("And", visible, b("Not", seen))
        own = attend_block(
            b,
            inputs.geometry,
            b("Gather", inputs.query_rows, own_rows, axis=0, to="class_query"),
            b("Gather", inputs.key_rows, key_rows, axis=0, to="class_key"),
            b("Gather", inputs.value_rows, key_rows, axis=0, to="class_value"),
            queries=size,
            limit=limit_of(b, visible),
            bias=distance_bias(b, inputs, b("Sub", key, query)) if inputs.has_bias else None,
            may_see_nothing=inputs.mask_rows is not None or earlier is not None,
            with_statistic=earlier is not None or not last,
        )
        if earlier is not None:
            assert earlier.statistic is not None
            before = Attended(
                b("Gather", earlier.output, own_rows, axis=0), b("Gather", earlier.statistic, own_rows, axis=0)
            )
            own = merge(b, before, own, with_statistic=not last)
        return [own.output] if own.statistic is None else [own.output, own.statistic]

    results = s.scan(sequences, body, to="class_blocks")
    heads, front = inputs.geometry.num_heads, s("Sub", inputs.offset, s("Mul", first, step))
    ordered = []
    for result, width in zip(results, (inputs.geometry.head_dim, 1), strict=False):
        by_class = s.reshape(result, inputs.batch, step, -1, heads * width)
        in_order = s.reshape(s("Transpose", by_class, perm="[0, 2, 1, 3]"), inputs.batch, -1, heads * width)
        ordered.append(s.reshape(trim(s, in_order, front, inputs.queries), -1, heads, width))
    return Attended(ordered[0], ordered[1] if len(ordered) > 1 else None)
