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

from effc.plugins.bodies.absolute_blocks import absolute_blocks, attended_chunk, packed_output
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.dynamic_causal import causal_chunks
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
    {causal_chunks(form, geometry) if geometry.causal else _bidirectional(form, geometry, per_chunk)}
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
    {_important_and_means(g)}
    {_far_states(g, per_chunk)}
    {_FAR_BIAS}
    {_near_bias(form, g)}
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


def _important_and_means(g: AttentionGeometry) -> str:
    """``top_keys`` and ``top_visible``, and the means and counts of every block's other keys."""
    return f"""
    per_head_shape = Constant <value_ints: ints = [0, {g.kv_heads}, -1]> ()
    scores_by_head = Reshape (token_scores, per_head_shape)
    top_scores, top_keys = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (scores_by_head, kept)
    top_visible = Greater (top_scores, hidden_bias)
    top_visible_float = Cast <to: int = 1> (top_visible)
    no_marks = Mul (scores_by_head, zero_float)
    marks = ScatterElements <axis: int = -1> (no_marks, top_keys, top_visible_float)
    blocked_shape = Constant <value_ints: ints = [0, {g.kv_heads}, -1, {SUMMARY_BLOCK}]> ()
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
    """


def _far_states(g: AttentionGeometry, per_chunk: int) -> str:
    """``far_keys`` and ``far_values``: important keys, then means, the same for every block."""
    return f"""
    head_row_shape = Constant <value_ints: ints = [-1, {g.kv_heads}, 1]> ()
    head_starts_flat = Mul (batch_head_numbers, keys_padded_length)
    head_starts = Reshape (head_starts_flat, head_row_shape)
    top_rows = Add (top_keys, head_starts)
    token_shape = Constant <value_ints: ints = [-1, {g.head_dim}]> ()
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
    """


# Hides what is near: that is seen key by key.
_FAR_BIAS = """
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
"""


def _near_bias(form: Dynamic, g: AttentionGeometry) -> str:
    """``near_clipped``, the near blocks of every block of queries, and ``near_bias``."""
    near = 2 * form.reach + 1
    return f"""
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
    per_kv_shape = Constant <value_ints: ints = [1, {g.kv_heads}, 1, 1]> ()
    near_bias = Expand (near_bias_one, per_kv_shape)
    """
