"""Queries, keys and values cut into blocks of absolute positions: the beginning of bodies that work by blocks."""

from __future__ import annotations

import numpy as np

from effc.plugins.operator import AttentionGeometry


def absolute_blocks(g: AttentionGeometry, block: int, per_chunk: int) -> str:
    """Statements that cut the inputs into blocks of ``block`` positions, counted from position 0.

    Queries are the last positions; the first of their blocks is padded in front, the last behind, and ``per_chunk``
    blocks make a chunk for a ``Scan``. The statements define, with P blocks of queries (a multiple of ``per_chunk``)
    and N blocks of keys:

    * ``query_padded [batch, P * block, heads * head_dim]`` and ``query_by_chunk
      [chunks, batch, kv_heads, per_chunk, groups, block, head_dim]``, the latter times the scale;
    * ``key_blocks``, ``value_blocks [batch, kv_heads, N, block, head_dim]``, ``mask_blocks [batch, N, block]`` bool;
    * ``query_block_numbers [P]``: which block of positions each is; behind the last it is a block that does not exist;
    * ``sees_any [chunks, batch, 1, per_chunk, 1, block, 1]``: 1.0 where a query sees any key by causality and
      padding, else 0.0;
    * ``front``, ``query_blocks``, ``key_block_count`` scalars, their ``_1d`` forms, and small constants.
    """
    heads, kv, dim = g.num_heads, g.kv_heads, g.head_dim
    groups, scale = heads // kv, np.format_float_positional(np.float32(g.scale), trim="0")
    return f"""
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    minus_one = Constant <value_ints: ints = [-1]> ()
    n0 = Constant <value: tensor = int64 {{0}}> ()
    n1 = Constant <value: tensor = int64 {{1}}> ()
    zero_float = Constant <value: tensor = float {{0.0}}> ()
    one_float = Constant <value: tensor = float {{1.0}}> ()
    hidden_bias = Constant <value: tensor = float {{-1e30}}> ()
    scale_value = Constant <value: tensor = float {{{scale}}}> ()
    batch_1d = Shape <start: int = 0, end: int = 1> (key)
    query_length_1d = Shape <start: int = 1, end: int = 2> (query)
    query_length = Squeeze (query_length_1d, zero)
    key_length_1d = Shape <start: int = 1, end: int = 2> (key)
    key_length = Squeeze (key_length_1d, zero)
    block = Constant <value: tensor = int64 {{{block}}}> ()
    block_less_one = Constant <value: tensor = int64 {{{block - 1}}}> ()
    chunk = Constant <value: tensor = int64 {{{block * per_chunk}}}> ()
    chunk_less_one = Constant <value: tensor = int64 {{{block * per_chunk - 1}}}> ()
    per_chunk = Constant <value: tensor = int64 {{{per_chunk}}}> ()

    keys_rounded = Add (key_length, block_less_one)
    key_block_count = Div (keys_rounded, block)
    key_block_count_1d = Unsqueeze (key_block_count, zero)
    keys_padded_length = Mul (key_block_count, block)
    key_tail = Sub (keys_padded_length, key_length)
    key_tail_1d = Unsqueeze (key_tail, zero)
    key_pads = Concat <axis: int = 0> (zero, zero, zero, zero, key_tail_1d, zero)
    key_padded = Pad (key, key_pads)
    value_padded = Pad (value, key_pads)
    kv_shape = Constant <value_ints: ints = [0, -1, {block}, {kv}, {dim}]> ()
    key_split = Reshape (key_padded, kv_shape)
    value_split = Reshape (value_padded, kv_shape)
    key_blocks = Transpose <perm: ints = [0, 3, 1, 2, 4]> (key_split)
    value_blocks = Transpose <perm: ints = [0, 3, 1, 2, 4]> (value_split)
    mask_pads = Concat <axis: int = 0> (zero, zero, zero, key_tail_1d)
    mask_int = Cast <to: int = 6> (key_mask)
    mask_int_padded = Pad (mask_int, mask_pads)
    mask_shape = Constant <value_ints: ints = [0, -1, {block}]> ()
    mask_int_blocks = Reshape (mask_int_padded, mask_shape)
    mask_blocks = Cast <to: int = 9> (mask_int_blocks)
    mask_float_blocks = Cast <to: int = 1> (mask_int_blocks)

    offset = Sub (key_length, query_length)
    offset_1d = Unsqueeze (offset, zero)
    first_block = Div (offset, block)
    first_position = Mul (first_block, block)
    front = Sub (offset, first_position)
    front_1d = Unsqueeze (front, zero)
    query_end = Add (front, query_length)
    query_end_1d = Unsqueeze (query_end, zero)
    queries_rounded = Add (query_end, chunk_less_one)
    chunks = Div (queries_rounded, chunk)
    query_blocks = Mul (chunks, per_chunk)
    queries_padded_length = Mul (query_blocks, block)
    query_tail = Sub (queries_padded_length, query_end)
    query_tail_1d = Unsqueeze (query_tail, zero)
    query_pads = Concat <axis: int = 0> (zero, front_1d, zero, zero, query_tail_1d, zero)
    query_padded = Pad (query, query_pads)
    query_shape = Constant <value_ints: ints = [0, -1, {per_chunk}, {block}, {kv}, {groups}, {dim}]> ()
    query_split = Reshape (query_padded, query_shape)
    query_scaled = Mul (query_split, scale_value)
    query_by_chunk = Transpose <perm: ints = [1, 0, 4, 2, 5, 3, 6]> (query_scaled)
    query_blocks_end = Add (first_block, query_blocks)
    query_block_numbers = Range (first_block, query_blocks_end, n1)

    {_SEES_ANY_CAUSAL if g.causal else _SEES_ANY}
    row_pads = Concat <axis: int = 0> (zero, front_1d, zero, query_tail_1d)
    rows_see_any_padded = Pad (rows_see_any, row_pads)
    sees_any_shape = Constant <value_ints: ints = [0, -1, 1, {per_chunk}, 1, {block}, 1]> ()
    sees_any_split = Reshape (rows_see_any_padded, sees_any_shape)
    sees_any = Transpose <perm: ints = [1, 0, 2, 3, 4, 5, 6]> (sees_any_split)
    """


