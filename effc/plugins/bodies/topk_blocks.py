"""The ONNX function body of ``effc::BlockTopKAttention``.

Pooled scores of all pairs of blocks choose the key blocks; a ``Scan`` over chunks of query blocks then gathers whole
blocks, so that scores stay in cache. Memory is linear in the length but for the pooled scores and their ranking,
``(length / block) ** 2`` numbers a head: 1 / 4096 of the dense scores at blocks of 64.
"""

from __future__ import annotations

from effc.plugins.bodies.absolute_blocks import CAUSAL_COLUMNS, absolute_blocks, attended_chunk, packed_output
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.forms.content import BlockTopK
from effc.plugins.operator import AttentionGeometry

# Scores of one chunk, in bytes, that stay in a core's second-level cache.
_CHUNK_BYTES = 2 << 20


@body_text.register
def _(form: BlockTopK, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    block, kv, dim = form.block, geometry.kv_heads, geometry.head_dim
    per_chunk = max(1, _CHUNK_BYTES // (4 * geometry.num_heads * block * block * form.count))
    return f"""
    {absolute_blocks(geometry, block, per_chunk)}
    {_pools(geometry, block)}
    {_choice(geometry, form)}
    flat_shape = Constant <value_ints: ints = [-1, {block}, {dim}]> ()
    key_flat = Reshape (key_blocks, flat_shape)
    value_flat = Reshape (value_blocks, flat_shape)
    batch = Squeeze (batch_1d, zero)
    kv_heads = Constant <value: tensor = int64 {{{kv}}}> ()
    batch_heads = Mul (batch, kv_heads)
    batch_head_numbers = Range (n0, batch_heads, n1)
    batch_head_rows = Mul (batch_head_numbers, key_block_count)
    head_shape = Constant <value_ints: ints = [-1, {kv}, 1, 1]> ()
    head_rows = Reshape (batch_head_rows, head_shape)
    chosen_rows = Add (chosen, head_rows)
    slot_shape = Concat <axis: int = 0> (batch_1d, kv_1d, minus_one, per_chunk_1d, chosen_count)
    rows_split = Reshape (chosen_rows, slot_shape)
    rows_by_chunk = Transpose <perm: ints = [2, 0, 1, 3, 4]> (rows_split)

    batch_numbers = Range (n0, batch, n1)
    batch_rows = Mul (batch_numbers, key_block_count)
    batch_shape = Constant <value_ints: ints = [-1, 1, 1, 1]> ()
    batch_rows_split = Reshape (batch_rows, batch_shape)
    mask_rows = Add (chosen, batch_rows_split)
    mask_flat_shape = Constant <value_ints: ints = [-1, {block}]> ()
    mask_flat = Reshape (mask_blocks, mask_flat_shape)
    chosen_mask = Gather <axis: int = 0> (mask_flat, mask_rows)
    {_CAUSAL_SLOTS if geometry.causal else "seen_keys = Identity (chosen_mask)"}
    key_bias = Where (seen_keys, zero_float, hidden_bias)
    bias_shape = Concat <axis: int = 0> (batch_1d, kv_1d, minus_one, per_chunk_1d, one, one, columns_1d)
    bias_split = Reshape (key_bias, bias_shape)
    bias_by_chunk = Transpose <perm: ints = [2, 0, 1, 3, 4, 5, 6]> (bias_split)

    output_by_chunk = Scan <num_scan_inputs: int = 4, body: graph = chunk_body (
        chunk_query, chunk_rows, chunk_bias, chunk_sees_any
    ) => (chunk_output) {{
        keys_gathered = Gather <axis: int = 0> (key_flat, chunk_rows)
        values_gathered = Gather <axis: int = 0> (value_flat, chunk_rows)
        gathered_shape = Constant <value_ints: ints = [0, {kv}, {per_chunk}, -1, {dim}]> ()
        keys = Reshape (keys_gathered, gathered_shape)
        values = Reshape (values_gathered, gathered_shape)
        {attended_chunk(geometry, block, per_chunk, _CAUSAL_BIAS if geometry.causal else _BIAS)}
    }}> (query_by_chunk, rows_by_chunk, bias_by_chunk, sees_any)
    {packed_output(geometry)}
    """


_BIAS = "biased = Add (scores, chunk_bias)"
_CAUSAL_BIAS = """key_biased = Add (scores, chunk_bias)
        biased = Add (key_biased, causal_bias)"""

# The own block ranks first, so that the columns that need a comparison of positions are always the same.
_CAUSAL_SLOTS = f"""
    {CAUSAL_COLUMNS}
    slot_possible = Greater (chosen_scores, hidden_bias)
    slot_column = Unsqueeze (slot_possible, last_axis)
    seen_keys = And (chosen_mask, slot_column)
    other_columns = Sub (columns_1d, block)
    causal_pads = Concat <axis: int = 0> (zero, zero, zero, other_columns)
    causal_bias = Pad (behind_bias, causal_pads)
"""


def _pools(g: AttentionGeometry, block: int) -> str:
    """Sums of queries ``[batch, kv_heads, P, head_dim]`` and of unpadded keys ``[batch, kv_heads, N, head_dim]``."""
    kv, dim = g.kv_heads, g.head_dim
    groups = g.num_heads // kv
    # Sums over a block's tokens as products with rows of zeros and ones, which need no masked copy of the states.
    rows = 2 if g.causal else 1
    return f"""
    key_weights_axes = Constant <value_ints: ints = [1, 3]> ()
    key_weights = Unsqueeze (mask_float_blocks, key_weights_axes)
    key_sums_row = MatMul (key_weights, key_blocks)
    three = Constant <value_ints: ints = [3]> ()
    key_sums = Squeeze (key_sums_row, three)
    query_mask = Slice (mask_int, offset_1d, key_length_1d, one)
    query_mask_pads = Concat <axis: int = 0> (zero, front_1d, zero, query_tail_1d)
    query_mask_padded = Pad (query_mask, query_mask_pads)
    query_mask_float = Cast <to: int = 1> (query_mask_padded)
    query_mask_blocks = Reshape (query_mask_float, mask_shape)
    query_mask_rows = Unsqueeze (query_mask_blocks, two)
    {_CAUSAL_QUERY_ROWS if g.causal else "query_weights = Identity (query_mask_rows)"}
    query_tokens_shape = Constant <value_ints: ints = [0, -1, {block}, {g.num_heads * dim}]> ()
    query_tokens = Reshape (query_padded, query_tokens_shape)
    query_sums_packed = MatMul (query_weights, query_tokens)
    query_sums_shape = Constant <value_ints: ints = [0, 0, {rows}, {kv}, {groups}, {dim}]> ()
    query_sums_split = Reshape (query_sums_packed, query_sums_shape)
    group_axis = Constant <value_ints: ints = [4]> ()
    query_sums_rows = ReduceSum <keepdims: int = 0> (query_sums_split, group_axis)
    {_CAUSAL_QUERY_SUMS if g.causal else "query_sums_by_block = Squeeze (query_sums_rows, two)"}
    query_sums = Transpose <perm: ints = [0, 2, 1, 3]> (query_sums_by_block)
    """


# Row 0 takes the block's first query (of the very first block: the first query there is), row 1 all but the block's
# first position. A block's pool is its own row 0 and row 1 of the block before.
_CAUSAL_QUERY_ROWS = """
    columns_in_block = Range (n0, block, n1)
    query_block_index = Range (n0, query_blocks, n1)
    is_first_block = Equal (query_block_index, n0)
    first_column = Where (is_first_block, front, n0)
    first_column_rows = Unsqueeze (first_column, one)
    is_first_column = Equal (columns_in_block, first_column_rows)
    is_later_column = Greater (columns_in_block, n0)
    first_weights = Cast <to: int = 1> (is_first_column)
    later_weights = Cast <to: int = 1> (is_later_column)
    first_weights_rows = Unsqueeze (first_weights, one)
    first_query_weights = Mul (query_mask_rows, first_weights_rows)
    later_query_weights = Mul (query_mask_rows, later_weights)
    query_weights = Concat <axis: int = 2> (first_query_weights, later_query_weights)
"""

_CAUSAL_QUERY_SUMS = """
    first_sums = Gather <axis: int = 2> (query_sums_rows, n0)
    later_sums = Gather <axis: int = 2> (query_sums_rows, n1)
    one_back = Constant <value_ints: ints = [0, 1, 0, 0, 0, -1, 0, 0]> ()
    later_sums_before = Pad (later_sums, one_back)
    query_sums_by_block = Add (first_sums, later_sums_before)
"""


def _choice(g: AttentionGeometry, form: BlockTopK) -> str:
    """The chosen blocks ``chosen [batch, kv_heads, P, chosen_count]`` by descending ``chosen_scores``."""
    possible = "filled_row"
    causal = ""
    if g.causal:
        possible = "possible"
        causal = """
    not_after = LessOrEqual (key_block_numbers, own_column)
    possible = And (filled_row, not_after)"""
    return f"""
    per_chunk_1d = Unsqueeze (per_chunk, zero)
    kv_1d = Constant <value_ints: ints = [{g.kv_heads}]> ()
    wanted = Constant <value_ints: ints = [{form.count}]> ()
    chosen_count = Min (wanted, key_block_count_1d)
    columns_1d = Mul (chosen_count, block)
    key_counts = ReduceSum <keepdims: int = 0> (mask_float_blocks, last_axis)
    filled = Greater (key_counts, zero_float)
    filled_int = Cast <to: int = 6> (filled)
    sink = ArgMax <axis: int = 1, keepdims: int = 1> (filled_int)
    key_block_numbers = Range (n0, key_block_count, n1)
    is_sink = Equal (key_block_numbers, sink)
    head_axes = Constant <value_ints: ints = [1, 2]> ()
    sink_row = Unsqueeze (is_sink, head_axes)
    filled_row = Unsqueeze (filled, head_axes)
    last_block = Sub (key_block_count, n1)
    own_numbers = Min (query_block_numbers, last_block)
    own_column = Unsqueeze (own_numbers, one)
    is_own = Equal (key_block_numbers, own_column)
    {causal}
    key_sums_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (key_sums)
    sum_scores = MatMul (query_sums, key_sums_transposed)
    at_least_one = Max (key_counts, one_float)
    count_row = Unsqueeze (at_least_one, head_axes)
    pooled_scores = Div (sum_scores, count_row)
    sink_rank = Constant <value: tensor = float {{1e30}}> ()
    own_rank = Constant <value: tensor = float {{2e30}}> ()
    sink_scores = Where (sink_row, sink_rank, pooled_scores)
    possible_scores = Where ({possible}, sink_scores, hidden_bias)
    ranks = Where (is_own, own_rank, possible_scores)
    chosen_scores, chosen = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (ranks, chosen_count)
    """
