"""Which keys each block of queries gathers: the window, the first keys, random blocks and marked tokens, none twice.

Tables over all blocks; 64-bit row numbers for the keys of a block are a small share of those keys themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from effc.plugins.bodies.position_inputs import Inputs
from effc.plugins.bodies.position_plan import GatheredPart
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import draw, limit_of
from effc.plugins.forms.terms import RANDOM_BLOCK


@dataclass(frozen=True)
class Slots:
    """Keys of every block of queries, all batches one after the other.

    Attributes:
        front: how many rows of a sequence's first block lie before its first query, a scalar.
        starts: position of each block's first query, ``[batch * blocks]``, the first axis of all below.
        query_rows: ``[., block]``, rows of :attr:`Inputs.query_rows`.
        positions: ``[., slots]``; beyond the sequence where a slot is not usable.
        key_rows: ``[., slots]``, rows of :attr:`Inputs.key_rows`.
        usable: ``[., slots]`` limits: the slot stands for a key that is not padding, and no other slot does.
        also_visible: ``[., slots]`` limits: every query of the block sees the key by other terms than the window's,
            or None without such terms. Slots outside the window are all of that kind.
    """

    front: Value
    starts: Value
    query_rows: Value
    positions: Value
    key_rows: Value
    usable: Value
    also_visible: Value | None


@dataclass(frozen=True)
class _Blocks:
    """What is known of each block; all ``[1, blocks, 1]``.

    Attributes:
        window: first key of the window and the one behind its last.
        drawn: key blocks that random terms draw.
    """

    start: Value
    window: tuple[Value, Value]
    drawn: list[Value]


def make_slots(s: Statements, inputs: Inputs, part: GatheredPart, causal: bool) -> Slots:
    """The slots of a gathered part."""
    first_block = s("Div", inputs.offset, part.block)
    end_block = s("Div", s("Add", inputs.keys, part.block - 1), part.block)
    starts = s("Mul", s("Range", first_block, end_block, 1), part.block, to="block_starts")
    column = s("Unsqueeze", starts, [0, 2], to="start_column")
    window_start = _window_start(s, part, column)
    drawn_from = s("Div", column, RANDOM_BLOCK) if part.randoms else column
    blocks = _Blocks(
        column,
        (window_start, s("Add", window_start, part.window, to="window_end")),
        [
            draw(s, term, number, drawn_from, inputs.keys, causal)
            for term in part.randoms
            for number in range(term.count)
        ],
    )
    positions, unique = _join(s, inputs, part, blocks, causal)
    last_key = s("Sub", inputs.keys, 1)
    inside = s.all_of(s("GreaterOrEqual", positions, 0), s("LessOrEqual", positions, last_key), unique)
    clipped = s("Max", s("Min", positions, last_key), 0)
    key_rows = s("Add", clipped, _batch_starts(s, inputs, inputs.keys), to="slot_rows")
    padding = None if inputs.mask_rows is None else s("Gather", inputs.mask_rows, key_rows, to="slot_mask")
    usable = s.all_of(inside, padding)
    also = _also_visible(s, inputs, part, blocks, positions, key_rows)
    assert usable is not None
    places = s("Sub", s("Add", column, s.range(part.block)), inputs.offset)
    places = s("Max", s("Min", places, s("Sub", inputs.queries, 1)), 0)
    query_rows = s("Add", places, _batch_starts(s, inputs, inputs.queries), to="block_query_rows")
    return Slots(
        s("Sub", inputs.offset, s("Mul", first_block, part.block), to="front"),
        s("Tile", starts, s("Unsqueeze", inputs.batch, [0]), to="batch_block_starts"),
        _flat(s, query_rows),
        _flat(s, positions),
        _flat(s, key_rows),
        _flat(s, limit_of(s, usable, to="usable")),
        None if also is None else _flat(s, limit_of(s, also, to="also_visible")),
    )


def _window_start(s: Statements, part: GatheredPart, column: Value) -> Value:
    if part.whole_blocks is None:
        return s("Sub", column, part.left, to="window_start")
    size = part.whole_blocks.block
    own = s("Mul", s("Div", column, size), size)
    return s("Sub", own, part.whole_blocks.neighbours * size, to="window_start")


def _join(s: Statements, inputs: Inputs, part: GatheredPart, blocks: _Blocks, causal: bool) -> tuple[Value, Value]:
    """All slots side by side: positions and whether no slot before them holds the same, ``[batch, blocks, slots]``."""
    pieces: list[tuple[Value, Value | None]] = []
    if part.window:
        pieces.append((s("Add", blocks.window[0], s.range(part.window), to="window_positions"), None))
    if part.first_keys:
        positions = s("Unsqueeze", s.range(part.first_keys), [0, 1], to="first_positions")
        pieces.append((positions, _outside_window(s, positions, blocks, causal)))
    for number, drawn in enumerate(blocks.drawn):
        positions = s("Add", s("Mul", drawn, RANDOM_BLOCK), s.range(RANDOM_BLOCK), to="random_positions")
        new = s.all_of(
            _outside_window(s, positions, blocks, causal),
            s("GreaterOrEqual", positions, part.first_keys),
            *(s("Not", s("Equal", drawn, earlier)) for earlier in blocks.drawn[:number]),
        )
        pieces.append((positions, new))
    if part.marked:
        pieces.append(_marked_slots(s, inputs, part, blocks, causal))
    count = s.size(blocks.start, 1, to="blocks")
    all_positions, all_new = [], []
    for positions, new in pieces:
        shape = s.shape(inputs.batch, count, s.size(positions, 2))
        all_positions.append(s("Expand", positions, shape))
        all_new.append(s("Expand", s.value(True) if new is None else new, shape))
    return (
        s("Concat", *all_positions, axis=2, to="positions"),
        s("Concat", *all_new, axis=2, to="unique"),
    )


def _outside_window(s: Statements, positions: Value, blocks: _Blocks, causal: bool) -> Value:
    before = s("Less", positions, blocks.window[0], to="before_window")
    # The window of causal attention ends with the block, and nothing behind that is visible.
    return before if causal else s("Or", before, s("GreaterOrEqual", positions, blocks.window[1]), to="outside_window")


def _marked_slots(
    s: Statements, inputs: Inputs, part: GatheredPart, blocks: _Blocks, causal: bool
) -> tuple[Value, Value | None]:
    assert inputs.mark_rows is not None
    positions, there = marked_positions(s, s.reshape(inputs.mark_rows, inputs.batch, inputs.keys))
    positions, there = s("Unsqueeze", positions, [1]), s("Unsqueeze", there, [1])
    new = s.all_of(
        there,
        _outside_window(s, positions, blocks, causal),
        s("GreaterOrEqual", positions, part.first_keys),
        *(s("Not", s("Equal", s("Div", positions, RANDOM_BLOCK), drawn)) for drawn in blocks.drawn),
    )
    return positions, new


def marked_positions(s: Statements, marks: Value) -> tuple[Value, Value]:
    """Where ``marks [batch, length]`` are set, in order, padded to the largest count (at least one).

    Returns:
        Positions ``[batch, count]`` and whether there is a mark at all, bool.
    """
    numbers = s.cast(marks, TensorProto.FLOAT)
    largest = s("ReduceMax", s("ReduceSum", numbers, [1], keepdims=0), keepdims=0)
    count = s("Max", s.cast(largest, TensorProto.INT64), 1)
    values, positions = s.many("TopK", 2, numbers, s("Unsqueeze", count, [0]), to="marked", axis=1)
    return positions, s("Greater", values, 0.5, to="is_marked")


def _also_visible(
    s: Statements, inputs: Inputs, part: GatheredPart, blocks: _Blocks, positions: Value, key_rows: Value
) -> Value | None:
    flags: list[Value | None] = []
    if part.first_keys:
        flags.append(s("Less", positions, part.first_keys, to="among_first"))
    key_block = s("Div", positions, RANDOM_BLOCK) if blocks.drawn else positions
    flags += [s("Equal", key_block, drawn, to="drawn_here") for drawn in blocks.drawn]
    if part.marked:
        assert inputs.mark_rows is not None
        flags.append(s("Gather", inputs.mark_rows, key_rows, to="marked_here"))
    return s.any_of(*flags)


def _batch_starts(s: Statements, inputs: Inputs, length: Value) -> Value:
    """Row of each batch's first token, ``[batch, 1, 1]``."""
    return s("Unsqueeze", s("Mul", s.range(inputs.batch), length), [1, 2])


def _flat(s: Statements, table: Value) -> Value:
    return s("Flatten", table, axis=2)
