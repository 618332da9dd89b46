"""Dense attention in one piece, for branches where sequences are short or queries few."""

from __future__ import annotations

from effc.plugins.operator import AttentionGeometry


def attend_whole(g: AttentionGeometry) -> str:
    """Dense attention of every query to every key: defines ``whole_output``.

    Uses the values ``zero``, ``one``, ``two`` and ``last_axis`` (1-D int64), ``n0`` and ``n1`` (int64),
    ``scale_value``, ``hidden_bias`` and ``nearly_hidden`` (float, between which and zero lies no bias), ``kv_shape``,
    ``key_length``, ``offset`` (of the first query) and ``mask_bias [batch, key_length]``.
    """
    kv, dim = g.kv_heads, g.head_dim
    causal = """
        whole_query_positions = Range (offset, key_length, n1)
        whole_query_column = Unsqueeze (whole_query_positions, one)
        whole_key_positions = Range (n0, key_length, n1)
        whole_not_behind = LessOrEqual (whole_key_positions, whole_query_column)
        whole_bias = Where (whole_not_behind, whole_mask_bias, hidden_bias)
    """
    return f"""
        whole_query_shape = Constant <value_ints: ints = [0, -1, {kv}, {g.num_heads // kv}, {dim}]> ()
        whole_query_split = Reshape (query, whole_query_shape)
        whole_query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (whole_query_split)
        whole_query_scaled = Mul (whole_query_heads, scale_value)
        whole_key_split = Reshape (key, kv_shape)
        whole_value_split = Reshape (value, kv_shape)
        whole_key_heads = Transpose <perm: ints = [0, 2, 3, 1]> (whole_key_split)
        whole_value_heads = Transpose <perm: ints = [0, 2, 1, 3]> (whole_value_split)
        whole_key_grouped = Unsqueeze (whole_key_heads, two)
        whole_value_grouped = Unsqueeze (whole_value_heads, two)
        whole_scores = MatMul (whole_query_scaled, whole_key_grouped)
        whole_mask_axes = Constant <value_ints: ints = [1, 2, 3]> ()
        whole_mask_bias = Unsqueeze (mask_bias, whole_mask_axes)
        {causal if g.causal else "whole_bias = Identity (whole_mask_bias)"}
        whole_biased = Add (whole_scores, whole_bias)
        whole_weights = Softmax <axis: int = -1> (whole_biased)
        whole_attended = MatMul (whole_weights, whole_value_grouped)
        whole_highest_bias = ReduceMax <keepdims: int = 1> (whole_bias, last_axis)
        whole_sees_any = Greater (whole_highest_bias, nearly_hidden)
        whole_factor = Cast <to: int = 1> (whole_sees_any)
        whole_zeroed = Mul (whole_attended, whole_factor)
        whole_by_token = Transpose <perm: ints = [0, 3, 1, 2, 4]> (whole_zeroed)
        whole_packed_shape = Constant <value_ints: ints = [0, -1, {g.num_heads * dim}]> ()
        whole_output = Reshape (whole_by_token, whole_packed_shape)
    """
