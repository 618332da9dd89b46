"""The ONNX function body of ``effc::ChunkedAttention``.

A ``Scan`` walks over units of queries that see the same keys (a chunk, or for the gate half of one), which are
gathered once per unit; an inner ``Scan`` walks over tiles of its queries whose scores stay in cache. The gate is one
softmax over the three half chunks that either chunking sees: keys of both chunks weigh ``1 + exp(gate)``, those of A
alone ``exp(gate)``, those of B alone 1. Few queries, or a sequence within one unit, take a branch without units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from effc.plugins.bodies.chunked_direct import attend_direct, attend_global_rows
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.preamble import attend_piece, float_text, preamble
from effc.plugins.forms.chunked import Chunked
from effc.plugins.operator import AttentionGeometry

# Scores of one tile, in bytes, that stay in a core's second-level cache.
_TILE_BYTES = 2 << 20
# Up to so many queries are attended without units: decoding computes one row, not a whole chunk of them.
_FEW = 32


@dataclass(frozen=True)
class _Units:
    """How queries are cut: ``unit`` of them, the first at ``-shift``, see ``width`` keys from ``before`` in front."""

    unit: int
    shift: int
    before: int
    width: int
    tile: int
    together: int

    @property
    def tiles(self) -> int:
        return self.unit // self.tile


@body_text.register
def _(form: Chunked, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    g, tokens = geometry, form.tokens
    gated = "gate" in given and form.merge == "gate"
    half, groups = form.size // 2, g.num_heads // g.kv_heads
    if form.merge == "gate":
        runs = {"gate": _units(g, half, 0, half, (2 if g.causal else 3) * half, tokens)}
    else:
        runs = {f"by{shift}": _units(g, form.size, shift, 0, form.size, tokens) for shift in form.shifts}
    smallest = form.size if form.merge == "concat" else half
    averaged = form.merge == "add"
    tiled = "\n".join(_attend_units(g, form, name, units, gated) for name, units in runs.items())
    results = [f"{name}_attended" for name in runs]
    merge = (
        f"tiled_sum = Add ({', '.join(results)})\n tiled_output = Mul (tiled_sum, one_half)"
        if averaged
        else (f"tiled_output = Identity ({results[0]})")
    )
    return f"""
    {preamble(g)}
    one_half = Constant <value: tensor = float {{0.5}}> ()
    size = Constant <value: tensor = int64 {{{form.size}}}> ()
    half_size = Constant <value: tensor = int64 {{{half}}}> ()
    tokens = Constant <value: tensor = int64 {{{tokens}}}> ()
    few = Constant <value: tensor = int64 {{{_FEW}}}> ()
    smallest = Constant <value: tensor = int64 {{{smallest}}}> ()
    last_key = Sub (key_length, n1)
    packed_shape = Constant <value_ints: ints = [0, -1, {g.num_heads * g.head_dim}]> ()
    query_heads_shape = Constant <value_ints: ints = [0, -1, {g.kv_heads}, {groups}, {g.head_dim}]> ()
    {_gate_weights(g, gated) if form.merge == "gate" else ""}
    few_queries = LessOrEqual (query_length, few)
    within_one_unit = LessOrEqual (key_length, smallest)
    takes_direct = Or (few_queries, within_one_unit)
    {"chunked_output" if tokens else "output"} = If (takes_direct) <then_branch: graph = direct () => (direct_output) {{
        {attend_direct(g, form, gated)}
    }}, else_branch: graph = tiled () => (tiled_output) {{
        key_split = Reshape (key, kv_shape)
        value_split = Reshape (value, kv_shape)
        key_heads = Transpose <perm: ints = [0, 2, 1, 3]> (key_split)
        value_heads = Transpose <perm: ints = [0, 2, 1, 3]> (value_split)
        {tiled}
        {merge}
    }}>
    {attend_global_rows(g) if tokens else ""}
    """


def _units(g: AttentionGeometry, unit: int, shift: int, before: int, width: int, tokens: int) -> _Units:
    budget = max(1, _TILE_BYTES // (4 * g.num_heads * (width + tokens)))
    tile = max(size for size in range(1, min(unit, max(budget, 32)) + 1) if unit % size == 0)
    # A prime unit has no tiles worth having.
    tile = tile if tile >= 16 or unit < 16 else unit
    return _Units(unit, shift, before, width, tile, max(1, budget // unit) if tile == unit else 1)


def _gate_weights(g: AttentionGeometry, gated: bool) -> str:
    """Biases of keys that are in chunk A alone and in both chunks; in B alone it is zero.

    With a gate they are ``[kv_heads, 1, groups, 1, 1]``, to be added to scores.
    """
    if not gated:
        return f"""
    a_bias = Constant <value: tensor = float {{0.0}}> ()
    both_bias = Constant <value: tensor = float {{{float_text(float(np.log(2)))}}}> ()
    """
    return f"""
    gate_shape = Constant <value_ints: ints = [{g.kv_heads}, 1, {g.num_heads // g.kv_heads}, 1, 1]> ()
    a_bias = Reshape (gate, gate_shape)
    both_bias = Softplus (a_bias)
    """


def _attend_units(g: AttentionGeometry, form: Chunked, name: str, units: _Units, gated: bool) -> str:
    """Every query to the keys of its unit and to the global tokens: ``<name>_attended``, packed like ``query``."""
    kv, dim, heads = g.kv_heads, g.head_dim, g.num_heads
    groups = heads // kv
    u = units
    span = u.unit * u.together
    text = f"""
        unit = Constant <value: tensor = int64 {{{u.unit}}}> ()
        shift = Constant <value: tensor = int64 {{{u.shift}}}> ()
        before = Constant <value: tensor = int64 {{{u.before}}}> ()
        width = Constant <value: tensor = int64 {{{u.width}}}> ()
        span = Constant <value: tensor = int64 {{{span}}}> ()
        span_less_one = Constant <value: tensor = int64 {{{span - 1}}}> ()
        shifted_offset = Add (offset, shift)
        head = Mod (shifted_offset, unit)
        first_position = Sub (offset, head)
        query_end = Add (query_length, head)
        query_rounded = Add (query_end, span_less_one)
        spans = Div (query_rounded, span)
        padded_length = Mul (spans, span)
        tail = Sub (padded_length, query_end)
        head_1d = Unsqueeze (head, zero)
        tail_1d = Unsqueeze (tail, zero)
        pads = Concat <axis: int = 0> (zero, head_1d, zero, zero, tail_1d, zero)
        query_padded = Pad (query, pads)
        query_shape = Constant <
            value_ints: ints = [0, -1, {u.together}, {u.tiles}, {u.tile}, {kv}, {groups}, {dim}]
        > ()
        query_split = Reshape (query_padded, query_shape)
        query_by_span = Transpose <perm: ints = [1, 3, 0, 5, 2, 6, 4, 7]> (query_split)
        starts_from_zero = Range (n0, padded_length, unit)
        starts = Add (starts_from_zero, first_position)
        starts_shape = Constant <value_ints: ints = [-1, {u.together}, 1]> ()
        starts_by_span = Reshape (starts, starts_shape)
        row_offsets_from_zero = Range (n0, width, n1)
        row_offsets = Sub (row_offsets_from_zero, before)
        {_causal_table(u, form.tokens) if g.causal else ""}
        {_weight_table(u, form, g.causal, gated) if form.merge == "gate" else ""}
        {_GLOBAL_ROWS if form.tokens else ""}
        output_by_span = Scan <num_scan_inputs: int = 2, body: graph = span_body (
            span_query, span_starts
        ) => (span_output) {{
            positions = Add (span_starts, row_offsets)
            clipped_low = Max (positions, n0)
            chunk_rows = Min (clipped_low, last_key)
            in_sequence = Equal (chunk_rows, positions)
            {_with_global_rows() if form.tokens else "rows = Identity (chunk_rows)"}
            {"" if form.tokens else "inside = Identity (in_sequence)"}
            rows_bias = Gather <axis: int = 1> (mask_bias, rows)
            seen_bias = Where (inside, rows_bias, hidden_bias)
            bias_shape = Constant <value_ints: ints = [0, 1, {u.together}, 1, 1, {u.width + form.tokens}]> ()
            {"mask_by_unit" if form.merge == "gate" else "unit_bias"} = Reshape (seen_bias, bias_shape)
            {_unit_weights(u, gated) if form.merge == "gate" else ""}
            keys = Gather <axis: int = 2> (key_heads, rows)
            values = Gather <axis: int = 2> (value_heads, rows)
            keys_transposed = Transpose <perm: ints = [0, 1, 2, 4, 3]> (keys)
            span_output = Scan <num_scan_inputs: int = {2 if g.causal else 1}, body: graph = tile_body (
                tile_query{", tile_causal" if g.causal else ""}
            ) => (tile_output) {{
                bias = {"Add (unit_bias, tile_causal)" if g.causal else "Identity (unit_bias)"}
                {attend_piece(g, "tile_query", u.together, u.tile)}
                tile_output = Transpose <perm: ints = [0, 2, 4, 1, 3, 5]> (zeroed)
            }}> (span_query{", causal_table" if g.causal else ""})
        }}> (query_by_span, starts_by_span)
        by_token = Transpose <perm: ints = [2, 0, 3, 1, 4, 5, 6, 7]> (output_by_span)
        joined = Reshape (by_token, packed_shape)
        query_end_1d = Unsqueeze (query_end, zero)
        attended = Slice (joined, head_1d, query_end_1d, one)
    """
    return _prefixed(text, name)


def _prefixed(text: str, name: str) -> str:
    """The values that the statements define renamed, so that they can stand in a graph more than once."""
    defined = set(re.findall(r"^\s*(\w+) = ", text, re.MULTILINE))
    inner = set(re.findall(r"graph = (\w+)", text)) | set(re.findall(r"(?:span|tile)_(?:query|starts|causal)\b", text))
    pattern = re.compile(r"\b(" + "|".join(sorted(defined | inner, key=len, reverse=True)) + r")\b(?!:)")
    return pattern.sub(lambda match: f"{name}_{match[1]}", text)


_GLOBAL_ROWS = """
        global_positions = Range (n0, tokens, n1)
        global_clipped = Min (global_positions, last_key)
        global_inside = LessOrEqual (global_positions, last_key)
"""


def _with_global_rows() -> str:
    """Global tokens come first and once: inside a chunk they are hidden."""
    return """
            rows_shape = Shape (positions)
            unit_count = Slice (rows_shape, zero, one)
            token_count = Shape (global_clipped)
            global_shape = Concat <axis: int = 0> (unit_count, token_count)
            global_rows = Expand (global_clipped, global_shape)
            global_seen = Expand (global_inside, global_shape)
            behind_tokens = GreaterOrEqual (positions, tokens)
            not_global = And (in_sequence, behind_tokens)
            rows = Concat <axis: int = 1> (global_rows, chunk_rows)
            inside = Concat <axis: int = 1> (global_seen, not_global)
    """


def _causal_table(u: _Units, tokens: int) -> str:
    """What hides keys behind the query, ``[tiles, tile, tokens + width]``; global rows are computed elsewhere."""
    return f"""
        unit_rows = Range (n0, unit, n1)
        unit_column = Unsqueeze (unit_rows, one)
        not_behind = LessOrEqual (row_offsets, unit_column)
        chunk_table = Where (not_behind, visible_bias, hidden_bias)
        table_pads = Constant <value_ints: ints = [0, {tokens}, 0, 0]> ()
        unit_table = Pad (chunk_table, table_pads)
        table_shape = Constant <value_ints: ints = [{u.tiles}, {u.tile}, {tokens + u.width}]> ()
        causal_table = Reshape (unit_table, table_shape)
    """


def _weight_table(u: _Units, form: Chunked, causal: bool, gated: bool) -> str:
    """Biases of the columns: global tokens, the half chunk before, the query's own, the one behind.

    Even half chunks are the first of their chunk A, so that the half before them is of B alone; odd ones the reverse.
    """
    ones = f"""
        own_columns = Constant <value_ints: ints = [{u.unit}]> ()
        token_columns = Constant <value_ints: ints = [{form.tokens}]> ()
    """
    shape = "Concat <axis: int = 0> (gate_dims, {})" if gated else "Identity ({})"
    dims = "gate_dims = Shape <start: int = 0, end: int = 4> (a_bias)\n" if gated else ""
    behind = "" if causal else ", {}_columns"
    return f"""
        {ones}
        {dims}
        own_shape = {shape.format("own_columns")}
        tokens_shape = {shape.format("token_columns")}
        a_columns = Expand (a_bias, own_shape)
        b_columns = Expand (visible_bias, own_shape)
        both_columns = Expand (both_bias, own_shape)
        global_columns = Expand (both_bias, tokens_shape)
        even_weights = Concat <axis: int = -1> (global_columns, b_columns, both_columns{behind.format("a")})
        odd_weights = Concat <axis: int = -1> (global_columns, a_columns, both_columns{behind.format("b")})
    """


def _unit_weights(u: _Units, gated: bool) -> str:
    return f"""
            unit_number = Div (span_starts, unit)
            modulus = Constant <value: tensor = int64 {{2}}> ()
            parity = Mod (unit_number, modulus)
            parity_shape = Constant <value_ints: ints = [{u.together}, 1, 1, 1]> ()
            parity_by_unit = Reshape (parity, parity_shape)
            is_odd = Equal (parity_by_unit, n1)
            weights_by_unit = Where (is_odd, odd_weights, even_weights)
            unit_bias = Add (mask_by_unit, weights_by_unit)
    """
