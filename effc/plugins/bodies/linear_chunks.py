"""Linear attention of one sequence, chunk by chunk, as ONNX statements.

Everything here works on ``[length, heads * head_dim]``, one sequence of the batch: its rows are cut into chunks without
a copy of the whole, and what is computed of a chunk stays in a core's second-level cache. The state is held as
``state [kv_heads, features, head_dim]``, ``normaliser [kv_heads, 1, features]`` and, for forms that have one,
``stabiliser [kv_heads, 1, 1]``.
"""

from __future__ import annotations

from effc.plugins.bodies.linear_maps import elementwise, key_map, map_constants, query_map
from effc.plugins.bodies.sequence_rows import (
    chunk_rows,
    fold_groups,
    literal,
    row_constants,
    rows_by_token,
    split_keys,
    split_queries,
)
from effc.plugins.forms.linear import CAUSAL_CHUNK, EMPTY_STABILISER, Linear, LinearForm
from effc.plugins.operator import AttentionGeometry

# Queries or keys of one chunk with their features, in bytes. Measured: much the same from 0.4 to 3 MiB.
_CHUNK_BYTES = 3 << 19
_LARGEST_CHUNK = 512
_SMALLEST = 1.1754944e-38


def form_of(g: AttentionGeometry) -> LinearForm:
    """The geometry's form."""
    assert isinstance(g.form, LinearForm)
    return g.form


