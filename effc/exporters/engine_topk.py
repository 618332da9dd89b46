"""The choice of ``topk-blocks`` in standard operators for TensorRT: which blocks of keys each block of queries sees.

Block means, their scores and the ranking are those of :class:`effc.plugins.forms.content.BlockTopK`, in fp32 whatever
the engine's precision is. What comes out are the lists of blocks that effc's plugin takes as its input ``key_blocks``,
or a mask over all pairs where a layer is written out. Memory is linear in the length but for the pooled scores,
``(length / block) ** 2`` numbers for each key/value head.
"""

from __future__ import annotations

from onnx import TensorProto

from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.forms.content import BlockTopK
from effc.plugins.operator import KEY_MASK, AttentionGeometry

BLOCK_UNIT = 64
"""The kernels take blocks of a multiple of so many keys."""
KEY_SUMS = "key_sums"
"""Name of the input with the sums of the keys of every block, where something has kept them."""
MOST_BLOCKS = 3840
"""TensorRT ranks no more than so many."""
_OWN, _SINK, _IMPOSSIBLE = 2e30, 1e30, -1e30
# In place of the number of a block that is not chosen: behind all others, and exact in fp32.
_NO_BLOCK = 1e9


def write_lists(
    s: Statements, form: BlockTopK, geometry: AttentionGeometry, masked: bool, past: bool, sums: bool = False
) -> Value:
    """The chosen blocks ``[batch, kv_heads, query blocks, count]`` as floats, rising, with -1 behind the last.

    Args:
        masked: whether there is ``key_mask`` besides ``query`` and ``key``.
        past: whether there may be fewer queries than keys.
        sums: whether there is :data:`KEY_SUMS`, ``[batch, blocks, kv_heads * head_dim]`` in fp32.
    """
    ranks = _ranks(s, form, geometry, masked, past, sums)
    # So that there are always as many columns as blocks to choose.
    padded = s("Pad", ranks, [0, 0, 0, 0, 0, 0, 0, form.count], _IMPOSSIBLE, to="padded_ranks")
    scores, places = s.many("TopK", 2, padded, [form.count], to="strongest", axis=-1, largest=1, sorted=1)
    found = s("Greater", scores, _IMPOSSIBLE / 2)
    chosen = s("Where", found, s.cast(places, TensorProto.FLOAT), _NO_BLOCK, to="chosen_blocks")
    rising, _ = s.many("TopK", 2, chosen, [form.count], to="rising_blocks", axis=-1, largest=0, sorted=1)
    return s("Where", s("Less", rising, _NO_BLOCK / 2), rising, -1.0, to="listed_blocks")


