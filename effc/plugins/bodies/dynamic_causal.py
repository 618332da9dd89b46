"""The causal part of the body of ``effc::DynamicAttention``: a ``Scan`` that carries the important keys along."""

from __future__ import annotations

from effc.plugins.bodies.absolute_blocks import CAUSAL_COLUMNS, attended_chunk
from effc.plugins.forms.content import SUMMARY_BLOCK, Dynamic
from effc.plugins.operator import AttentionGeometry

_CAUSAL_BIAS = """key_biased = Add (scores, chunk_bias)
        other_columns = Sub (columns_1d, block)
        causal_pads = Concat <axis: int = 0> (zero, zero, zero, other_columns)
        causal_bias = Pad (behind_bias, causal_pads)
        biased = Add (key_biased, causal_bias)"""


def causal_chunks(form: Dynamic, g: AttentionGeometry) -> str:
    """Columns are the near blocks, the own one first, then as many important keys and means as there can be by then."""
    return f"""
    {_suffix_means(g)}
    {CAUSAL_COLUMNS}
    {_row_starts(g)}
    {_important_at_first(form, g)}
    last_scores, last_keys, output_by_chunk = Scan <num_scan_inputs: int = 3, body: graph = block_body (
        held_scores, held_keys, chunk_query, own_number, chunk_sees_any
    ) => (top_scores, top_keys, chunk_output) {{
        {_IMPORTANT_NOW}
        {_FAR_COLUMNS}
        {_near_columns(form, g)}
        {_COLUMNS}
        {attended_chunk(g, SUMMARY_BLOCK, 1, _CAUSAL_BIAS)}
    }}> (start_scores, start_keys, query_by_chunk, query_block_numbers, sees_any)
    """


def _row_starts(g: AttentionGeometry) -> str:
    """Where the tokens of every head, and the means of every block, begin in the tables of rows."""
    return f"""
    token_count = Mul (batch_heads, keys_padded_length)
    head_shape = Constant <value_ints: ints = [-1, {g.kv_heads}, 1]> ()
    head_starts_flat = Mul (batch_head_numbers, keys_padded_length)
    head_starts = Reshape (head_starts_flat, head_shape)
    mean_block_starts = Mul (key_block_numbers, block)
    mean_head_starts = Add (head_starts, token_count)
    mean_starts = Add (mean_head_starts, mean_block_starts)
    block_positions = Range (n0, block, n1)
    """


def _important_at_first(form: Dynamic, g: AttentionGeometry) -> str:
    """``start_scores``, ``start_keys``: the important keys of blocks that no query is near to."""
    return f"""
    leaving_reach = Constant <value: tensor = int64 {{{form.reach + 1}}}> ()
    first_leaving = Sub (first_block, leaving_reach)
    before_first = Less (key_block_numbers, first_leaving)
    before_first_column = Unsqueeze (before_first, one)
    earlier_scores = Where (before_first_column, token_scores, hidden_bias)
    per_head_shape = Constant <value_ints: ints = [0, {g.kv_heads}, -1]> ()
    earlier_by_head = Reshape (earlier_scores, per_head_shape)
    start_scores, start_keys = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (earlier_by_head, kept)
    """


# The important keys, after the block that ceases to be near has joined.
_IMPORTANT_NOW = """
        leaving = Sub (own_number, leaving_reach)
        leaving_exists = GreaterOrEqual (leaving, n0)
        leaving_clipped = Max (leaving, n0)
        leaving_scores_any = Gather <axis: int = 2> (token_scores, leaving_clipped)
        leaving_scores = Where (leaving_exists, leaving_scores_any, hidden_bias)
        leaving_start = Mul (leaving_clipped, block)
        leaving_positions = Add (block_positions, leaving_start)
        leaving_shape = Shape (leaving_scores)
        leaving_keys = Expand (leaving_positions, leaving_shape)
        candidate_scores = Concat <axis: int = 2> (held_scores, leaving_scores)
        candidate_keys = Concat <axis: int = 2> (held_keys, leaving_keys)
        top_scores, top_order = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (candidate_scores, kept)
        top_keys = GatherElements <axis: int = 2> (candidate_keys, top_order)
        top_visible = Greater (top_scores, hidden_bias)
        top_bias = Where (top_visible, zero_float, hidden_bias)
        top_rows = Add (top_keys, head_starts)
"""

# Important keys and means of all blocks that are not near.
_FAR_COLUMNS = f"""
        far_count = Add (leaving, n1)
        far_blocks = Max (far_count, n0)
        far_blocks_1d = Unsqueeze (far_blocks, zero)
        far_tokens = Mul (far_blocks_1d, block)
        top_count = Min (kept, far_tokens)
        top_blocks = Div (top_keys, block)
        top_visible_float = Cast <to: int = 1> (top_visible)
        no_counts = Mul (visible_counts, zero_float)
        top_counts = ScatterElements <axis: int = 2, reduction: string = "add"> (
            no_counts, top_blocks, top_visible_float
        )
        other_counts = Sub (visible_counts, top_counts)
        has_others = Greater (other_counts, zero_float)
        is_far = LessOrEqual (key_block_numbers, leaving)
        mean_seen = And (has_others, is_far)
        counts_or_one = Max (other_counts, one_float)
        log_counts = Log (counts_or_one)
        mean_bias = Where (mean_seen, log_counts, hidden_bias)
        last_suffix = Constant <value: tensor = float {{{SUMMARY_BLOCK - 1}.0}}> ()
        suffix_existing = Min (top_counts, last_suffix)
        suffix = Cast <to: int = 7> (suffix_existing)
        mean_rows = Add (mean_starts, suffix)
        far_mean_rows = Slice (mean_rows, zero, far_blocks_1d, two)
        far_mean_bias = Slice (mean_bias, zero, far_blocks_1d, two)
        far_top_rows = Slice (top_rows, zero, top_count, two)
        far_top_bias = Slice (top_bias, zero, top_count, two)
"""