def chunk_length(g: AttentionGeometry) -> int:
    """Rows of one chunk where pairs within it are not computed."""
    width = g.num_heads * max(form_of(g).features(g.head_dim), g.head_dim)
    return max(32, min(_LARGEST_CHUNK, _CHUNK_BYTES // (4 * width) // 32 * 32))


def constants(g: AttentionGeometry) -> str:
    """What all statements below share."""
    return f"""
    {row_constants(g)}
    smallest = Constant <value: tensor = float {{{literal(_SMALLEST)}}}> ()
    no_exponent = Constant <value: tensor = float {{{EMPTY_STABILISER}}}> ()
    normaliser_row_shape = Constant <value_ints: ints = [{g.kv_heads}, 1, -1]> ()
    normaliser_column_shape = Constant <value_ints: ints = [{g.kv_heads}, -1, 1]> ()
    {map_constants(g)}
    """


def state_names(g: AttentionGeometry, prefix: str) -> str:
    """``{prefix}_state, {prefix}_normaliser`` and so on, as a list in ONNX text."""
    return ", ".join(f"{prefix}_{name}" for name in form_of(g).state_shapes(g.kv_heads, g.head_dim))


def empty_state(g: AttentionGeometry) -> str:
    """Define ``empty_*``."""
    features = form_of(g).features(g.head_dim)
    text = f"""
    state_shape = Constant <value_ints: ints = [{g.kv_heads}, {features}, {g.head_dim}]> ()
    empty_state = Expand (float_zero, state_shape)
    normaliser_shape = Constant <value_ints: ints = [{g.kv_heads}, 1, {features}]> ()
    empty_normaliser = Expand (float_zero, normaliser_shape)
    """
    if form_of(g).has_stabiliser:
        text += f"""
    stabiliser_shape = Constant <value_ints: ints = [{g.kv_heads}, 1, 1]> ()
    empty_stabiliser = Expand (no_exponent, stabiliser_shape)
        """
    return text


def gather_state(g: AttentionGeometry, masked: bool, result: str, limit: str) -> str:
    """Define ``{result}_*``: the state of the keys before position ``limit``, of which there is at least one."""
    chunk = chunk_length(g)
    return f"""
    {result}_chunk = Constant <value: tensor = int64 {{{chunk}}}> ()
    {result}_starts = Range (n0, {limit}, {result}_chunk)
    {state_names(g, result)} = Scan <num_scan_inputs: int = 1, body: graph = keys_of_chunk (
        {state_names(g, "before")}, gathered_start
    ) => ({state_names(g, "after")}) {{
        gathered_unclipped = Add (gathered_start, {result}_chunk)
        gathered_stop = Min (gathered_unclipped, {limit})
        {_key_chunk(g, masked, "gathered_start", "gathered_stop")}
        {_add_to_state(g, masked)}
    }}> ({state_names(g, "empty")}, {result}_starts)
    """


def gather_earlier_state(g: AttentionGeometry, masked: bool, result: str) -> str:
    """Define ``{result}_*``: the state of the keys before the first query, of which there may be none."""
    same = "\n".join(
        f"unchanged_{name} = Identity (empty_{name})" for name in form_of(g).state_shapes(g.kv_heads, g.head_dim)
    )
    return f"""
    earlier_keys = Greater (offset, n0)
    {state_names(g, result)} = If (earlier_keys) <then_branch: graph = some () => ({state_names(g, "gathered")}) {{
        {gather_state(g, masked, "gathered", "offset")}
    }}, else_branch: graph = none () => ({state_names(g, "unchanged")}) {{
        {same}
    }}>
    """


def read_state(g: AttentionGeometry, state: str, result: str) -> str:
    """Define ``result [chunks, chunk, ..., head_dim]``, heads between: what every query reads from ``{state}_*``."""
    return f"""
    {state}_normaliser_column = Reshape ({state}_normaliser, normaliser_column_shape)
    {chunk_rows(chunk_length(g), "query_rows")}
    {result} = Scan <num_scan_inputs: int = 1, body: graph = queries_of_chunk (chunk_rows) => (chunk_output) {{
        {_query_chunk(g, "chunk_rows")}
        numerator = MatMul (queries, {state}_state)
        denominator = MatMul (queries, {state}_normaliser_column)
        {_divide(g)}
    }}> (query_rows)
    """


def causal_chunks(g: AttentionGeometry, masked: bool, first: str, last: str, result: str) -> str:
    """Define ``result`` as :func:`read_state` does, causally, and the state ``{last}_*`` behind the last query.

    Starts from the state ``{first}_*`` of what lies before the first query. Expects ``offset``, the first query's
    position among the keys.
    """
    groups = g.num_heads // g.kv_heads
    stabilised = form_of(g).has_stabiliser
    return f"""
    {chunk_rows(CAUSAL_CHUNK, "query_rows")}
    causal_chunk = Constant <value: tensor = int64 {{{CAUSAL_CHUNK}}}> ()
    causal_places = Range (n0, causal_chunk, n1)
    causal_column = Unsqueeze (causal_places, one)
    not_behind = GreaterOrEqual (causal_column, causal_places)
    not_behind_float = Cast <to: int = 1> (not_behind)
    group_repeats = Constant <value_ints: ints = [{groups}, 1]> ()
    triangle = Tile (not_behind_float, group_repeats)
    query_starts = Range (n0, query_length, causal_chunk)
    {state_names(g, last)}, {result} = Scan <num_scan_inputs: int = 2, body: graph = causal_chunk_body (
        {state_names(g, "before")}, chunk_rows, query_start
    ) => ({state_names(g, "after")}, chunk_output) {{
        {_query_chunk(g, "chunk_rows")}
        key_start = Add (query_start, offset)
        key_unclipped = Add (key_start, causal_chunk)
        key_stop = Min (key_unclipped, key_length)
        {_key_chunk(g, masked, "key_start", "key_stop")}
        keys_transposed = Transpose <perm: ints = [0, 2, 1]> (keys)
        products = MatMul (queries, keys_transposed)
        visible = Slice (triangle, zero, keys_length, one)
        products_visible = Mul (products, visible)
        {_causal_stabilised() if stabilised else "weights = Identity (products_visible)"}
        numerator_within = MatMul (weights, values)
        denominator_within = MatMul (weights, {"mask_column" if masked else "ones_column"})
        numerator_before = MatMul (queries, before_state)
        before_normaliser_column = Reshape (before_normaliser, normaliser_column_shape)
        denominator_before = MatMul (queries, before_normaliser_column)
        {_decay_before() if stabilised else _PLAIN_BEFORE}
        numerator = Add (numerator_decayed, numerator_within)
        denominator = Add (denominator_decayed, denominator_within)
        {_divide(g)}
        {_add_to_state(g, masked)}
    }}> ({state_names(g, first)}, query_rows, query_starts)
    """


_PLAIN_BEFORE = """
        numerator_decayed = Identity (numerator_before)
        denominator_decayed = Identity (denominator_before)
"""


def _query_chunk(g: AttentionGeometry, rows: str) -> str:
    """Define ``queries [kv_heads, groups * chunk, features]``."""
    return f"""
        query_chunk = Gather <axis: int = 0> (query_sequence, {rows})
        {elementwise(form_of(g), "query_chunk", "query_mapped")}
        {split_queries(g, "query_mapped", "query_heads")}
        {query_map(g, "query_heads", "query_features", grouped=g.num_heads != g.kv_heads)}
        {fold_groups(g, "query_features", "queries", form_of(g).features(g.head_dim))}
    """


def _key_chunk(g: AttentionGeometry, masked: bool, start: str, stop: str) -> str:
    """Define ``keys [kv_heads, n, features]``, ``values [kv_heads, n, head_dim]`` with zeros for hidden ones,
    ``keys_length [1]``, and ``mask_row`` and ``mask_column`` (or ``ones_...``), ``[1, n]`` and ``[n, 1]``.
    """
    mask = """
        mask_chunk = Slice (mask_sequence, start_1d, stop_1d, zero)
        mask_row = Unsqueeze (mask_chunk, zero)
        mask_column = Unsqueeze (mask_chunk, one)
        value_visible = Mul (value_chunk, mask_column)
    """
    ones = """
        ones_row_shape = Concat <axis: int = 0> (one, keys_length)
        ones_row = Expand (float_one, ones_row_shape)
        ones_column_shape = Concat <axis: int = 0> (keys_length, one)
        ones_column = Expand (float_one, ones_column_shape)
        value_visible = Identity (value_chunk)
    """
    return f"""
        start_1d = Unsqueeze ({start}, zero)
        stop_1d = Unsqueeze ({stop}, zero)
        keys_length = Sub (stop_1d, start_1d)
        key_chunk = Slice (key_sequence, start_1d, stop_1d, zero)
        value_chunk = Slice (value_sequence, start_1d, stop_1d, zero)
        {mask if masked else ones}
        {elementwise(form_of(g), "key_chunk", "key_mapped")}
        {split_keys("key_mapped", "key_heads")}
        {key_map(g, "key_heads", "keys")}
        {_hide_exponents(masked) if form_of(g).has_stabiliser else ""}
        {split_keys("value_visible", "values")}
    """


def _hide_exponents(masked: bool) -> str:
    if not masked:
        return "exponents = Identity (keys_exponent)"
    return """
        mask_bool = Cast <to: int = 9> (mask_column)
        exponents = Where (mask_bool, keys_exponent, no_exponent)
    """


def _add_to_state(g: AttentionGeometry, masked: bool) -> str:
    """Define ``after_*`` from ``before_*`` and the chunk's keys and values."""
    row = "mask_row" if masked else "ones_row"
    transposed = "added_keys = Transpose <perm: ints = [0, 2, 1]> (keys)"
    if not form_of(g).has_stabiliser:
        return f"""
        {transposed}
        added_state = MatMul (added_keys, values)
        after_state = Add (before_state, added_state)
        {_sum_of_features(g, row)}
        after_normaliser = Add (before_normaliser, added_normaliser)
        """
    return f"""
        {transposed}
        chunk_largest = ReduceMax <keepdims: int = 1> (exponents, one)
        after_stabiliser = Max (before_stabiliser, chunk_largest)
        kept_exponent = Sub (before_stabiliser, after_stabiliser)
        kept = Exp (kept_exponent)
        added_exponents = Sub (exponents, after_stabiliser)
        added_factors = Exp (added_exponents)
        added_values = Mul (values, added_factors)
        added_state = MatMul (added_keys, added_values)
        kept_state = Mul (before_state, kept)
        after_state = Add (kept_state, added_state)
        factors_row = Reshape (added_factors, normaliser_row_shape)
        factors_visible = Mul (factors_row, {row})
        added_normaliser = MatMul (factors_visible, keys)
        kept_normaliser = Mul (before_normaliser, kept)
        after_normaliser = Add (kept_normaliser, added_normaliser)
    """


def _sum_of_features(g: AttentionGeometry, row: str) -> str:
    """Define ``added_normaliser``; elementwise maps are summed before their heads are split, which spares a copy."""
    if not isinstance(g.form, Linear):
        return f"added_normaliser = MatMul ({row}, keys)"
    return f"""
        added_packed = MatMul ({row}, key_mapped)
        added_normaliser = Reshape (added_packed, normaliser_row_shape)
    """


def _causal_stabilised() -> str:
    """Define ``weights``: products times the keys' exponentials, relative to the largest that the row sees itself."""
    return """
        exponents_row = Reshape (exponents, normaliser_row_shape)
        visible_bool = Cast <to: int = 9> (visible)
        exponents_seen = Where (visible_bool, exponents_row, no_exponent)
        largest_within = ReduceMax <keepdims: int = 1> (exponents_seen, last_axis)
        largest_seen = Max (largest_within, before_stabiliser)
        exponents_relative = Sub (exponents_seen, largest_seen)
        decay = Exp (exponents_relative)
        weights = Mul (products_visible, decay)
    """


def _decay_before() -> str:
    return """
        decay_exponent = Sub (before_stabiliser, largest_seen)
        decay_before = Exp (decay_exponent)
        numerator_decayed = Mul (numerator_before, decay_before)
        denominator_decayed = Mul (denominator_before, decay_before)
    """


def _divide(g: AttentionGeometry) -> str:
    """Define ``chunk_output [chunk, ..., head_dim]``, heads between; a denominator of zero has zeros above it."""
    return f"""
        denominator_positive = Clip (denominator, smallest)
        attended = Div (numerator, denominator_positive)
        {rows_by_token(g, "attended", "chunk_output")}
    """
