"""The ONNX function body of ``effc::HierarchicalAttention``.

Block means are rows behind the keys. A ``Scan`` walks over tiles of queries that lie in one block each; a tile gathers
its near keys and the means it sees, and attends to them in one softmax. The log of a block's number of keys, and what
is hidden, come as a bias. A sequence within two blocks has no means and takes a plain branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.preamble import attend_piece, preamble
from effc.plugins.bodies.whole import attend_whole
from effc.plugins.forms.hierarchical import FANOUT, Hierarchical
from effc.plugins.operator import AttentionGeometry

# Scores of one chunk of tiles, in bytes, that stay in a core's second-level cache.
_CHUNK_BYTES = 2 << 20
# Means of the topmost level that a chunk is sized for; longer sequences have more and still compute the same.
_USUAL_MEANS = 128


@dataclass(frozen=True)
class _Tiling:
    """How queries are cut: a step of the ``Scan`` takes ``together`` tiles of ``size`` queries."""

    size: int
    together: int


@body_text.register
def _(form: Hierarchical, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    g, tile = geometry, tile_size(form.block)
    width = _near(form, g) + 3 * FANOUT * (form.levels - 2) + _USUAL_MEANS
    tiling = _Tiling(tile, int(max(1, _CHUNK_BYTES // (4 * g.num_heads * tile * width))))
    return f"""
    {preamble(g)}
    fanout = Constant <value: tensor = int64 {{{FANOUT}}}> ()
    float_one = Constant <value: tensor = float {{1.0}}> ()
    last_key = Sub (key_length, n1)
    two_blocks = Constant <value: tensor = int64 {{{2 * form.block}}}> ()
    within_two_blocks = LessOrEqual (key_length, two_blocks)
    output = If (within_two_blocks) <then_branch: graph = whole () => (whole_output) {{
        {attend_whole(g)}
    }}, else_branch: graph = tiled () => (tiled_output) {{
        block = Constant <value: tensor = int64 {{{form.block}}}> ()
        {_means(form, g)}
        {_causal_table(form.block, tile) if g.causal else ""}
        {_query_tiles(g, tiling)}
        {_attended(form, g, tiling)}
        batch_first = Transpose <perm: ints = [1, 0, 2, 3]> (output_by_chunk)
        joined_shape = Constant <value_ints: ints = [0, -1, {g.num_heads * g.head_dim}]> ()
        joined = Reshape (batch_first, joined_shape)
        query_end_1d = Unsqueeze (query_end, zero)
        tiled_output = Slice (joined, query_head_1d, query_end_1d, one)
    }}>
    """


def tile_size(block: int) -> int:
    """Queries per tile: a divisor of ``block``, so that a tile lies in one block, and few enough to stay in cache."""
    return max(size for size in range(1, min(block, 64) + 1) if block % size == 0) if block % 64 else 64


def _near(form: Hierarchical, g: AttentionGeometry) -> int:
    """Keys of the blocks that a tile sees one by one."""
    return (2 if g.causal else 3) * form.block


def _means(form: Hierarchical, g: AttentionGeometry) -> str:
    """``all_keys``, ``all_values`` with the means of every level behind them, and ``biases [batch, rows]`` of all."""
    width, levels = g.kv_heads * g.head_dim, range(1, form.levels)
    return f"""
        last_block_offset = Constant <value: tensor = int64 {{{form.block - 1}}}> ()
        blocks_rounded = Add (key_length, last_block_offset)
        nodes1 = Div (blocks_rounded, block)
        padded_keys = Mul (nodes1, block)
        key_tail = Sub (padded_keys, key_length)
        key_tail_1d = Unsqueeze (key_tail, zero)
        key_pads = Concat <axis: int = 0> (zero, zero, zero, zero, key_tail_1d, zero)
        mask_pads = Concat <axis: int = 0> (zero, zero, zero, key_tail_1d)
        mask_float = Cast <to: int = 1> (key_mask)
        mask_padded = Pad (mask_float, mask_pads)
        key_padded = Pad (key, key_pads)
        value_padded = Pad (value, key_pads)
        node_mask_shape = Constant <value_ints: ints = [0, -1, 1, {form.block}]> ()
        node_mask = Reshape (mask_padded, node_mask_shape)
        node_shape = Constant <value_ints: ints = [0, -1, {form.block}, {width}]> ()
        {_first_means("key")}
        {_first_means("value")}
        node_counts = ReduceSum <keepdims: int = 0> (node_mask, last_axis)
        counts1 = Squeeze (node_counts, two)
        {"".join(_next_means(level, width) for level in levels[1:])}
        {"".join(_normalize(level) for level in levels)}
        {_joined("key", levels)}
        {_joined("value", levels)}
        biases = Concat <axis: int = 1> (mask_bias_padded, {", ".join(f"count_bias{level}" for level in levels)})
    """


def _query_tiles(g: AttentionGeometry, tiling: _Tiling) -> str:
    """``query_by_chunk`` and ``tiles_by_chunk``, the positions at which its tiles start, for the ``Scan``."""
    tile, tiles = tiling.size, tiling.together
    return f"""
        tile = Constant <value: tensor = int64 {{{tile}}}> ()
        first_tile = Div (offset, tile)
        tiles_start = Mul (first_tile, tile)
        query_head = Sub (offset, tiles_start)
        query_end = Add (query_length, query_head)
        chunk = Constant <value: tensor = int64 {{{tile * tiles}}}> ()
        last_chunk_offset = Constant <value: tensor = int64 {{{tile * tiles - 1}}}> ()
        query_rounded = Add (query_end, last_chunk_offset)
        chunks = Div (query_rounded, chunk)
        padded_queries = Mul (chunks, chunk)
        query_tail = Sub (padded_queries, query_end)
        query_head_1d = Unsqueeze (query_head, zero)
        query_tail_1d = Unsqueeze (query_tail, zero)
        query_pads = Concat <axis: int = 0> (zero, query_head_1d, zero, zero, query_tail_1d, zero)
        query_padded = Pad (query, query_pads)
        query_shape = Constant <
            value_ints: ints = [0, -1, {tiles}, {tile}, {g.kv_heads}, {g.num_heads // g.kv_heads}, {g.head_dim}]
        > ()
        query_split = Reshape (query_padded, query_shape)
        query_by_chunk = Transpose <perm: ints = [1, 0, 4, 2, 5, 3, 6]> (query_split)
        tile_starts = Range (n0, padded_queries, tile)
        tile_positions = Add (tile_starts, tiles_start)
        tiles_shape = Constant <value_ints: ints = [-1, {tiles}, 1]> ()
        tiles_by_chunk = Reshape (tile_positions, tiles_shape)
    """


def _attended(form: Hierarchical, g: AttentionGeometry, tiling: _Tiling) -> str:
    """``output_by_chunk``: every tile to its near keys and to the means that it sees, in one softmax."""
    tile, tiles, levels = tiling.size, tiling.together, range(1, form.levels)
    return f"""
        near_count = Constant <value: tensor = int64 {{{_near(form, g)}}}> ()
        near_offsets_from_own = Range (n0, near_count, n1)
        near_offsets = Sub (near_offsets_from_own, block)
        three_fanouts = Constant <value: tensor = int64 {{{3 * FANOUT}}}> ()
        list_offsets_from_own = Range (n0, three_fanouts, n1)
        list_offsets = Sub (list_offsets_from_own, fanout)
        top_nodes = Range (n0, nodes{levels[-1]}, n1)
        {_bases(levels)}
        output_by_chunk = Scan <num_scan_inputs: int = 2, body: graph = chunk_body (
            chunk_query, chunk_tiles
        ) => (chunk_output) {{
            own1 = Div (chunk_tiles, block)
            own_start = Mul (own1, block)
            near_positions = Add (own_start, near_offsets)
            near_clipped_low = Max (near_positions, n0)
            near_rows = Min (near_clipped_low, last_key)
            near_inside = Equal (near_rows, near_positions)
            {"".join(_interaction_list(form, level, g.causal) for level in levels)}
            rows = Concat <axis: int = 1> (near_rows, {", ".join(f"rows{level}" for level in levels)})
            inside = Concat <axis: int = 1> (near_inside, {", ".join(f"seen{level}" for level in levels)})
            rows_bias = Gather <axis: int = 1> (biases, rows)
            seen_bias = Where (inside, rows_bias, hidden_bias)
            bias_shape = Constant <value_ints: ints = [0, 1, {tiles}, 1, 1, -1]> ()
            tile_bias = Reshape (seen_bias, bias_shape)
            {_causal_bias(form.block, tile) if g.causal else "bias = Identity (tile_bias)"}
            keys = Gather <axis: int = 2> (all_keys, rows)
            values = Gather <axis: int = 2> (all_values, rows)
            keys_transposed = Transpose <perm: ints = [0, 1, 2, 4, 3]> (keys)
            {attend_piece(g, "chunk_query", tiles, tile)}
            by_token = Transpose <perm: ints = [0, 2, 4, 1, 3, 5]> (zeroed)
            packed_shape = Constant <value_ints: ints = [0, {tiles * tile}, {g.num_heads * g.head_dim}]> ()
            chunk_output = Reshape (by_token, packed_shape)
        }}> (query_by_chunk, tiles_by_chunk)
    """


def _first_means(name: str) -> str:
    """Sums of blocks of level 1 over the visible keys, ``[batch, nodes, width]``."""
    return f"""
        {name}_blocks = Reshape ({name}_padded, node_shape)
        {name}_block_sums = MatMul (node_mask, {name}_blocks)
        {name}_sums1 = Squeeze ({name}_block_sums, two)
    """


def _next_means(level: int, width: int) -> str:
    """Sums and counts of a level from those of the level below."""
    below = level - 1
    return f"""
        last_child{level} = Constant <value: tensor = int64 {{{FANOUT - 1}}}> ()
        rounded{level} = Add (nodes{below}, last_child{level})
        nodes{level} = Div (rounded{level}, fanout)
        children{level} = Mul (nodes{level}, fanout)
        missing{level} = Sub (children{level}, nodes{below})
        missing_1d{level} = Unsqueeze (missing{level}, zero)
        sum_pads{level} = Concat <axis: int = 0> (zero, zero, zero, zero, missing_1d{level}, zero)
        count_pads{level} = Concat <axis: int = 0> (zero, zero, zero, missing_1d{level})
        children_shape{level} = Constant <value_ints: ints = [0, -1, {FANOUT}, {width}]> ()
        key_padded{level} = Pad (key_sums{below}, sum_pads{level})
        key_children{level} = Reshape (key_padded{level}, children_shape{level})
        key_sums{level} = ReduceSum <keepdims: int = 0> (key_children{level}, two)
        value_padded{level} = Pad (value_sums{below}, sum_pads{level})
        value_children{level} = Reshape (value_padded{level}, children_shape{level})
        value_sums{level} = ReduceSum <keepdims: int = 0> (value_children{level}, two)
        counts_padded{level} = Pad (counts{below}, count_pads{level})
        count_children_shape{level} = Constant <value_ints: ints = [0, -1, {FANOUT}]> ()
        count_children{level} = Reshape (counts_padded{level}, count_children_shape{level})
        counts{level} = ReduceSum <keepdims: int = 0> (count_children{level}, two)
    """


def _normalize(level: int) -> str:
    """Means and the bias of a level: the log of its blocks' numbers of visible keys."""
    return f"""
        safe_counts{level} = Max (counts{level}, float_one)
        divisors{level} = Unsqueeze (safe_counts{level}, two)
        key_means{level} = Div (key_sums{level}, divisors{level})
        value_means{level} = Div (value_sums{level}, divisors{level})
        count_log{level} = Log (safe_counts{level})
        is_filled{level} = Greater (counts{level}, visible_bias)
        count_bias{level} = Where (is_filled{level}, count_log{level}, hidden_bias)
    """


def _joined(name: str, levels: range) -> str:
    """Keys or values with the means of every level behind, ``[batch, kv_heads, rows, head_dim]``."""
    means = ", ".join(f"{name}_means{level}" for level in levels)
    pad_bias = "mask_bias_padded = Pad (mask_bias, mask_pads, hidden_bias)" if name == "key" else ""
    return f"""
        {pad_bias}
        {name}_rows = Concat <axis: int = 1> ({name}_padded, {means})
        {name}_split = Reshape ({name}_rows, kv_shape)
        all_{name}s = Transpose <perm: ints = [0, 2, 1, 3]> ({name}_split)
    """


def _bases(levels: range) -> str:
    """The row at which each level's means begin."""
    lines = ["base1 = Identity (padded_keys)"]
    lines += [f"base{level} = Add (base{level - 1}, nodes{level - 1})" for level in levels[1:]]
    return "\n        ".join(lines)


def _interaction_list(form: Hierarchical, level: int, causal: bool) -> str:
    """Rows of the means of one level that each tile may see, and which of them it does see."""
    top = level == form.levels - 1
    if top:
        candidates = f"""
            candidates{level} = Identity (top_nodes)
            nodes_clipped{level} = Identity (top_nodes)
            exists{level} = Less (top_nodes, nodes{level})
        """
    else:
        candidates = f"""
            parent{level} = Div (own{level}, fanout)
            first_child{level} = Mul (parent{level}, fanout)
            candidates{level} = Add (first_child{level}, list_offsets)
            last_node{level} = Sub (nodes{level}, n1)
            candidates_low{level} = Max (candidates{level}, n0)
            nodes_clipped{level} = Min (candidates_low{level}, last_node{level})
            exists{level} = Equal (nodes_clipped{level}, candidates{level})
            own{level + 1} = Identity (parent{level})
        """
    behind = (
        f"farther{level} = GreaterOrEqual (gap{level}, n1)" if causal else f"farther{level} = Identity (exists{level})"
    )
    # Blocks at distances -1, 0 and 1 have an absolute gap below 2.
    return f"""
            {candidates}
            gap{level} = Sub (own{level}, candidates{level})
            distance{level} = Abs (gap{level})
            not_neighbour{level} = Greater (distance{level}, n1)
            {behind}
            far{level} = And (not_neighbour{level}, farther{level})
            seen{level} = And (far{level}, exists{level})
            absolute{level} = Add (nodes_clipped{level}, base{level})
            rows_shape{level} = Shape (seen{level})
            rows{level} = Expand (absolute{level}, rows_shape{level})
    """


def _causal_table(block: int, tile: int) -> str:
    """What hides keys behind the query inside its own block, ``[tiles per block, 1, tile, 2 * block]``."""
    return f"""
        table_width = Constant <value: tensor = int64 {{{block}}}> ()
        table_queries = Range (n0, table_width, n1)
        table_column = Unsqueeze (table_queries, one)
        not_behind = LessOrEqual (table_queries, table_column)
        own_table = Where (not_behind, visible_bias, hidden_bias)
        table_pads = Constant <value_ints: ints = [0, {block}, 0, 0]> ()
        near_table = Pad (own_table, table_pads)
        table_shape = Constant <value_ints: ints = [{block // tile}, 1, {tile}, {2 * block}]> ()
        causal_table = Reshape (near_table, table_shape)
    """


def _causal_bias(block: int, tile: int) -> str:
    return f"""
            into_block = Mod (chunk_tiles, block)
            tile_in_block = Div (into_block, tile)
            tile_number = Squeeze (tile_in_block, one)
            near_causal = Gather <axis: int = 0> (causal_table, tile_number)
            rows_count = Shape <start: int = 1, end: int = 2> (rows)
            near_count_1d = Constant <value_ints: ints = [{2 * block}]> ()
            means_count = Sub (rows_count, near_count_1d)
            causal_pads = Concat <axis: int = 0> (zero, zero, zero, zero, zero, zero, zero, means_count)
            causal_bias = Pad (near_causal, causal_pads)
            bias = Add (tile_bias, causal_bias)
    """
