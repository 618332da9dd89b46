"""The ONNX function body of ``effc::ChunkedDenseAttention``.

A ``Scan`` over key/value heads holds a ``Scan`` over chunks of queries, so that one head's scores of one chunk are
alive at a time. Causal chunks slice the keys up to their own end; the queries are padded in front, so that the last
chunk ends with the sequence. Without padding, bidirectional heads of equal number take ONNX Runtime's fused kernel,
which is blocked itself. Short sequences and few queries are attended in one piece.
"""

from __future__ import annotations

from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.preamble import float_text, preamble
from effc.plugins.bodies.whole import attend_whole
from effc.plugins.forms.dense_chunked import DenseChunked
from effc.plugins.operator import KEY_MASK, AttentionGeometry

# Lengths, and numbers of queries, from which on cutting pays.
_SHORT = 256
_FEW = 16


@body_text.register
def _(form: DenseChunked, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    g = geometry
    chunked = _chunked(g, form.chunk, KEY_MASK in given)
    if not g.causal and g.kv_heads == g.num_heads:
        chunked = _fused_or(g, chunked)
    return f"""
    {preamble(g)}
    short = Constant <value: tensor = int64 {{{_SHORT}}}> ()
    few = Constant <value: tensor = int64 {{{_FEW}}}> ()
    is_short = LessOrEqual (key_length, short)
    is_few = LessOrEqual (query_length, few)
    takes_whole = Or (is_short, is_few)
    output = If (takes_whole) <then_branch: graph = whole () => (whole_output) {{
        {attend_whole(g)}
    }}, else_branch: graph = long () => (long_output) {{
        {chunked}
    }}>
    """


def _fused_or(g: AttentionGeometry, otherwise: str) -> str:
    return f"""
        mask_int = Cast <to: int = 6> (key_mask)
        mask_minimum = ReduceMin <keepdims: int = 0> (mask_int)
        no_padding = Cast <to: int = 9> (mask_minimum)
        long_output = If (no_padding) <then_branch: graph = unpadded () => (unpadded_output) {{
            unpadded_output = com.microsoft.MultiHeadAttention <
                num_heads: int = {g.num_heads}, scale: float = {float_text(g.scale)}
            > (query, key, value)
        }}, else_branch: graph = padded () => (padded_output) {{
            {otherwise.replace("long_output", "padded_output")}
        }}>
    """


def _chunked(g: AttentionGeometry, chunk: int, masked: bool) -> str:
    heads, kv, dim = g.num_heads, g.kv_heads, g.head_dim
    groups = heads // kv
    slices = """
                    end_1d = Add (chunk_start, chunk_1d)
                    keys = Slice (head_key, zero, end_1d, zero)
                    values = Slice (head_value, zero, end_1d, zero)
                    bias_rows = Slice (mask_rows, zero, end_1d, last_axis)
                    own_count = Min (end_1d, chunk_1d)
                    first_column = Sub (chunk_1d, own_count)
                    own_table = Slice (table, first_column, chunk_1d, last_axis)
                    seen_before = Sub (end_1d, own_count)
                    table_pads = Concat <axis: int = 0> (zero, seen_before, zero, zero)
                    causal_bias = Pad (own_table, table_pads)
    """
    whole = """
                    keys = Identity (head_key)
                    values = Identity (head_value)
                    bias_rows = Identity (mask_rows)
    """
    biases = (["bias_rows"] if masked else []) + (["causal_bias"] if g.causal else [])
    added = "".join(f"\n                    scores{n + 1} = Add (scores{n}, {bias})" for n, bias in enumerate(biases))
    return f"""
        chunk = Constant <value: tensor = int64 {{{chunk}}}> ()
        chunk_1d = Constant <value_ints: ints = [{chunk}]> ()
        chunk_less_one = Constant <value: tensor = int64 {{{chunk - 1}}}> ()
        rounded = Add (query_length, chunk_less_one)
        chunks = Div (rounded, chunk)
        padded_length = Mul (chunks, chunk)
        missing = Sub (padded_length, query_length)
        missing_1d = Unsqueeze (missing, zero)
        padded_1d = Unsqueeze (padded_length, zero)
        pads = Concat <axis: int = 0> (zero, missing_1d, zero, zero, zero, zero)
        query_padded = Pad (query, pads)
        query_shape = Constant <value_ints: ints = [0, -1, {chunk}, {kv}, {groups}, {dim}]> ()
        query_split = Reshape (query_padded, query_shape)
        query_by_head = Transpose <perm: ints = [3, 1, 0, 4, 2, 5]> (query_split)
        key_split = Reshape (key, kv_shape)
        value_split = Reshape (value, kv_shape)
        key_by_head = Transpose <perm: ints = [2, 1, 0, 3]> (key_split)
        value_by_head = Transpose <perm: ints = [2, 1, 0, 3]> (value_split)
        mask_axes = Constant <value_ints: ints = [1, 2]> ()
        mask_rows = Unsqueeze (mask_bias, mask_axes)
        first_start = Sub (key_length, padded_length)
        starts_from_zero = Range (n0, padded_length, chunk)
        starts = Add (starts_from_zero, first_start)
        starts_1d = Unsqueeze (starts, one)
        table_rows = Range (n0, chunk, n1)
        table_column = Unsqueeze (table_rows, one)
        not_behind = LessOrEqual (table_rows, table_column)
        table = Where (not_behind, visible_bias, hidden_bias)
        rows_shape = Constant <value_ints: ints = [0, {groups * chunk}, {dim}]> ()
        scores_shape = Constant <value_ints: ints = [0, {groups}, {chunk}, -1]> ()
        weights_shape = Constant <value_ints: ints = [0, {groups * chunk}, -1]> ()
        attended_shape = Constant <value_ints: ints = [0, {groups}, {chunk}, {dim}]> ()
        output_by_head = Scan <num_scan_inputs: int = 3, body: graph = head_body (
            head_query, head_key, head_value
        ) => (head_output) {{
            head_output = Scan <num_scan_inputs: int = 2, body: graph = chunk_body (
                chunk_query, chunk_start
            ) => (chunk_output) {{
                    {slices if g.causal else whole}
                    rows = Reshape (chunk_query, rows_shape)
                    rows_scaled = Mul (rows, scale_value)
                    keys_transposed = Transpose <perm: ints = [1, 2, 0]> (keys)
                    values_by_batch = Transpose <perm: ints = [1, 0, 2]> (values)
                    scores_folded = MatMul (rows_scaled, keys_transposed)
                    scores0 = Reshape (scores_folded, scores_shape)
                    {added}
                    weights = Softmax <axis: int = -1> (scores{len(biases)})
                    weights_folded = Reshape (weights, weights_shape)
                    attended_folded = MatMul (weights_folded, values_by_batch)
                    chunk_output = Reshape (attended_folded, attended_shape)
            }}> (head_query, starts_1d)
        }}> (query_by_head, key_by_head, value_by_head)
        by_token = Transpose <perm: ints = [2, 1, 4, 0, 3, 5]> (output_by_head)
        packed_shape = Constant <value_ints: ints = [0, -1, {heads * dim}]> ()
        joined = Reshape (by_token, packed_shape)
        {"attended" if masked else "long_output"} = Slice (joined, missing_1d, padded_1d, one)
        {_zero_blind_rows(g) if masked else ""}
    """


def _zero_blind_rows(g: AttentionGeometry) -> str:
    """Rows that see no key give zeros; one cumulative sum tells them."""
    counts = (
        """
        mask_count = Cast <to: int = 7> (key_mask)
        visible_so_far = CumSum (mask_count, n1)
        visible_counts = Slice (visible_so_far, offset_1d, key_length_1d, one)
        """
        if g.causal
        else """
        mask_count = Cast <to: int = 7> (key_mask)
        visible_counts = ReduceSum <keepdims: int = 1> (mask_count, one)
        """
    )
    return f"""
        offset_1d = Unsqueeze (offset, zero)
        {counts}
        sees_any = Greater (visible_counts, n0)
        factor = Cast <to: int = 1> (sees_any)
        factor_rows = Unsqueeze (factor, two)
        long_output = Mul (attended, factor_rows)
    """
