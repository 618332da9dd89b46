"""Dense attention of a short text, the whole batch at once, as ONNX statements: bidirectional, O(length^2)."""

from __future__ import annotations

from effc.plugins.operator import AttentionGeometry


def short_dense(g: AttentionGeometry, masked: bool, result: str) -> str:
    """Define ``result [batch, query_length, heads * head_dim]``.

    Expects ``scale``, ``hidden`` (a bias that hides a key), ``float_zero``, ``last_axis`` and ``joined_shape``.
    """
    heads, kv, dim = g.num_heads, g.kv_heads, g.head_dim
    mask = """
        short_mask_axes = Constant <value_ints: ints = [1, 2]> ()
        short_mask = Unsqueeze (key_mask, short_mask_axes)
        short_bias = Where (short_mask, float_zero, hidden)
        short_biased = Add (short_scores, short_bias)
        short_weights = Softmax <axis: int = -1> (short_biased)
        short_attended_any = MatMul (short_weights, short_values)
        short_mask_float = Cast <to: int = 1> (short_mask)
        short_sees_any = ReduceMax <keepdims: int = 1> (short_mask_float, last_axis)
        short_attended = Mul (short_attended_any, short_sees_any)
    """
    plain = """
        short_weights = Softmax <axis: int = -1> (short_scores)
        short_attended = MatMul (short_weights, short_values)
    """
    return f"""
        short_queries_by_token = Constant <value_ints: ints = [0, -1, {heads}, {dim}]> ()
        short_keys_by_token = Constant <value_ints: ints = [0, -1, {kv}, {dim}]> ()
        short_folded_shape = Constant <value_ints: ints = [0, {kv}, -1, {dim}]> ()
        short_unfolded_shape = Constant <value_ints: ints = [0, {heads}, -1, {dim}]> ()
        short_query_scaled = Mul (query, scale)
        short_query_split = Reshape (short_query_scaled, short_queries_by_token)
        short_query_heads = Transpose <perm: ints = [0, 2, 1, 3]> (short_query_split)
        short_queries = Reshape (short_query_heads, short_folded_shape)
        short_key_split = Reshape (key, short_keys_by_token)
        short_keys_transposed = Transpose <perm: ints = [0, 2, 3, 1]> (short_key_split)
        short_value_split = Reshape (value, short_keys_by_token)
        short_values = Transpose <perm: ints = [0, 2, 1, 3]> (short_value_split)
        short_scores = MatMul (short_queries, short_keys_transposed)
        {mask if masked else plain}
        short_unfolded = Reshape (short_attended, short_unfolded_shape)
        short_by_token = Transpose <perm: ints = [0, 2, 1, 3]> (short_unfolded)
        {result} = Reshape (short_by_token, joined_shape)
    """