def write_mask(s: Statements, lists: Value, form: BlockTopK, geometry: AttentionGeometry, dtype: int) -> Value:
    """``[batch, heads, queries, keys]`` bool: pairs whose block is listed; ``dtype``: that of the engine's numbers."""
    groups = geometry.num_heads // geometry.kv_heads
    queries, keys, blocks, first = _sizes(s, form)
    columns = s("Reshape", s.cast(s.range(blocks), TensorProto.FLOAT), [1, 1, 1, 1, -1])
    listed = s.cast(s("Equal", s("Unsqueeze", lists, [4]), columns), dtype)
    chosen = s("ReduceMax", listed, [3], keepdims=0, to="chosen_pairs_of_blocks")
    if groups > 1:
        chosen = s("Gather", chosen, [head // groups for head in range(geometry.num_heads)], axis=1)
    places = s("Add", s.range(queries), s("Sub", keys, queries), to="chooser_places")
    rows = s("Sub", s("Div", places, form.block), first)
    by_key = s("Gather", chosen, s("Div", s.range(keys), form.block), axis=3)
    return s.cast(s("Gather", by_key, rows, axis=2), TensorProto.BOOL, to="chosen_pairs")


def _sizes(s: Statements, form: BlockTopK) -> tuple[Value, Value, Value, Value]:
    """Numbers of queries, of keys and of their blocks, and the block of the first query."""
    queries, keys = s.size("query", 1, to="chooser_count"), s.size("key", 1, to="candidate_count")
    blocks = s("Div", s("Add", keys, form.block - 1), form.block, to="block_count")
    return queries, keys, blocks, s("Div", s("Sub", keys, queries), form.block, to="first_block")


def sum_keys(s: Statements, form: BlockTopK, g: AttentionGeometry, tail: Value, mask: Value | None) -> Value:
    """Sums of the unpadded keys of each block, ``[batch, N, kv_heads * head_dim]`` in fp32.

    Args:
        tail: positions that the last block lacks.
        mask: ``[batch, keys]`` in fp32.
    """
    keys = s.cast("key", TensorProto.FLOAT)
    if mask is not None:
        keys = s("Mul", keys, s("Unsqueeze", mask, [2]))
    padded = s("Pad", keys, s.shape(0, 0, 0, 0, tail, 0))
    return s("ReduceSum", s("Reshape", padded, [0, -1, form.block, g.kv_heads * g.head_dim]), [2], keepdims=0)


def _ranks(s: Statements, form: BlockTopK, g: AttentionGeometry, masked: bool, past: bool, sums: bool) -> Value:
    """How strongly each block of queries wants each block of keys, ``[batch, kv_heads, Q, N]``."""
    queries, keys, blocks, first = _sizes(s, form)
    numbers = s.range(blocks, to="block_numbers")
    mask = s.cast(KEY_MASK, TensorProto.FLOAT, to="candidate_mask") if masked else None
    tail = s("Sub", s("Mul", blocks, form.block), keys, to="block_tail")
    counts = _counts(s, form, numbers, keys, tail, mask)
    means = _key_means(s, g, KEY_SUMS if sums else sum_keys(s, form, g, tail, mask), counts)
    pools = _pools(s, form, g, (queries, keys, blocks, first), mask, past)
    scores = s("MatMul", pools, means, to="pooled_scores")
    column = s("Unsqueeze", numbers, [0], to="block_column")
    own = s("Unsqueeze", s("Add", s.range(s("Sub", blocks, first)), first), [1], to="own_block")
    filled = s("Greater", counts, 0.0, to="filled") if masked else None
    if filled is None:
        sink = s("Equal", column, 0)
    else:
        floats = s.cast(numbers, TensorProto.FLOAT)
        place = s("ReduceMin", s("Where", filled, floats, _NO_BLOCK), [1], keepdims=1, to="sink_block")
        sink = s("Unsqueeze", s("Equal", floats, place), [1, 2])
    ranks = s("Where", sink, _SINK, scores)
    possible = s.all_of(
        None if filled is None else s("Unsqueeze", filled, [1, 2]),
        s("LessOrEqual", column, own) if g.causal else None,
    )
    if possible is not None:
        ranks = s("Where", possible, ranks, _IMPOSSIBLE)
    return s("Where", s("Equal", column, own), _OWN, ranks, to="ranks")


def _counts(s: Statements, form: BlockTopK, numbers: Value, keys: Value, tail: Value, mask: Value | None) -> Value:
    """Unpadded keys of each block, ``[batch or 1, N]``."""
    if mask is None:
        left = s("Min", s("Sub", keys, s("Mul", numbers, form.block)), form.block)
        return s("Unsqueeze", s.cast(left, TensorProto.FLOAT), [0], to="block_counts")
    padded = s("Pad", mask, s.shape(0, 0, 0, tail))
    return s("ReduceSum", s("Reshape", padded, [0, -1, form.block]), [2], keepdims=0, to="block_counts")


def _key_means(s: Statements, g: AttentionGeometry, sums: Value, counts: Value) -> Value:
    """``[batch, kv_heads, head_dim, N]``."""
    heads = s("Transpose", s("Reshape", sums, [0, -1, g.kv_heads, g.head_dim]), perm="[0, 2, 3, 1]")
    return s("Div", heads, s("Unsqueeze", s("Max", counts, 1.0), [1, 2]), to="key_means")


def _pools(
    s: Statements,
    form: BlockTopK,
    g: AttentionGeometry,
    sizes: tuple[Value, Value, Value, Value],
    mask: Value | None,
    past: bool,
) -> Value:
    """Sums of the queries that choose for each block, ``[batch, kv_heads, Q, head_dim]``."""
    queries, keys, blocks, first = sizes
    block, width, groups = form.block, g.kv_heads * g.head_dim, g.num_heads // g.kv_heads
    rows = s.cast("query", TensorProto.FLOAT)
    if groups > 1:
        split = s("Reshape", rows, [0, -1, g.kv_heads, groups, g.head_dim])
        rows = s("Reshape", s("ReduceSum", split, [3], keepdims=0), [0, -1, width])
    offset = s("Sub", keys, queries, to="query_offset")
    if mask is not None:
        own_mask = s("Slice", mask, s("Unsqueeze", offset, [0]), [2**31 - 1], [1]) if past else mask
        rows = s("Mul", rows, s("Unsqueeze", own_mask, [2]), to="choosers")
    front = s("Sub", offset, s("Mul", first, block), to="front")
    span = s("Mul", s("Sub", blocks, first), block, to="chooser_span")
    if g.causal:
        # A pool ends with the first query of its block, so pools are blocks of queries moved back by all but one.
        moved = s("Pad", rows, s.shape(0, s("Add", front, block - 1), 0, 0, 0, 0))
        placed = s("Slice", moved, [0], s("Unsqueeze", span, [0]), [1])
    else:
        behind = s("Sub", s("Sub", span, front), queries)
        placed = s("Pad", rows, s.shape(0, front, 0, 0, behind, 0))
    pools = s("ReduceSum", s("Reshape", placed, [0, -1, block, width]), [2], keepdims=0, to="pools")
    if g.causal and past:
        # Of a block that begins before the first query, the first query there is.
        is_first = s("Equal", s.range(s("Sub", blocks, first)), 0)
        cut = s("And", is_first, s("Greater", front, 0))
        weight = s("Unsqueeze", s.cast(cut, TensorProto.FLOAT), [0, 2])
        pools = s("Add", pools, s("Mul", weight, s("Slice", rows, [0], [1], [1])))
    return s("Transpose", s("Reshape", pools, [0, -1, g.kv_heads, g.head_dim]), perm="[0, 2, 1, 3]")
