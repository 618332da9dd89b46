"""Dense attention in one piece, for branches where sequences are short or queries few."""

from __future__ import annotations

from effc.plugins.operator import AttentionGeometry


def attend_whole(g: AttentionGeometry, name: str = "whole", query: str = "query", end: str = "key_length") -> str:
    """Dense attention of every query to every key: defines ``<name>_output``.

    Args:
        query: name of the queries.
        end: name of the position behind the last one.

    Uses the values ``zero``, ``one``, ``two`` and ``last_axis`` (1-D int64), ``n0`` and ``n1`` (int64),
    ``scale_value``, ``hidden_bias`` and ``nearly_hidden`` (float, between which and zero lies no bias), ``kv_shape``,
    ``key_length``, ``offset`` (of the first query) and ``mask_bias [batch, key_length]``.
    """
    kv, dim = g.kv_heads, g.head_dim
    causal = f"""
        {name}_query_positions = Range (offset, {end}, n1)
        {name}_query_column = Unsqueeze ({name}_query_positions, one)
        {name}_key_positions = Range (n0, key_length, n1)
        {name}_not_behind = LessOrEqual ({name}_key_positions, {name}_query_column)
        {name}_bias = Where ({name}_not_behind, {name}_mask_bias, hidden_bias)
    """
    return f"""
        {name}_query_shape = Constant <value_ints: ints = [0, -1, {kv}, {g.num_heads // kv}, {dim}]> ()
        {name}_query_split = Reshape ({query}, {name}_query_shape)
        {name}_query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> ({name}_query_split)
        {name}_query_scaled = Mul ({name}_query_heads, scale_value)
        {name}_key_split = Reshape (key, kv_shape)
        {name}_value_split = Reshape (value, kv_shape)
        {name}_key_heads = Transpose <perm: ints = [0, 2, 3, 1]> ({name}_key_split)
        {name}_value_heads = Transpose <perm: ints = [0, 2, 1, 3]> ({name}_value_split)
        {name}_key_grouped = Unsqueeze ({name}_key_heads, two)
        {name}_value_grouped = Unsqueeze ({name}_value_heads, two)
        {name}_scores = MatMul ({name}_query_scaled, {name}_key_grouped)
        {name}_mask_axes = Constant <value_ints: ints = [1, 2, 3]> ()
        {name}_mask_bias = Unsqueeze (mask_bias, {name}_mask_axes)
        {causal if g.causal else f"{name}_bias = Identity ({name}_mask_bias)"}
        {name}_biased = Add ({name}_scores, {name}_bias)
        {name}_weights = Softmax <axis: int = -1> ({name}_biased)
        {name}_attended = MatMul ({name}_weights, {name}_value_grouped)
        {name}_highest_bias = ReduceMax <keepdims: int = 1> ({name}_bias, last_axis)
        {name}_sees_any = Greater ({name}_highest_bias, nearly_hidden)
        {name}_factor = Cast <to: int = 1> ({name}_sees_any)
        {name}_zeroed = Mul ({name}_attended, {name}_factor)
        {name}_by_token = Transpose <perm: ints = [0, 3, 1, 2, 4]> ({name}_zeroed)
        {name}_packed_shape = Constant <value_ints: ints = [0, -1, {g.num_heads * dim}]> ()
        {name}_output = Reshape ({name}_by_token, {name}_packed_shape)
    """
