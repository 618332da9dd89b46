"""The ONNX function body of ``effc::TopKAttention``.

A ``Scan`` walks over blocks of queries, so that the scores of one block only are alive. The chosen weights are put back
into rows of zeros: one product with all values is faster than gathering a few values for every query.
"""

from __future__ import annotations

import numpy as np

from effc.plugins.bodies.dispatch import body_text
from effc.plugins.forms.content import TopK
from effc.plugins.operator import AttentionGeometry

# Queries at once, where there are so many: enough rows for the matrix kernels.
_ROWS = 64


@body_text.register
def _(form: TopK, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    heads, kv, dim = geometry.num_heads, geometry.kv_heads, geometry.head_dim
    groups, scale = heads // kv, np.format_float_positional(np.float32(geometry.scale), trim="0")
    return f"""
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    n0 = Constant <value: tensor = int64 {{0}}> ()
    n1 = Constant <value: tensor = int64 {{1}}> ()
    no_weight = Constant <value: tensor = float {{0.0}}> ()
    lowest = Constant <value: tensor = float {{-1e30}}> ()
    scale_value = Constant <value: tensor = float {{{scale}}}> ()
    query_length_1d = Shape <start: int = 1, end: int = 2> (query)
    query_length = Squeeze (query_length_1d, zero)
    key_length_1d = Shape <start: int = 1, end: int = 2> (key)
    key_length = Squeeze (key_length_1d, zero)
    wanted = Constant <value_ints: ints = [{form.count}]> ()
    kept_count = Min (wanted, key_length_1d)

    kv_shape = Constant <value_ints: ints = [0, -1, {kv}, {dim}]> ()
    key_split = Reshape (key, kv_shape)
    value_split = Reshape (value, kv_shape)
    keys_transposed = Transpose <perm: ints = [0, 2, 3, 1]> (key_split)
    value_heads = Transpose <perm: ints = [0, 2, 1, 3]> (value_split)
    mask_axes = Constant <value_ints: ints = [1, 2, 3]> ()
    mask_row = Unsqueeze (key_mask, mask_axes)
    key_positions = Range (n0, key_length, n1)

    most_rows = Constant <value: tensor = int64 {{{_ROWS}}}> ()
    rows = Min (most_rows, query_length)
    rows_1d = Unsqueeze (rows, zero)
    rows_less_one = Sub (rows, n1)
    rounded = Add (query_length, rows_less_one)
    blocks = Div (rounded, rows)
    padded_length = Mul (blocks, rows)
    tail = Sub (padded_length, query_length)
    tail_1d = Unsqueeze (tail, zero)
    pads = Concat <axis: int = 0> (zero, zero, zero, zero, tail_1d, zero)
    query_padded = Pad (query, pads)
    heads_shape = Constant <value_ints: ints = [{kv}, {groups}, {dim}]> ()
    query_shape = Concat <axis: int = 0> (zero, last_axis, rows_1d, heads_shape)
    query_split = Reshape (query_padded, query_shape)
    query_by_block = Transpose <perm: ints = [1, 0, 3, 4, 2, 5]> (query_split)
    offset = Sub (key_length, query_length)
    query_index = Range (n0, padded_length, n1)
    query_position = Add (query_index, offset)
    position_shape = Concat <axis: int = 0> (last_axis, rows_1d, one)
    group_shape = Constant <value_ints: ints = [0, {kv}, {groups}]> ()
    scores_shape = Concat <axis: int = 0> (group_shape, rows_1d, last_axis)
    folded_shape = Constant <value_ints: ints = [0, {kv}, -1]> ()
    dim_1d = Constant <value_ints: ints = [{dim}]> ()
    query_folded_shape = Concat <axis: int = 0> (folded_shape, dim_1d)
    weights_shape = Concat <axis: int = 0> (folded_shape, key_length_1d)
    attended_shape = Concat <axis: int = 0> (group_shape, rows_1d, dim_1d)
    position_by_block = Reshape (query_position, position_shape)

    output_by_block = Scan <num_scan_inputs: int = 2, body: graph = block_body (
        block_query, block_position
    ) => (block_output) {{
        query_folded = Reshape (block_query, query_folded_shape)
        query_scaled = Mul (query_folded, scale_value)
        scores_folded = MatMul (query_scaled, keys_transposed)
        scores = Reshape (scores_folded, scores_shape)
        {_CAUSAL if geometry.causal else "seen = Identity (mask_row)"}
        visible_scores = Where (seen, scores, lowest)
        kept_scores, kept_keys = TopK <axis: int = -1, largest: int = 1, sorted: int = 0> (visible_scores, kept_count)
        kept_weights = Softmax <axis: int = -1> (kept_scores)
        strongest = ReduceMax <keepdims: int = 1> (kept_scores, last_axis)
        sees_any = Greater (strongest, lowest)
        seen_weights = Where (sees_any, kept_weights, no_weight)
        no_weights = Mul (scores, no_weight)
        weights = ScatterElements <axis: int = -1> (no_weights, kept_keys, seen_weights)
        weights_folded = Reshape (weights, weights_shape)
        attended_folded = MatMul (weights_folded, value_heads)
        attended = Reshape (attended_folded, attended_shape)
        by_token = Transpose <perm: ints = [0, 3, 1, 2, 4]> (attended)
        packed_shape = Constant <value_ints: ints = [0, -1, {heads * dim}]> ()
        block_output = Reshape (by_token, packed_shape)
    }}> (query_by_block, position_by_block)
    batch_first = Transpose <perm: ints = [1, 0, 2, 3]> (output_by_block)
    joined_shape = Constant <value_ints: ints = [0, -1, {heads * dim}]> ()
    joined = Reshape (batch_first, joined_shape)
    output = Slice (joined, zero, query_length_1d, one)
    """


_CAUSAL = """not_behind = LessOrEqual (key_positions, block_position)
        seen = And (mask_row, not_behind)"""
