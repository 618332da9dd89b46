"""What the bodies that cut queries into pieces have in common: names they all use, and one piece of queries."""

from __future__ import annotations

import numpy as np

from effc.plugins.operator import AttentionGeometry


def preamble(g: AttentionGeometry) -> str:
    """The values that such a body uses everywhere.

    ``zero``, ``one``, ``two``, ``last_axis`` (1-D int64); ``n0``, ``n1`` (int64); ``scale_value``, ``visible_bias``,
    ``hidden_bias``, ``nearly_hidden`` (float, between which and zero lies no bias); ``query_length``, ``key_length``,
    their ``_1d`` forms, ``offset`` of the first query; ``kv_shape``; ``mask_bias [batch, key_length]``.
    """
    return f"""
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    n0 = Constant <value: tensor = int64 {{0}}> ()
    n1 = Constant <value: tensor = int64 {{1}}> ()
    scale_value = Constant <value: tensor = float {{{float_text(g.scale)}}}> ()
    visible_bias = Constant <value: tensor = float {{0.0}}> ()
    hidden_bias = Constant <value: tensor = float {{-1e30}}> ()
    nearly_hidden = Constant <value: tensor = float {{-1e29}}> ()
    query_length_1d = Shape <start: int = 1, end: int = 2> (query)
    query_length = Squeeze (query_length_1d, zero)
    key_length_1d = Shape <start: int = 1, end: int = 2> (key)
    key_length = Squeeze (key_length_1d, zero)
    offset = Sub (key_length, query_length)
    kv_shape = Constant <value_ints: ints = [0, -1, {g.kv_heads}, {g.head_dim}]> ()
    mask_bias = Where (key_mask, visible_bias, hidden_bias)
    """


def attend_piece(g: AttentionGeometry, query: str, pieces: int, rows: int) -> str:
    """Attention of some pieces of queries to the keys of each: defines ``zeroed``, where rows that see none are zero.

    Uses :func:`preamble` and ``query [batch, kv_heads, pieces, groups, rows, head_dim]``, ``values [batch,
    kv_heads, pieces, columns, head_dim]``, ``keys_transposed`` (the keys alike, the last two axes exchanged) and
    ``bias``, which spreads over ``[batch, kv_heads, pieces, groups, rows, columns]``.

    Args:
        query: name of that value.
        rows: queries of one piece.
    """
    kv, groups, dim = g.kv_heads, g.num_heads // g.kv_heads, g.head_dim
    return f"""
            highest_bias = ReduceMax <keepdims: int = 1> (bias, last_axis)
            row_sees_any = Greater (highest_bias, nearly_hidden)
            row_factor = Cast <to: int = 1> (row_sees_any)
            folded_shape = Constant <value_ints: ints = [0, {kv}, {pieces}, {groups * rows}, {dim}]> ()
            query_folded = Reshape ({query}, folded_shape)
            query_scaled = Mul (query_folded, scale_value)
            scores_folded = MatMul (query_scaled, keys_transposed)
            scores_shape = Constant <value_ints: ints = [0, {kv}, {pieces}, {groups}, {rows}, -1]> ()
            scores = Reshape (scores_folded, scores_shape)
            biased = Add (scores, bias)
            weights = Softmax <axis: int = -1> (biased)
            weights_shape = Constant <value_ints: ints = [0, {kv}, {pieces}, {groups * rows}, -1]> ()
            weights_folded = Reshape (weights, weights_shape)
            attended_folded = MatMul (weights_folded, values)
            attended_shape = Constant <value_ints: ints = [0, {kv}, {pieces}, {groups}, {rows}, {dim}]> ()
            attended = Reshape (attended_folded, attended_shape)
            zeroed = Mul (attended, row_factor)
    """


def float_text(value: float) -> str:
    """A number as the text form of ONNX takes it, rounded to float32."""
    return np.format_float_positional(np.float32(value), trim="0")
