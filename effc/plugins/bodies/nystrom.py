"""The ONNX function body of ``effc::NystromAttention``.

Texts no longer than the landmarks are many are dense attention. Others are computed one after the other, since each may
be dense by its own padding.
"""

from __future__ import annotations

from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.few_keys import HIDDEN, attend_to_few, chunk_length
from effc.plugins.bodies.pseudo_inverse import cholesky, cholesky_constants, newton, newton_constants
from effc.plugins.bodies.sequence_rows import (
    each_sequence,
    fold_groups,
    literal,
    row_constants,
    split_keys,
    split_queries,
)
from effc.plugins.bodies.short_dense import short_dense
from effc.plugins.forms.low_rank import Nystrom
from effc.plugins.operator import KEY_MASK, AttentionGeometry


@body_text.register
def _(form: Nystrom, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    if geometry.causal:
        form.refuse_causal()
    g, landmarks, masked = geometry, form.landmarks, KEY_MASK in given
    solve, solve_constants = (
        (newton(landmarks), newton_constants())
        if form.method == "newton"
        else (cholesky(g, landmarks), cholesky_constants(landmarks))
    )
    inputs = {"query_sequence": "query", "key_sequence": "key", "value_sequence": "value"}
    if masked:
        inputs |= {"mask_sequence": "key_mask", "query_mask_sequence": "query_mask"}
    steps = f"""
        {_pool("key", masked, "mask_sequence", "key_length")}
        {split_keys("key_means", "key_landmarks")}
        few_keys_unscaled = Transpose <perm: ints = [0, 2, 1]> (key_landmarks)
        few_keys_transposed = Mul (few_keys_unscaled, scale)
        few_bias_column = Where (key_filled, float_zero, hidden)
        few_bias = Transpose <perm: ints = [1, 0]> (few_bias_column)
        sees_any = Greater (key_count, i0)
        sees_any_float = Cast <to: int = 1> (sees_any)
        few_tokens = LessOrEqual (key_count, landmarks)
        every_value = If (few_tokens) <then_branch: graph = each_token_a_landmark () => (own_values) {{
            value_means = MatMul (key_pool, value_sequence)
            {split_keys("value_means", "own_values_grouped")}
            {_repeat_groups(g, "own_values_grouped", "own_values")}
        }}, else_branch: graph = through_landmarks () => (solved) {{
            {_pool("query", masked, "query_mask_sequence", "query_length")}
            {split_queries(g, "query_means", "query_landmarks_split")}
            {fold_groups(g, "query_landmarks_split", "query_landmarks", g.head_dim)}
            between_scores = MatMul (query_landmarks, few_keys_transposed)
            between_biased = Add (between_scores, few_bias)
            between_grouped = Softmax <axis: int = -1> (between_biased)
            between_shape = Constant <value_ints: ints = [{g.num_heads}, {landmarks}, {landmarks}]> ()
            between = Reshape (between_grouped, between_shape)
            query_filled_float = Cast <to: int = 1> (query_filled)
            matrix = Mul (between, query_filled_float)
            {_gather_values(g, landmarks, masked)}
            right_shape = Constant <value_ints: ints = [{g.num_heads}, {landmarks}, {g.head_dim}]> ()
            right = Reshape (gathered_values, right_shape)
            {solve}
        }}>
        few_values = Mul (every_value, sees_any_float)
        {attend_to_few(g, landmarks, True, "sequence_output")}
    """
    return f"""
    {row_constants(g)}
    scale = Constant <value: tensor = float {{{literal(g.scale)}}}> ()
    hidden = Constant <value: tensor = float {{{HIDDEN}}}> ()
    two = Constant <value_ints: ints = [2]> ()
    i0 = Constant <value: tensor = int32 {{0}}> ()
    i1 = Constant <value: tensor = int32 {{1}}> ()
    landmarks = Constant <value: tensor = int32 {{{landmarks}}}> ()
    landmark_numbers = Range (i0, landmarks, i1)
    landmark_column = Unsqueeze (landmark_numbers, one)
    {solve_constants}
    {_QUERY_MASK if masked else ""}
    landmark_count = Constant <value: tensor = int64 {{{landmarks}}}> ()
    is_short = LessOrEqual (key_length, landmark_count)
    output = If (is_short) <then_branch: graph = short () => (short_output) {{
        {short_dense(g, masked, "short_output")}
    }}, else_branch: graph = long () => (long_output) {{
        {each_sequence(inputs, steps, "long_output")}
    }}>
    """


_QUERY_MASK = """
    same_tokens = Equal (query_length, key_length)
    query_mask = If (same_tokens) <then_branch: graph = same () => (same_mask) {
        same_mask = Identity (key_mask)
    }, else_branch: graph = other () => (other_mask) {
        query_batch = Shape <start: int = 0, end: int = 1> (query)
        query_mask_shape = Concat <axis: int = 0> (query_batch, query_length_1d)
        visible_query = Constant <value: tensor = bool {1}> ()
        other_mask = Expand (visible_query, query_mask_shape)
    }>
"""


def _pool(name: str, masked: bool, mask: str, length: str) -> str:
    """Define ``{name}_means [landmarks, width]``, the matrix ``{name}_pool [landmarks, length]`` that takes them, the
    number of visible tokens ``{name}_count`` and which landmarks have any, ``{name}_filled [landmarks, 1]``.
    """
    ranks = (
        f"""
        {name}_visible_int = Cast <to: int = 6> ({mask})
        {name}_ranks_from_one = CumSum ({name}_visible_int, n0)
        {name}_ranks = Sub ({name}_ranks_from_one, i1)
        {name}_count = ReduceSum <keepdims: int = 0> ({name}_visible_int)
        """
        if masked
        else f"""
        {name}_count = Cast <to: int = 6> ({length})
        {name}_ranks = Range (i0, {name}_count, i1)
        """
    )
    return f"""
        {ranks}
        {name}_parts = Max ({name}_count, landmarks)
        {name}_shares = Mul ({name}_ranks, landmarks)
        {name}_segments = Div ({name}_shares, {name}_parts)
        {name}_segment_row = Unsqueeze ({name}_segments, zero)
        {name}_in_segment = Equal ({name}_segment_row, landmark_column)
        {name}_members = {f"And ({name}_in_segment, {mask})" if masked else f"Identity ({name}_in_segment)"}
        {name}_members_float = Cast <to: int = 1> ({name}_members)
        {name}_sizes = ReduceSum <keepdims: int = 1> ({name}_members_float, one)
        {name}_filled = Greater ({name}_sizes, float_zero)
        {name}_divisors = Where ({name}_filled, {name}_sizes, float_one)
        {name}_pool = Div ({name}_members_float, {name}_divisors)
        {name}_means = MatMul ({name}_pool, {name}_sequence)
    """


def _gather_values(g: AttentionGeometry, landmarks: int, masked: bool) -> str:
    """Define ``gathered_values [kv_heads, groups * landmarks, head_dim]``: the landmark queries attend to every key.

    Chunk by chunk with a running maximum and denominator, as in online softmax (Milakov and Gimelshein, 2018).
    """
    rows = g.num_heads // g.kv_heads * landmarks
    mask = """
            mask_chunk = Slice (mask_sequence, start_1d, stop_1d, zero)
            chunk_bias = Where (mask_chunk, float_zero, hidden)
            chunk_scores = Add (chunk_scores_all, chunk_bias)
    """
    return f"""
        key_chunk_length = Constant <value: tensor = int64 {{{chunk_length(g, landmarks)}}}> ()
        key_starts = Range (n0, key_length, key_chunk_length)
        query_landmarks_scaled = Mul (query_landmarks, scale)
        statistics_shape = Constant <value_ints: ints = [{g.kv_heads}, {rows}, 1]> ()
        no_maximum = Expand (hidden, statistics_shape)
        no_sum = Expand (float_zero, statistics_shape)
        no_values_shape = Constant <value_ints: ints = [{g.kv_heads}, {rows}, {g.head_dim}]> ()
        no_values = Expand (float_zero, no_values_shape)
        last_maximum, last_sum, last_values = Scan <
            num_scan_inputs: int = 1, body: graph = keys_of_chunk (
                maximum, sum, values, key_start
            ) => (next_maximum, next_sum, next_values) {{
                key_unclipped = Add (key_start, key_chunk_length)
                key_stop = Min (key_unclipped, key_length)
                start_1d = Unsqueeze (key_start, zero)
                stop_1d = Unsqueeze (key_stop, zero)
                key_chunk = Slice (key_sequence, start_1d, stop_1d, zero)
                value_chunk = Slice (value_sequence, start_1d, stop_1d, zero)
                {split_keys("key_chunk", "chunk_keys")}
                {split_keys("value_chunk", "chunk_values")}
                chunk_keys_transposed = Transpose <perm: ints = [0, 2, 1]> (chunk_keys)
                chunk_scores_all = MatMul (query_landmarks_scaled, chunk_keys_transposed)
                {mask if masked else "chunk_scores = Identity (chunk_scores_all)"}
                chunk_maximum = ReduceMax <keepdims: int = 1> (chunk_scores, last_axis)
                next_maximum = Max (maximum, chunk_maximum)
                relative = Sub (chunk_scores, next_maximum)
                chunk_weights = Exp (relative)
                kept_exponent = Sub (maximum, next_maximum)
                kept = Exp (kept_exponent)
                kept_sum = Mul (sum, kept)
                chunk_sum = ReduceSum <keepdims: int = 1> (chunk_weights, last_axis)
                next_sum = Add (kept_sum, chunk_sum)
                kept_values = Mul (values, kept)
                weighted_values = MatMul (chunk_weights, chunk_values)
                next_values = Add (kept_values, weighted_values)
            }}
        > (no_maximum, no_sum, no_values, key_starts)
        gathered_values = Div (last_values, last_sum)
    """


def _repeat_groups(g: AttentionGeometry, source: str, target: str) -> str:
    """From ``[kv_heads, n, head_dim]`` to ``[heads, n, head_dim]``."""
    groups = g.num_heads // g.kv_heads
    if groups == 1:
        return f"{target} = Identity ({source})"
    return f"""
        {target}_split = Unsqueeze ({source}, one)
        {target}_repeats = Constant <value_ints: ints = [1, {groups}, 1, 1]> ()
        {target}_repeated = Tile ({target}_split, {target}_repeats)
        {target}_shape = Constant <value_ints: ints = [{g.num_heads}, -1, {g.head_dim}]> ()
        {target} = Reshape ({target}_repeated, {target}_shape)
    """
