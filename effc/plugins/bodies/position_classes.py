"""Strided and dilated terms: positions that are equal modulo the stride form sequences of their own.

Inside one of them (a class) a strided term is dense and a dilated one a window, so that blocks of its queries need no
more keys than they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    table = _blocks(s, inputs, part)
    with_statistic = not last

    def step(b: Statements, elements: list[Value]) -> list[Value]:
        batch_row, class_number, start, own_rows = elements
        member = b.range(table.span)
        if part.reach is not None:
            before_start = b("Sub", start, part.reach[0])
            first_member = b("Max", b("Min", before_start, b("Sub", table.members, table.span)), 0)
            member = b("Add", member, first_member)
        positions = b("Add", b("Mul", member, part.modulus), class_number, to="class_positions")
        key_rows = b("Add", b("Min", positions, b("Sub", inputs.keys, 1)), batch_row, to="class_rows")
        usable = b("Less", positions, inputs.keys, to="inside")
        if inputs.mask_rows is not None:
            usable = b("And", usable, b("Gather", inputs.mask_rows, key_rows))
        query_member = b("Unsqueeze", b("Add", b.range(table.size), start), [1])
        query, key = b("Add", b("Mul", query_member, part.modulus), class_number), b("Unsqueeze", positions, [0])
        near = _in_class(b, part, query_member, b("Unsqueeze", member, [0]), causal)
        seen = near_visible(b, excluded, query, key, causal)
        visible = b.all_of(b("Unsqueeze", usable, [0]), near, None if seen is None else b("Not", seen))
        assert visible is not None
        own = attend_block(
            b,
            inputs.geometry,
            b("Gather", inputs.query_rows, own_rows, axis=0, to="class_query"),
            b("Gather", inputs.key_rows, key_rows, axis=0, to="class_key"),
            b("Gather", inputs.value_rows, key_rows, axis=0, to="class_value"),
            queries=table.size,
            limit=limit_of(b, visible),
            bias=distance_bias(b, inputs, b("Sub", key, query)) if inputs.has_bias else None,
            may_see_nothing=inputs.mask_rows is not None or earlier is not None,
            with_statistic=with_statistic or earlier is not None,
        )
        if earlier is not None:
            own = merge(b, earlier.rows(b, own_rows), own, with_statistic)
        return [own.output] if own.statistic is None else [own.output, own.statistic]

    results = s.scan(table.sequences, step, to="class_blocks")
    heads = inputs.geometry.num_heads
    ordered = []
    for result, width in zip(results, (inputs.geometry.head_dim, 1), strict=False):
        by_class = s.reshape(result, inputs.batch, part.modulus, -1, heads * width)
        in_order = s.reshape(s("Transpose", by_class, perm="[0, 2, 1, 3]"), inputs.batch, -1, heads * width)
        ordered.append(s.reshape(trim(s, in_order, table.front, inputs.queries), -1, heads, width))
    return Attended(ordered[0], ordered[1] if len(ordered) > 1 else None)


@dataclass(frozen=True)
class _Blocks:
    """How the queries of all classes are cut into blocks; scalars, but for ``sequences``.

    Attributes:
        members: length of a class.
        size: queries per block.
        span: keys per block.
        front: how many rows, in the order of positions, lie before the first query.
        sequences: for each block of every class of every batch its batch's first key row, its class, the number of its
            first query within the class, and ``[., size]`` its query rows.
    """

    members: Value
    size: Value
    span: Value
    front: Value
    sequences: list[Value]


def _blocks(s: Statements, inputs: Inputs, part: ClassPart) -> _Blocks:
    step = part.modulus
    first = s("Div", inputs.offset, step, to="first_member")
    members = s("Div", s("Add", inputs.keys, step - 1), step, to="class_length")
    rows = s("Sub", members, first)
    per_class = s("Div", s("Add", rows, _BLOCK - 1), _BLOCK, to="blocks_per_class")
    size = s("Div", s("Add", rows, s("Sub", per_class, 1)), per_class, to="class_block")
    # A class that is shorter than the window of a block is taken as a whole.
    span = members if part.reach is None else s("Min", s("Add", size, sum(part.reach)), members, to="class_span")
    # [batch, classes, blocks]
    axes = s.shape(inputs.batch, step, per_class)
    batch = s.reshape(s.range(inputs.batch), -1, 1, 1)
    number = s.reshape(s.range(step), -1, 1)
    starts = s("Add", s("Mul", s.range(per_class), size), first)
    key_starts = s("Mul", batch, inputs.keys)
    sequences = [s.reshape(s("Expand", index, axes), -1) for index in (key_starts, number, starts)]
    own_members = s("Add", s("Unsqueeze", starts, [1]), s.range(size))
    places = s("Add", s("Mul", own_members, step), s("Unsqueeze", number, [2]))
    places = s("Max", s("Min", s("Sub", places, inputs.offset), s("Sub", inputs.queries, 1)), 0)
    query_rows = s("Add", places, s("Unsqueeze", s("Mul", batch, inputs.queries), [3]))
    sequences.append(s.reshape(query_rows, -1, size, to="class_query_rows"))
    return _Blocks(members, size, span, s("Sub", inputs.offset, s("Mul", first, step)), sequences)


def _in_class(s: Statements, part: ClassPart, query: Value, key: Value, causal: bool) -> Value | None:
    """True where member ``key`` of a class is visible from member ``query``; None if every one is."""
    if part.reach is None:
        return s("LessOrEqual", key, query) if causal else None
    ahead = s("Sub", key, query, to="ahead")
    return s("And", s("GreaterOrEqual", ahead, -part.reach[0]), s("LessOrEqual", ahead, part.reach[1]))
