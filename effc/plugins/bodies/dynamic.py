"""The ONNX function body of ``effc::DynamicAttention``.

A ``Scan`` walks over blocks of queries. Each attends to one list of columns: the keys of its near blocks, the important
keys, and the block means, in one softmax; what is hidden and the logarithms of the counts come as a bias.

Bidirectional, important keys and means are the same for every block. Causal, the important keys are a running top-k
that the ``Scan`` carries along: each step adds the block that ceases to be near. Which keys of a block are important is
then always a prefix of that block's keys in order of importance, so that the means of all suffixes, computed once,
hold every mean that can be asked for. Memory is linear in the length but for biases of the means, ``length ** 2 /
4096`` numbers a head, of bidirectional attention.
"""

from __future__ import annotations

from effc.plugins.bodies.absolute_blocks import CAUSAL_COLUMNS, absolute_blocks, attended_chunk, packed_output
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.forms.content import SUMMARY_BLOCK, Dynamic
from effc.plugins.operator import AttentionGeometry

# Scores of one chunk, in bytes, that stay in a core's second-level cache.
_CHUNK_BYTES = 2 << 20
# Means that a chunk is sized for; longer sequences have more and still compute the same.
_USUAL_MEANS = 128


@body_text.register
def _(form: Dynamic, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    near = (form.reach * (1 if geometry.causal else 2) + 1) * SUMMARY_BLOCK
    columns = near + form.tokens + _USUAL_MEANS
    # A causal step handles one block, because the important keys change from block to block.
    fitting = _CHUNK_BYTES // (4 * geometry.num_heads * SUMMARY_BLOCK * columns)
    per_chunk = 1 if geometry.causal else max(1, fitting)
    return f"""
    {absolute_blocks(geometry, SUMMARY_BLOCK, per_chunk)}
    {_importance(geometry, "scorer" in given)}
    wanted = Constant <value_ints: ints = [{form.tokens}]> ()
    keys_padded_length_1d = Unsqueeze (keys_padded_length, zero)
    kept = Min (wanted, keys_padded_length_1d)
    key_block_numbers = Range (n0, key_block_count, n1)
    reach = Constant <value: tensor = int64 {{{form.reach}}}> ()
    batch = Squeeze (batch_1d, zero)
    kv_heads = Constant <value: tensor = int64 {{{geometry.kv_heads}}}> ()
    kv_1d = Constant <value_ints: ints = [{geometry.kv_heads}]> ()
    batch_heads = Mul (batch, kv_heads)
    batch_head_numbers = Range (n0, batch_heads, n1)
    {_causal(form, geometry) if geometry.causal else _bidirectional(form, geometry, per_chunk)}
    {packed_output(geometry)}
    """


def _importance(g: AttentionGeometry, scored: bool) -> str:
    """``token_scores [batch, kv_heads, N, 64]``, the lowest value where there is no unpadded key."""
    if scored:
        weighted = f"""
    norm_start = Constant <value_ints: ints = [{g.head_dim}]> ()
    norm_end = Constant <value_ints: ints = [{g.head_dim + 1}]> ()
    scorer_axis = Constant <value_ints: ints = [1]> ()
    direction = Slice (scorer, zero, norm_start, scorer_axis)
    norm_weight = Slice (scorer, norm_start, norm_end, scorer_axis)
    direction_axes = Constant <value_ints: ints = [1, 3]> ()
    direction_column = Unsqueeze (direction, direction_axes)
    projected_column = MatMul (key_blocks, direction_column)
    projected = Squeeze (projected_column, last_axis)
    norm_weight_axes = Constant <value_ints: ints = [1]> ()
    norm_weight_row = Unsqueeze (norm_weight, norm_weight_axes)
    weighted_norms = Mul (norms, norm_weight_row)
    importance = Add (projected, weighted_norms)"""
    else:
        weighted = "importance = Neg (norms)"
    return f"""
    norms = ReduceSumSquare <keepdims: int = 0> (key_blocks, last_axis)
    {weighted}
    mask_by_head = Unsqueeze (mask_blocks, one)
    token_scores = Where (mask_by_head, importance, hidden_bias)
    """


def _bidirectional(form: Dynamic, g: AttentionGeometry, per_chunk: int) -> str:
    kv, dim = g.kv_heads, g.head_dim
    near = 2 * form.reach + 1
    return f"""
    per_head_shape = Constant <value_ints: ints = [0, {kv}, -1]> ()
    scores_by_head = Reshape (token_scores, per_head_shape)
    top_scores, top_keys = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (scores_by_head, kept)
    top_visible = Greater (top_scores, hidden_bias)
    top_visible_float = Cast <to: int = 1> (top_visible)
    no_marks = Mul (scores_by_head, zero_float)
    marks = ScatterElements <axis: int = -1> (no_marks, top_keys, top_visible_float)
    blocked_shape = Constant <value_ints: ints = [0, {kv}, -1, {SUMMARY_BLOCK}]> ()
    marks_blocked = Reshape (marks, blocked_shape)
    unmarked = Sub (one_float, marks_blocked)
    mask_float_by_head = Unsqueeze (mask_float_blocks, one)
    others = Mul (unmarked, mask_float_by_head)
    other_counts = ReduceSum <keepdims: int = 1> (others, last_axis)
    counts_or_one = Max (other_counts, one_float)
    mean_weights = Div (others, counts_or_one)
    mean_row_axes = Constant <value_ints: ints = [3]> ()
    mean_rows = Unsqueeze (mean_weights, mean_row_axes)
    key_means_row = MatMul (mean_rows, key_blocks)
    value_means_row = MatMul (mean_rows, value_blocks)
    key_means = Squeeze (key_means_row, mean_row_axes)
    value_means = Squeeze (value_means_row, mean_row_axes)

    head_row_shape = Constant <value_ints: ints = [-1, {kv}, 1]> ()
    head_starts_flat = Mul (batch_head_numbers, keys_padded_length)
    head_starts = Reshape (head_starts_flat, head_row_shape)
    top_rows = Add (top_keys, head_starts)
    token_shape = Constant <value_ints: ints = [-1, {dim}]> ()
    key_tokens = Reshape (key_blocks, token_shape)
    value_tokens = Reshape (value_blocks, token_shape)
    top_key_states = Gather <axis: int = 0> (key_tokens, top_rows)
    top_value_states = Gather <axis: int = 0> (value_tokens, top_rows)
    far_keys_by_head = Concat <axis: int = 2> (top_key_states, key_means)
    far_values_by_head = Concat <axis: int = 2> (top_value_states, value_means)
    far_keys_one = Unsqueeze (far_keys_by_head, two)
    far_values_one = Unsqueeze (far_values_by_head, two)
    far_shape = Constant <value_ints: ints = [1, 1, {per_chunk}, 1, 1]> ()
    far_keys = Expand (far_keys_one, far_shape)
    far_values = Expand (far_values_one, far_shape)

    has_others = Greater (other_counts, zero_float)
    log_counts = Log (counts_or_one)
    mean_bias_column = Where (has_others, log_counts, hidden_bias)
    mean_bias = Squeeze (mean_bias_column, last_axis)
    top_bias = Where (top_visible, zero_float, hidden_bias)
    far_bias_by_head = Concat <axis: int = 2> (top_bias, mean_bias)
    far_bias_row = Unsqueeze (far_bias_by_head, two)
    top_blocks = Div (top_keys, block)
    mean_blocks_shape = Shape (mean_bias)
    mean_blocks = Expand (key_block_numbers, mean_blocks_shape)
    far_blocks_by_head = Concat <axis: int = 2> (top_blocks, mean_blocks)
    far_blocks = Unsqueeze (far_blocks_by_head, two)
    own_column = Unsqueeze (query_block_numbers, one)
    far_distance = Sub (far_blocks, own_column)
    far_distance_size = Abs (far_distance)
    is_far = Greater (far_distance_size, reach)
    far_bias = Where (is_far, far_bias_row, hidden_bias)

    near_end = Constant <value: tensor = int64 {{{form.reach + 1}}}> ()
    near_start = Constant <value: tensor = int64 {{{-form.reach}}}> ()
    near_offsets = Range (near_start, near_end, n1)
    near_numbers = Add (own_column, near_offsets)
    last_block = Sub (key_block_count, n1)
    not_before = GreaterOrEqual (near_numbers, n0)
    not_after = LessOrEqual (near_numbers, last_block)
    near_exists = And (not_before, not_after)
    near_low = Max (near_numbers, n0)
    near_clipped = Min (near_low, last_block)
    near_mask = Gather <axis: int = 1> (mask_blocks, near_clipped)
    near_exists_column = Unsqueeze (near_exists, last_axis)
    near_seen = And (near_mask, near_exists_column)
    near_bias_blocks = Where (near_seen, zero_float, hidden_bias)
    near_bias_shape = Constant <value_ints: ints = [0, 1, -1, {near * SUMMARY_BLOCK}]> ()
    near_bias_one = Reshape (near_bias_blocks, near_bias_shape)
    per_kv_shape = Constant <value_ints: ints = [1, {kv}, 1, 1]> ()
    near_bias = Expand (near_bias_one, per_kv_shape)
    column_bias = Concat <axis: int = 3> (near_bias, far_bias)
    columns_1d = Shape <start: int = 3, end: int = 4> (column_bias)
    per_chunk_1d = Constant <value_ints: ints = [{per_chunk}]> ()
    bias_shape = Concat <axis: int = 0> (batch_1d, kv_1d, last_axis, per_chunk_1d, one, one, columns_1d)
    bias_split = Reshape (column_bias, bias_shape)
    bias_by_chunk = Transpose <perm: ints = [2, 0, 1, 3, 4, 5, 6]> (bias_split)
    near_shape = Constant <value_ints: ints = [-1, {per_chunk * near}]> ()
    near_by_chunk = Reshape (near_clipped, near_shape)

    output_by_chunk = Scan <num_scan_inputs: int = 4, body: graph = chunk_body (
        chunk_query, chunk_near, chunk_bias, chunk_sees_any
    ) => (chunk_output) {{
        near_keys_blocks = Gather <axis: int = 2> (key_blocks, chunk_near)
        near_values_blocks = Gather <axis: int = 2> (value_blocks, chunk_near)
        near_states_shape = Constant <value_ints: ints = [0, {kv}, {per_chunk}, {near * SUMMARY_BLOCK}, {dim}]> ()
        near_keys = Reshape (near_keys_blocks, near_states_shape)
        near_values = Reshape (near_values_blocks, near_states_shape)
        keys = Concat <axis: int = 3> (near_keys, far_keys)
        values = Concat <axis: int = 3> (near_values, far_values)
        {attended_chunk(g, SUMMARY_BLOCK, per_chunk, "biased = Add (scores, chunk_bias)")}
    }}> (query_by_chunk, near_by_chunk, bias_by_chunk, sees_any)
    """


def _causal(form: Dynamic, g: AttentionGeometry) -> str:
    """Columns are the near blocks, the own one first, then as many important keys and means as there can be by then."""
    kv = g.kv_heads
    near = form.reach + 1
    return f"""
    {_suffix_means(g)}
    {CAUSAL_COLUMNS}
    token_count = Mul (batch_heads, keys_padded_length)
    head_shape = Constant <value_ints: ints = [-1, {kv}, 1]> ()
    head_starts_flat = Mul (batch_head_numbers, keys_padded_length)
    head_starts = Reshape (head_starts_flat, head_shape)
    mean_block_starts = Mul (key_block_numbers, block)
    mean_head_starts = Add (head_starts, token_count)
    mean_starts = Add (mean_head_starts, mean_block_starts)
    block_positions = Range (n0, block, n1)

    leaving_reach = Constant <value: tensor = int64 {{{form.reach + 1}}}> ()
    first_leaving = Sub (first_block, leaving_reach)
    before_first = Less (key_block_numbers, first_leaving)
    before_first_column = Unsqueeze (before_first, one)
    earlier_scores = Where (before_first_column, token_scores, hidden_bias)
    per_head_shape = Constant <value_ints: ints = [0, {kv}, -1]> ()
    earlier_by_head = Reshape (earlier_scores, per_head_shape)
    start_scores, start_keys = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (earlier_by_head, kept)

    last_scores, last_keys, output_by_chunk = Scan <num_scan_inputs: int = 3, body: graph = block_body (
        held_scores, held_keys, chunk_query, own_number, chunk_sees_any
    ) => (top_scores, top_keys, chunk_output) {{
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
        per_kv_shape = Constant <value_ints: ints = [1, {kv}, 1]> ()
        near_bias = Expand (near_bias_one, per_kv_shape)
        near_starts = Mul (near_clipped, block)
        near_starts_column = Unsqueeze (near_starts, one)
        near_positions = Add (near_starts_column, block_positions)
        flat = Constant <value_ints: ints = [-1]> ()
        near_positions_flat = Reshape (near_positions, flat)
        near_rows = Add (head_starts, near_positions_flat)

        column_rows = Concat <axis: int = 2> (near_rows, far_top_rows, far_mean_rows)
        column_bias = Concat <axis: int = 2> (near_bias, far_top_bias, far_mean_bias)
        bias_axes = Constant <value_ints: ints = [2, 3, 4]> ()
        chunk_bias = Unsqueeze (column_bias, bias_axes)
        keys_gathered = Gather <axis: int = 0> (key_table, column_rows)
        values_gathered = Gather <axis: int = 0> (value_table, column_rows)
        keys = Unsqueeze (keys_gathered, two)
        values = Unsqueeze (values_gathered, two)
        columns_1d = Shape <start: int = 2, end: int = 3> (column_bias)
        {attended_chunk(g, SUMMARY_BLOCK, 1, _CAUSAL_BIAS)}
    }}> (start_scores, start_keys, query_by_chunk, query_block_numbers, sees_any)
    """


_CAUSAL_BIAS = """key_biased = Add (scores, chunk_bias)
        other_columns = Sub (columns_1d, block)
        causal_pads = Concat <axis: int = 0> (zero, zero, zero, other_columns)
        causal_bias = Pad (behind_bias, causal_pads)
        biased = Add (key_biased, causal_bias)"""


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
