"""Causal linear attention with its recurrent state as input and output, for generation, as ONNX statements.

Inputs besides those of :func:`effc.plugins.bodies.body_text`: ``past_state [batch, kv_heads, features, head_dim]``,
``past_normaliser [batch, kv_heads, features]`` and, for forms that have one, ``past_stabiliser [batch, kv_heads]``.
``query``, ``key``, ``value`` and ``key_mask`` hold the new tokens alone. Defined are ``output`` and ``present_*``.
Before the first token the state is zero and the stabiliser ``EMPTY_STABILISER``.
"""

from __future__ import annotations

from effc.plugins.bodies.linear_chunks import causal_chunks, constants, form_of, state_names
from effc.plugins.bodies.linear_maps import check_given, elementwise, key_map, query_map
from effc.plugins.operator import KEY_MASK, AttentionGeometry


def recurrent_text(g: AttentionGeometry, given: frozenset[str]) -> str:
    """Any number of new tokens, chunk by chunk: for prefill.

    Raises:
        PreconditionError: if the node lacks a parameter of the form.
    """
    check_given(form_of(g), given)
    masked = KEY_MASK in given
    states = list(form_of(g).state_shapes(g.kv_heads, g.head_dim))
    unpack = {
        "state": "first_state = Identity (row_state)",
        "normaliser": "first_normaliser = Unsqueeze (row_normaliser, one)",
        "stabiliser": """
        stabiliser_shape = Constant <value_ints: ints = [-1, 1, 1]> ()
        first_stabiliser = Reshape (row_stabiliser, stabiliser_shape)""",
    }
    pack = {
        "state": "packed_state = Identity (final_state)",
        "normaliser": "packed_normaliser = Squeeze (final_normaliser, one)",
        "stabiliser": """
        flat = Constant <value_ints: ints = [-1]> ()
        packed_stabiliser = Reshape (final_stabiliser, flat)""",
    }
    unpacked, packed = "\n".join(unpack[name] for name in states), "\n".join(pack[name] for name in states)
    return f"""
    {constants(g)}
    offset = Identity (n0)
    {"mask_float = Cast <to: int = 1> (key_mask)" if masked else ""}
    {state_names(g, "present")}, sequences = Scan <
        num_scan_inputs: int = {(4 if masked else 3) + len(states)}, body: graph = sequence (
            query_sequence, key_sequence, value_sequence, {"mask_sequence, " if masked else ""}{state_names(g, "row")}
        ) => ({state_names(g, "packed")}, sequence_output) {{
            {unpacked}
            {causal_chunks(g, masked, "first", "final", "sequence_output")}
            {packed}
        }}
    > (query, key, value, {"mask_float, " if masked else ""}{state_names(g, "past")})
    joined = Reshape (sequences, joined_shape)
    output = Slice (joined, zero, query_length_1d, one)
    """


def step_text(g: AttentionGeometry, given: frozenset[str]) -> str:
    """Exactly one new token: put it into the state, then read. For decode graphs.

    Raises:
        PreconditionError: if the node lacks a parameter of the form.
    """
    form = form_of(g)
    check_given(form, given)
    masked = KEY_MASK in given
    heads, kv, dim, features = g.num_heads, g.kv_heads, g.head_dim, form.features(g.head_dim)
    return f"""
    {constants(g)}
    {elementwise(form, "query", "query_mapped")}
    query_split_shape = Constant <value_ints: ints = [0, {heads}, 1, {dim}]> ()
    query_heads = Reshape (query_mapped, query_split_shape)
    {query_map(g, "query_heads", "queries_split", grouped=False)}
    queries_shape = Constant <value_ints: ints = [0, {kv}, {heads // kv}, {features}]> ()
    queries = Reshape (queries_split, queries_shape)
    {elementwise(form, "key", "key_mapped")}
    key_split_shape = Constant <value_ints: ints = [0, {kv}, 1, {dim}]> ()
    key_heads = Reshape (key_mapped, key_split_shape)
    {key_map(g, "key_heads", "keys")}
    values = Reshape (value, key_split_shape)
    {_stabilised_step(masked) if form.has_stabiliser else _plain_step(masked)}
    key_column_shape = Constant <value_ints: ints = [0, {kv}, {features}, 1]> ()
    key_columns = Reshape (keys_weighted, key_column_shape)
    added_state = Mul (key_columns, values)
    present_state = Add (kept_state, added_state)
    normaliser_shape = Constant <value_ints: ints = [0, {kv}, {features}]> ()
    added_normaliser = Reshape (keys_weighted, normaliser_shape)
    present_normaliser = Add (kept_normaliser, added_normaliser)
    numerator = MatMul (queries, present_state)
    normaliser_columns = Unsqueeze (present_normaliser, last_axis)
    denominator = MatMul (queries, normaliser_columns)
    denominator_positive = Clip (denominator, smallest)
    attended = Div (numerator, denominator_positive)
    output_shape = Constant <value_ints: ints = [0, 1, {heads * dim}]> ()
    output = Reshape (attended, output_shape)
    """


_MASK = """
    mask_float = Cast <to: int = 1> (key_mask)
    mask_axes = Constant <value_ints: ints = [2, 3]> ()
    mask_split = Unsqueeze (mask_float, mask_axes)
"""


def _plain_step(masked: bool) -> str:
    return f"""
    {_MASK if masked else ""}
    keys_weighted = {"Mul (keys, mask_split)" if masked else "Identity (keys)"}
    kept_state = Identity (past_state)
    kept_normaliser = Identity (past_normaliser)
    """


def _stabilised_step(masked: bool) -> str:
    hide = """
    mask_bool = Cast <to: int = 9> (mask_split)
    exponents = Where (mask_bool, keys_exponent, no_exponent)
    """
    return f"""
    {_MASK if masked else ""}
    {hide if masked else "exponents = Identity (keys_exponent)"}
    exponent_axes = Constant <value_ints: ints = [2, 3]> ()
    exponents_flat = Squeeze (exponents, exponent_axes)
    present_stabiliser = Max (past_stabiliser, exponents_flat)
    present_split = Unsqueeze (present_stabiliser, exponent_axes)
    added_exponents = Sub (exponents, present_split)
    added_factors = Exp (added_exponents)
    keys_scaled = Mul (keys, added_factors)
    keys_weighted = {"Mul (keys_scaled, mask_split)" if masked else "Identity (keys_scaled)"}
    kept_exponent = Sub (past_stabiliser, present_stabiliser)
    kept = Exp (kept_exponent)
    kept_column = Unsqueeze (kept, last_axis)
    kept_normaliser = Mul (past_normaliser, kept_column)
    kept_split = Unsqueeze (kept, exponent_axes)
    kept_state = Mul (past_state, kept_split)
    """
