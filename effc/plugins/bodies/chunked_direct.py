"""Parts of the body of ``effc::ChunkedAttention`` that need no units: few queries, and the rows of global tokens."""

from __future__ import annotations

from effc.plugins.bodies.whole import attend_whole
from effc.plugins.forms.chunked import Chunked
from effc.plugins.operator import AttentionGeometry


def attend_direct(g: AttentionGeometry, form: Chunked, gated: bool) -> str:
    """The rule evaluated pair by pair, over the keys from the first chunk on that the first query sees."""
    first = (
        "first_chunk = Div (offset, size)\n first_key = Mul (first_chunk, size)"
        if form.merge == "concat"
        else "first_half = Div (offset, half_size)\n half_before = Sub (first_half, n1)\n"
        "first_unclipped = Mul (half_before, half_size)\n first_key = Max (first_unclipped, n0)"
    )
    joined = (
        """
        global_count = Min (first_key, tokens)
        global_rows = Range (n0, global_count, n1)
        chunk_positions = Range (first_key, key_length, n1)
        positions = Concat <axis: int = 0> (global_rows, chunk_positions)
        """
        if form.tokens
        else "positions = Range (first_key, key_length, n1)"
    )
    rules = "\n".join(_direct_rule(g, form, shift) for shift in form.shifts)
    if form.merge == "concat":
        attend = _direct_softmax(g, "seen0", "direct_attended")
    elif form.merge == "add":
        attend = _direct_softmax(g, "seen0", "attended_a") + _direct_softmax(g, f"seen{form.size // 2}", "attended_b")
        attend += "\n attended_sum = Add (attended_a, attended_b)\n direct_attended = Mul (attended_sum, one_half)"
    else:
        a, b = "seen0", f"seen{form.size // 2}"
        attend = f"""
        in_both = And ({a}, {b})
        in_any = Or ({a}, {b})
        weights_alone = Where ({a}, direct_a_bias, visible_bias)
        weights_bias = Where (in_both, direct_both_bias, weights_alone)
        scores_weighted = Add (scores, weights_bias)
        """ + _direct_softmax(g, "in_any", "direct_attended", scores="scores_weighted")
        squeezed = "a_axes = Constant <value_ints: ints = [1]> ()\n"
        for bias in ("a_bias", "both_bias"):
            squeezed += f"direct_{bias} = " + (f"Squeeze ({bias}, a_axes)\n" if gated else f"Identity ({bias})\n")
        attend = squeezed + attend
    return f"""
        {first}
        {joined}
        keys = Gather <axis: int = 1> (key, positions)
        values = Gather <axis: int = 1> (value, positions)
        mask_rows = Gather <axis: int = 1> (key_mask, positions)
        mask_axes = Constant <value_ints: ints = [1, 2, 3]> ()
        mask_by_row = Unsqueeze (mask_rows, mask_axes)
        query_positions = Range (offset, key_length, n1)
        query_column = Unsqueeze (query_positions, one)
        {rules}
        query_split = Reshape (query, query_heads_shape)
        query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (query_split)
        query_scaled = Mul (query_heads, scale_value)
        keys_split = Reshape (keys, kv_shape)
        keys_by_head = Transpose <perm: ints = [0, 2, 3, 1]> (keys_split)
        keys_grouped = Unsqueeze (keys_by_head, two)
        values_split = Reshape (values, kv_shape)
        values_by_head = Transpose <perm: ints = [0, 2, 1, 3]> (values_split)
        values_grouped = Unsqueeze (values_by_head, two)
        scores = MatMul (query_scaled, keys_grouped)
        {attend}
        by_token = Transpose <perm: ints = [0, 3, 1, 2, 4]> (direct_attended)
        direct_output = Reshape (by_token, packed_shape)
    """


def _direct_rule(g: AttentionGeometry, form: Chunked, shift: int) -> str:
    s = shift
    lines = [
        f"shift{s} = Constant <value: tensor = int64 {{{s}}}> ()",
        f"query_shifted{s} = Add (query_column, shift{s})",
        f"key_shifted{s} = Add (positions, shift{s})",
        f"query_chunk{s} = Div (query_shifted{s}, size)",
        f"key_chunk{s} = Div (key_shifted{s}, size)",
        f"in_chunk{s} = Equal (query_chunk{s}, key_chunk{s})",
    ]
    if form.tokens:
        lines += [f"is_token{s} = Less (positions, tokens)", f"rule{s} = Or (in_chunk{s}, is_token{s})"]
    else:
        lines.append(f"rule{s} = Identity (in_chunk{s})")
    if g.causal:
        lines += [f"not_behind{s} = LessOrEqual (positions, query_column)", f"past{s} = And (rule{s}, not_behind{s})"]
    else:
        lines.append(f"past{s} = Identity (rule{s})")
    lines.append(f"seen{s} = And (past{s}, mask_by_row)")
    return "\n        ".join(lines)


def _direct_softmax(g: AttentionGeometry, seen: str, result: str, scores: str = "scores") -> str:
    return f"""
        {result}_biased = Where ({seen}, {scores}, hidden_bias)
        {result}_weights = Softmax <axis: int = -1> ({result}_biased)
        {result}_all = MatMul ({result}_weights, values_grouped)
        {result}_seen = Cast <to: int = 1> ({seen})
        {result}_factor = ReduceMax <keepdims: int = 1> ({result}_seen, last_axis)
        {result} = Mul ({result}_all, {result}_factor)
    """


def attend_global_rows(g: AttentionGeometry) -> str:
    """The first tokens attend to every key; their rows replace what the chunks gave."""
    return f"""
    tokens_there = Min (tokens, key_length)
    rows_end = Max (tokens_there, offset)
    row_count = Sub (rows_end, offset)
    has_rows = Greater (row_count, n0)
    output = If (has_rows) <then_branch: graph = with_rows () => (with_rows_output) {{
        row_count_1d = Unsqueeze (row_count, zero)
        rows_query = Slice (query, zero, row_count_1d, one)
        {attend_whole(g, "rows", "rows_query", "rows_end")}
        remaining = Slice (chunked_output, row_count_1d, query_length_1d, one)
        with_rows_output = Concat <axis: int = 1> (rows_output, remaining)
    }}, else_branch: graph = without_rows () => (without_rows_output) {{
        without_rows_output = Identity (chunked_output)
    }}>
    """