_SEES_ANY_CAUSAL = """
    seen_so_far = CumSum (mask_int, n1)
    seen_by_queries = Slice (seen_so_far, offset_1d, key_length_1d, one)
    seen_any = Cast <to: int = 9> (seen_by_queries)
    rows_see_any = Cast <to: int = 1> (seen_any)
"""

_SEES_ANY = """
    unpadded_any = ReduceMax <keepdims: int = 1> (mask_int, one)
    unpadded_float = Cast <to: int = 1> (unpadded_any)
    rows_shape = Concat <axis: int = 0> (batch_1d, query_length_1d)
    rows_see_any = Expand (unpadded_float, rows_shape)
"""


CAUSAL_COLUMNS = """
    in_block = Range (n0, block, n1)
    in_block_column = Unsqueeze (in_block, one)
    behind = Greater (in_block, in_block_column)
    behind_bias = Where (behind, hidden_bias, zero_float)
"""
"""Statements that define ``behind_bias [block, block]``: hides what lies behind a query in its own block."""


def packed_output(g: AttentionGeometry) -> str:
    """Statements that turn ``output_by_chunk [chunks, batch, rows, heads * head_dim]`` into ``output``."""
    return f"""
    batch_first = Transpose <perm: ints = [1, 0, 2, 3]> (output_by_chunk)
    joined_shape = Constant <value_ints: ints = [0, -1, {g.num_heads * g.head_dim}]> ()
    joined = Reshape (batch_first, joined_shape)
    output = Slice (joined, front_1d, query_end_1d, one)
    """


def attended_chunk(g: AttentionGeometry, block: int, per_chunk: int, biased: str) -> str:
    """Statements inside the ``Scan``: softmax attention of ``chunk_query`` to ``keys`` and ``values``.

    Args:
        biased: statements that make ``biased`` of ``scores [batch, kv_heads, per_chunk, groups, block, columns]``.

    ``keys`` and ``values`` are ``[batch, kv_heads, per_chunk, columns, head_dim]``; defines ``chunk_output``.
    """
    kv, dim = g.kv_heads, g.head_dim
    groups = g.num_heads // kv
    return f"""
        query_rows = Constant <value_ints: ints = [0, {kv}, {per_chunk}, {groups * block}, {dim}]> ()
        query_folded = Reshape (chunk_query, query_rows)
        keys_transposed = Transpose <perm: ints = [0, 1, 2, 4, 3]> (keys)
        scores_folded = MatMul (query_folded, keys_transposed)
        scores_shape = Constant <value_ints: ints = [0, {kv}, {per_chunk}, {groups}, {block}, -1]> ()
        scores = Reshape (scores_folded, scores_shape)
        {biased}
        weights = Softmax <axis: int = -1> (biased)
        weights_rows = Constant <value_ints: ints = [0, {kv}, {per_chunk}, {groups * block}, -1]> ()
        weights_folded = Reshape (weights, weights_rows)
        attended_folded = MatMul (weights_folded, values)
        attended_shape = Constant <value_ints: ints = [0, {kv}, {per_chunk}, {groups}, {block}, {dim}]> ()
        attended = Reshape (attended_folded, attended_shape)
        zeroed = Mul (attended, chunk_sees_any)
        by_token = Transpose <perm: ints = [0, 2, 4, 1, 3, 5]> (zeroed)
        packed_shape = Constant <value_ints: ints = [0, {per_chunk * block}, {g.num_heads * dim}]> ()
        chunk_output = Reshape (by_token, packed_shape)
    """