def _near_columns(form: Dynamic, g: AttentionGeometry) -> str:
    """``near_rows`` and ``near_bias``: the keys of the near blocks, the own one first."""
    near = form.reach + 1
    return f"""
        near_offsets = Constant <value_ints: ints = [{", ".join(str(-number) for number in range(near))}]> ()
        near_numbers = Add (near_offsets, own_number)
        near_exists = GreaterOrEqual (near_numbers, n0)
        near_clipped = Max (near_numbers, n0)
        near_mask = Gather <axis: int = 1> (mask_blocks, near_clipped)
        near_exists_column = Unsqueeze (near_exists, one)
        near_seen = And (near_mask, near_exists_column)
        near_bias_blocks = Where (near_seen, zero_float, hidden_bias)
        near_bias_shape = Constant <value_ints: ints = [0, 1, {near * SUMMARY_BLOCK}]> ()
        near_bias_one = Reshape (near_bias_blocks, near_bias_shape)
        per_kv_shape = Constant <value_ints: ints = [1, {g.kv_heads}, 1]> ()
        near_bias = Expand (near_bias_one, per_kv_shape)
        near_starts = Mul (near_clipped, block)
        near_starts_column = Unsqueeze (near_starts, one)
        near_positions = Add (near_starts_column, block_positions)
        flat = Constant <value_ints: ints = [-1]> ()
        near_positions_flat = Reshape (near_positions, flat)
        near_rows = Add (head_starts, near_positions_flat)
    """


_COLUMNS = """
        column_rows = Concat <axis: int = 2> (near_rows, far_top_rows, far_mean_rows)
        column_bias = Concat <axis: int = 2> (near_bias, far_top_bias, far_mean_bias)
        bias_axes = Constant <value_ints: ints = [2, 3, 4]> ()
        chunk_bias = Unsqueeze (column_bias, bias_axes)
        keys_gathered = Gather <axis: int = 0> (key_table, column_rows)
        values_gathered = Gather <axis: int = 0> (value_table, column_rows)
        keys = Unsqueeze (keys_gathered, two)
        values = Unsqueeze (values_gathered, two)
        columns_1d = Shape <start: int = 2, end: int = 3> (column_bias)
"""


def _suffix_means(g: AttentionGeometry) -> str:
    """``key_table``, ``value_table``: all tokens, then for every block the means of its keys but the r most important
    ones, r = 0 ... 63; ``[rows, head_dim]``. And ``visible_counts [batch, kv_heads, N]``.
    """
    return f"""
    block_size = Constant <value_ints: ints = [{SUMMARY_BLOCK}]> ()
    ranked_scores, ranking = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (token_scores, block_size)
    suffix_starts = Range (n0, block, n1)
    ranking_shape = Shape (ranking)
    ranks_in_order = Expand (suffix_starts, ranking_shape)
    ranks = ScatterElements <axis: int = -1> (ranks_in_order, ranking, ranks_in_order)
    suffix_column = Unsqueeze (suffix_starts, one)
    rank_row_axes = Constant <value_ints: ints = [3]> ()
    rank_rows = Unsqueeze (ranks, rank_row_axes)
    in_suffix = GreaterOrEqual (rank_rows, suffix_column)
    mask_row_axes = Constant <value_ints: ints = [1, 3]> ()
    mask_rows = Unsqueeze (mask_blocks, mask_row_axes)
    suffix_member = And (in_suffix, mask_rows)
    suffix_float = Cast <to: int = 1> (suffix_member)
    suffix_counts = ReduceSum <keepdims: int = 1> (suffix_float, last_axis)
    suffix_counts_or_one = Max (suffix_counts, one_float)
    suffix_key_sums = MatMul (suffix_float, key_blocks)
    suffix_value_sums = MatMul (suffix_float, value_blocks)
    suffix_key_means = Div (suffix_key_sums, suffix_counts_or_one)
    suffix_value_means = Div (suffix_value_sums, suffix_counts_or_one)
    token_shape = Constant <value_ints: ints = [-1, {g.head_dim}]> ()
    key_tokens = Reshape (key_blocks, token_shape)
    value_tokens = Reshape (value_blocks, token_shape)
    key_mean_rows = Reshape (suffix_key_means, token_shape)
    value_mean_rows = Reshape (suffix_value_means, token_shape)
    key_table = Concat <axis: int = 0> (key_tokens, key_mean_rows)
    value_table = Concat <axis: int = 0> (value_tokens, value_mean_rows)
    block_counts = ReduceSum <keepdims: int = 0> (mask_float_blocks, last_axis)
    block_counts_by_head = Unsqueeze (block_counts, one)
    head_count_shape = Constant <value_ints: ints = [1, {g.kv_heads}, 1]> ()
    visible_counts = Expand (block_counts_by_head, head_count_shape)
    """
