"""The ONNX function body of ``effc::SparseAttention``.

Blocked form (as in Longformer's and BigBird's block-sparse attention): queries are cut into blocks, each block
gathers the ``left + block + right`` keys it may see, and a ``Scan`` walks over chunks of blocks so that scores stay in
cache and memory grows with the length, not with its square. Sequences that fit into one span take a plain branch.
"""

from __future__ import annotations

import numpy as np

from effc.errors import PreconditionError
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import Pattern

# Scores of one chunk, in bytes, that stay in a core's second-level cache. Measured best at 1 to 2 MiB.
_CHUNK_BYTES = 2 << 20


@body_text.register
def _(form: Pattern, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    if form.is_dense:
        return _dense(geometry)
    interval = form.interval(geometry.causal)
    if interval is None:
        raise PreconditionError(f"The pattern '{form}' has no function body yet.", "Use local:WINDOW.")
    return _blocked(geometry, *interval)


def block_size(reach: int) -> int:
    """Queries per block: a quarter of the span wastes little work and still feeds the matrix kernels."""
    return 64 if reach <= 512 else 128


def _blocked(g: AttentionGeometry, left: int, right: int) -> str:
    block = block_size(left + right)
    span = left + block + right
    blocks = int(max(1, _CHUNK_BYTES // (4 * g.num_heads * block * span)))
    chunk, heads, kv, dim = block * blocks, g.num_heads, g.kv_heads, g.head_dim
    groups = heads // kv
    return f"""
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    n0 = Constant <value: tensor = int64 {{0}}> ()
    n1 = Constant <value: tensor = int64 {{1}}> ()
    scale_value = Constant <value: tensor = float {{{_float(g.scale)}}}> ()
    visible_bias = Constant <value: tensor = float {{0.0}}> ()
    hidden_bias = Constant <value: tensor = float {{-1e30}}> ()
    minus_left = Constant <value: tensor = int64 {{{-left}}}> ()
    right_reach = Constant <value: tensor = int64 {{{right}}}> ()
    query_length_1d = Shape <start: int = 1, end: int = 2> (query)
    query_length = Squeeze (query_length_1d, zero)
    key_length_1d = Shape <start: int = 1, end: int = 2> (key)
    key_length = Squeeze (key_length_1d, zero)
    offset = Sub (key_length, query_length)
    kv_shape = Constant <value_ints: ints = [0, -1, {kv}, {dim}]> ()
    key_split = Reshape (key, kv_shape)
    value_split = Reshape (value, kv_shape)
    key_heads = Transpose <perm: ints = [0, 2, 1, 3]> (key_split)
    value_heads = Transpose <perm: ints = [0, 2, 1, 3]> (value_split)

    block = Constant <value: tensor = int64 {{{block}}}> ()
    chunk = Constant <value: tensor = int64 {{{chunk}}}> ()
    chunk_less_one = Constant <value: tensor = int64 {{{chunk - 1}}}> ()
    rounded = Add (query_length, chunk_less_one)
    chunks = Div (rounded, chunk)
    padded_length = Mul (chunks, chunk)
    span = Constant <value: tensor = int64 {{{span}}}> ()
    span_offsets = Range (n0, span, n1)
    left_reach = Constant <value: tensor = int64 {{{left}}}> ()
    key_offsets = Sub (span_offsets, left_reach)
    block_starts = Range (n0, padded_length, block)
    block_positions = Add (block_starts, offset)
    block_columns = Unsqueeze (block_positions, one)
    key_positions = Add (block_columns, key_offsets)
    last_key = Sub (key_length, n1)
    not_before = GreaterOrEqual (key_positions, n0)
    not_after = LessOrEqual (key_positions, last_key)
    inside = And (not_before, not_after)
    clipped_low = Max (key_positions, n0)
    key_rows = Min (clipped_low, last_key)
    row_mask = Gather <axis: int = 1> (key_mask, key_rows)
    row_visible = And (row_mask, inside)
    rows_shape = Constant <value_ints: ints = [-1, {blocks}, {span}]> ()
    rows_by_chunk = Reshape (key_rows, rows_shape)
    query_offsets = Range (n0, block, n1)
    query_columns = Unsqueeze (query_offsets, one)
    distance = Sub (key_offsets, query_columns)
    not_left = GreaterOrEqual (distance, minus_left)
    not_right = LessOrEqual (distance, right_reach)
    band = And (not_left, not_right)
    visible_shape = Constant <value_ints: ints = [0, -1, {blocks}, 1, {span}]> ()
    row_visible_split = Reshape (row_visible, visible_shape)
    visible_pairs = And (row_visible_split, band)
    visible_by_chunk = Transpose <perm: ints = [1, 0, 2, 3, 4]> (visible_pairs)
    group_axes = Constant <value_ints: ints = [2, 4]> ()
    visible_grouped = Unsqueeze (visible_by_chunk, group_axes)
    bias_by_chunk = Where (visible_grouped, visible_bias, hidden_bias)
    visible_float = Cast <to: int = 1> (visible_grouped)
    row_sees_any = ReduceMax <keepdims: int = 1> (visible_float, last_axis)

    fits_one_span = LessOrEqual (key_length, span)
    output = If (fits_one_span) <then_branch: graph = whole () => (whole_output) {{
        whole_query_shape = Constant <value_ints: ints = [0, -1, {kv}, {groups}, {dim}]> ()
        whole_query_split = Reshape (query, whole_query_shape)
        whole_query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (whole_query_split)
        whole_key_grouped = Unsqueeze (key_heads, two)
        whole_value_grouped = Unsqueeze (value_heads, two)
        whole_query_scaled = Mul (whole_query_heads, scale_value)
        whole_key_transposed = Transpose <perm: ints = [0, 1, 2, 4, 3]> (whole_key_grouped)
        whole_scores = MatMul (whole_query_scaled, whole_key_transposed)
        whole_query_positions = Range (n0, query_length, n1)
        whole_query_shifted = Add (whole_query_positions, offset)
        whole_query_column = Unsqueeze (whole_query_shifted, one)
        whole_key_positions = Range (n0, key_length, n1)
        whole_distance = Sub (whole_key_positions, whole_query_column)
        whole_not_left = GreaterOrEqual (whole_distance, minus_left)
        whole_not_right = LessOrEqual (whole_distance, right_reach)
        whole_band = And (whole_not_left, whole_not_right)
        whole_mask_axes = Constant <value_ints: ints = [1, 2, 3]> ()
        whole_mask = Unsqueeze (key_mask, whole_mask_axes)
        whole_visible = And (whole_mask, whole_band)
        whole_bias = Where (whole_visible, visible_bias, hidden_bias)
        whole_biased = Add (whole_scores, whole_bias)
        whole_weights = Softmax <axis: int = -1> (whole_biased)
        whole_attended = MatMul (whole_weights, whole_value_grouped)
        whole_visible_float = Cast <to: int = 1> (whole_visible)
        whole_sees_any = ReduceMax <keepdims: int = 1> (whole_visible_float, last_axis)
        whole_zeroed = Mul (whole_attended, whole_sees_any)
        whole_by_token = Transpose <perm: ints = [0, 3, 1, 2, 4]> (whole_zeroed)
        whole_packed_shape = Constant <value_ints: ints = [0, -1, {heads * dim}]> ()
        whole_output = Reshape (whole_by_token, whole_packed_shape)
    }}, else_branch: graph = blocked () => (blocked_output) {{
        tail = Sub (padded_length, query_length)
        tail_1d = Unsqueeze (tail, zero)
        pads = Concat <axis: int = 0> (zero, zero, zero, zero, tail_1d, zero)
        query_padded = Pad (query, pads)
        query_shape = Constant <value_ints: ints = [0, -1, {blocks}, {block}, {kv}, {groups}, {dim}]> ()
        query_split = Reshape (query_padded, query_shape)
        query_by_chunk = Transpose <perm: ints = [1, 0, 4, 2, 5, 3, 6]> (query_split)
        output_by_chunk = Scan <num_scan_inputs: int = 4, body: graph = chunk_body (
            chunk_query, chunk_rows, chunk_bias, chunk_sees_any
        ) => (chunk_output) {{
            keys = Gather <axis: int = 2> (key_heads, chunk_rows)
            values = Gather <axis: int = 2> (value_heads, chunk_rows)
            rows_folded = Constant <value_ints: ints = [0, {kv}, {blocks}, {groups * block}, {dim}]> ()
            query_folded = Reshape (chunk_query, rows_folded)
            query_scaled = Mul (query_folded, scale_value)
            keys_transposed = Transpose <perm: ints = [0, 1, 2, 4, 3]> (keys)
            scores_folded = MatMul (query_scaled, keys_transposed)
            scores_shape = Constant <value_ints: ints = [0, {kv}, {blocks}, {groups}, {block}, {span}]> ()
            scores = Reshape (scores_folded, scores_shape)
            biased = Add (scores, chunk_bias)
            weights = Softmax <axis: int = -1> (biased)
            weights_folded_shape = Constant <value_ints: ints = [0, {kv}, {blocks}, {groups * block}, {span}]> ()
            weights_folded = Reshape (weights, weights_folded_shape)
            attended_folded = MatMul (weights_folded, values)
            attended_shape = Constant <value_ints: ints = [0, {kv}, {blocks}, {groups}, {block}, {dim}]> ()
            attended = Reshape (attended_folded, attended_shape)
            zeroed = Mul (attended, chunk_sees_any)
            by_token = Transpose <perm: ints = [0, 2, 4, 1, 3, 5]> (zeroed)
            packed_shape = Constant <value_ints: ints = [0, {chunk}, {heads * dim}]> ()
            chunk_output = Reshape (by_token, packed_shape)
        }}> (query_by_chunk, rows_by_chunk, bias_by_chunk, row_sees_any)
        batch_first = Transpose <perm: ints = [1, 0, 2, 3]> (output_by_chunk)
        joined_shape = Constant <value_ints: ints = [0, -1, {heads * dim}]> ()
        joined = Reshape (batch_first, joined_shape)
        blocked_output = Slice (joined, zero, query_length_1d, one)
    }}>
    """


def _dense(g: AttentionGeometry) -> str:
    """Dense attention at ONNX Runtime's best: its fused kernels have no mask, so padding takes a branch of its own."""
    return f"""
    zero = Constant <value_ints: ints = [0]> ()
    lowest_bias = Constant <value: tensor = float {{-1e30}}> ()
    no_bias = Constant <value: tensor = float {{0.0}}> ()
    mask_int = Cast <to: int = 6> (key_mask)
    mask_minimum = ReduceMin <keepdims: int = 0> (mask_int)
    no_padding = Cast <to: int = 9> (mask_minimum)
    output = If (no_padding) <then_branch: graph = unpadded () => (unpadded_output) {{
        {_fused_causal(g) if g.causal else _fused_bidirectional(g)}
    }}, else_branch: graph = padded () => (padded_output) {{
        mask_axes = Constant <value_ints: ints = [1, 2]> ()
        mask_rows = Unsqueeze (key_mask, mask_axes)
        {_causal_mask() if g.causal else _BIDIRECTIONAL_MASK}
        bias = Where (visible, no_bias, lowest_bias)
        attended = Attention <
            q_num_heads: int = {g.num_heads}, kv_num_heads: int = {g.kv_heads}, scale: float = {_float(g.scale)}
        > (query, key, value, bias)
        visible_float = Cast <to: int = 1> (visible)
        last_axis = Constant <value_ints: ints = [-1]> ()
        sees_any = ReduceMax <keepdims: int = 0> (visible_float, last_axis)
        row_axes = Constant <value_ints: ints = [0, -1, 1]> ()
        sees_any_rows = Reshape (sees_any, row_axes)
        padded_output = Mul (attended, sees_any_rows)
    }}>
    """


_BIDIRECTIONAL_MASK = """
        query_length_1d = Shape <start: int = 1, end: int = 2> (query)
        one = Constant <value_ints: ints = [1]> ()
        rows_shape = Concat <axis: int = 0> (one, one, query_length_1d, one)
        visible = Expand (mask_rows, rows_shape)
"""


def _causal_mask() -> str:
    return """
        n0 = Constant <value: tensor = int64 {0}> ()
        n1 = Constant <value: tensor = int64 {1}> ()
        query_length_1d = Shape <start: int = 1, end: int = 2> (query)
        query_length = Squeeze (query_length_1d, zero)
        key_length_1d = Shape <start: int = 1, end: int = 2> (key)
        key_length = Squeeze (key_length_1d, zero)
        offset = Sub (key_length, query_length)
        query_index = Range (n0, query_length, n1)
        query_position = Add (query_index, offset)
        column = Constant <value_ints: ints = [1]> ()
        query_column = Unsqueeze (query_position, column)
        key_position = Range (n0, key_length, n1)
        not_behind = LessOrEqual (key_position, query_column)
        visible = And (mask_rows, not_behind)
    """


def _fused_bidirectional(g: AttentionGeometry) -> str:
    if g.kv_heads != g.num_heads:
        return (
            f"unpadded_output = Attention <q_num_heads: int = {g.num_heads}, kv_num_heads: int = {g.kv_heads}, "
            f"scale: float = {_float(g.scale)}> (query, key, value)"
        )
    return (
        f"unpadded_output = com.microsoft.MultiHeadAttention <num_heads: int = {g.num_heads}, "
        f"scale: float = {_float(g.scale)}> (query, key, value)"
    )


def _fused_causal(g: AttentionGeometry) -> str:
    return f"""
        key_count_1d = Shape <start: int = 1, end: int = 2> (key)
        key_count_int = Cast <to: int = 6> (key_count_1d)
        key_count = Squeeze (key_count_int, zero)
        one_int = Constant <value: tensor = int32 {{1}}> ()
        last_index = Sub (key_count, one_int)
        batch_1d = Shape <start: int = 0, end: int = 1> (key)
        last_indices = Expand (last_index, batch_1d)
        unpadded_output, present_key, present_value = com.microsoft.GroupQueryAttention <
            num_heads: int = {g.num_heads}, kv_num_heads: int = {g.kv_heads}, scale: float = {_float(g.scale)}
        > (query, key, value, , , last_indices, key_count)
    """


def _float(value: float) -> str:
    return np.format_float_positional(np.float32(value), trim="0")
