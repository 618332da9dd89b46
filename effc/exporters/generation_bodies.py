"""The ONNX function body of ``effc::CachedAttention``: attention of one new token to a cache and to itself.

A runtime with effc's native library uses the kernel instead, which reads INT8 and fp16 caches as they are.

One query row against ``slots`` cached keys is a matrix-vector product for every key/value head, bound by reading the
cache once. So that nothing of the cache is ever copied, the new token's key and value do not enter it here: the scores
against the cache and the one score against the new key are joined, which is a few numbers, and the softmax over both is
taken apart again for the two sums over values. The caller writes the new key and value into their slot afterwards.

Inputs: ``query [batch, 1, heads * head_dim]``, ``key`` and ``value [batch, 1, kv_heads * head_dim]``, ``past_key`` and
``past_value [batch, kv_heads, slots, head_dim]`` in fp32, fp16 or INT8, ``bias [batch, 1, 1, slots + 1]`` (0 where the
query sees a slot and, last, itself; -1e30 elsewhere), for an INT8 cache ``past_key_scale`` and ``past_value_scale
[batch, kv_heads, slots, 1]``, and for models with a position bias ``distance [slots + 1]`` (slot's position less the
query's) with ``distance_bias`` or ``distance_slope``. Attributes: those of effc's other operators. Output:
``[batch, 1, heads * head_dim]``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.plugins.bodies.linear_state import recurrent_text, step_text
from effc.plugins.caches import CACHED_ATTENTION, sees_itself
from effc.plugins.function_body import ATTRIBUTES
from effc.plugins.function_text import parse_function
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import Pattern

RECURRENT_ATTENTION = "RecurrentAttention"
HIDDEN = -1e30
DISTANCE_INPUTS = ("distance_bias", "distance_slope")
CACHED_INPUTS = (
    *("query", "key", "value", "past_key", "past_value", "bias"),
    *("past_key_scale", "past_value_scale", "distance", *DISTANCE_INPUTS),
)
"""Of ``effc::CachedAttention``, in order; those behind ``bias`` are optional."""


def cached_attention(geometry: AttentionGeometry, given: frozenset[str], kept_in: str = "fp32") -> ir.Function:
    """The function for one layer geometry.

    Args:
        geometry: of the layer's operator; its form is a pattern.
        given: which of ``distance_bias`` and ``distance_slope`` the operator has.
        kept_in: type of the cache, one of ``effc.plugins.caches.CACHE_TYPES``.
    """
    heads, kv, dim = geometry.num_heads, geometry.kv_heads, geometry.head_dim
    groups = heads // kv
    scale = np.format_float_positional(np.float32(geometry.scale), trim="0")
    distances = [name for name in DISTANCE_INPUTS if name in given]
    # A pattern such as `global:4` alone may leave a query without any key: such a row is zero by definition.
    guarded = not (isinstance(geometry.form, Pattern) and sees_itself(geometry.form))
    text = f"""
    minus_one = Constant <value_ints: ints = [-1]> ()
    zero = Constant <value_ints: ints = [0]> ()
    end = Constant <value_ints: ints = [9223372036854775807]> ()
    query_shape = Constant <value_ints: ints = [0, {kv}, {groups}, {dim}]> ()
    own_shape = Constant <value_ints: ints = [0, {kv}, 1, {dim}]> ()
    query_heads = Reshape (query, query_shape)
    own_key = Reshape (key, own_shape)
    own_value = Reshape (value, own_shape)
    {_FLOATS[kept_in]}
    stored_scores = com.microsoft.FusedMatMul <transB: int = 1, alpha: float = {scale}> (query_heads, key_floats)
    {_SCALED_SCORES if kept_in == "int8" else "past_scores = Identity (stored_scores)"}
    own_score = com.microsoft.FusedMatMul <transB: int = 1, alpha: float = {scale}> (query_heads, own_key)
    scores = Concat <axis: int = -1> (past_scores, own_score)
    biased = Add (scores, bias)
    {_distance_text(distances, kv, groups)}
    weights = Softmax <axis: int = -1> ({"placed" if distances else "biased"})
    past_weights = Slice (weights, zero, minus_one, minus_one)
    own_weight = Slice (weights, minus_one, end, minus_one)
    {_SCALED_WEIGHTS if kept_in == "int8" else "stored_weights = Identity (past_weights)"}
    past_sum = MatMul (stored_weights, value_floats)
    own_sum = Mul (own_weight, own_value)
    attended = Add (past_sum, own_sum)
    {_GUARD if guarded else ""}
    packed_shape = Constant <value_ints: ints = [0, 1, {heads * dim}]> ()
    output = Reshape ({"guarded" if guarded else "attended"}, packed_shape)
    """
    named = {*CACHED_INPUTS[:6], *(CACHED_INPUTS[6:8] if kept_in == "int8" else ()), *distances}
    named |= {"distance"} if distances else set()
    # An input that the node leaves out still has its place; the body does not use it.
    inputs = [name if name in named else f"no_{name}" for name in CACHED_INPUTS]
    while inputs[-1].startswith("no_"):
        inputs.pop()
    overload = "_".join([f"h{heads}_kv{kv}_d{dim}_s{scale.replace('.', 'p')}", *distances, *(["guarded"] * guarded)])
    overload += "" if kept_in == "fp32" else f"_{kept_in}"
    return parse_function(CACHED_ATTENTION, overload, inputs, ["output"], text, attributes=ATTRIBUTES)


_CASTS = """
    key_floats = Cast <to: int = 1> (past_key)
    value_floats = Cast <to: int = 1> (past_value)
"""
_FLOATS = {
    "fp32": """
    key_floats = Identity (past_key)
    value_floats = Identity (past_value)
""",
    "fp16": _CASTS,
    "int8": _CASTS,
}
# A scale belongs to a whole key and a whole value, so that it can multiply one score and one weight instead.
_SCALED_SCORES = """
    key_scale_row = Transpose <perm: ints = [0, 1, 3, 2]> (past_key_scale)
    past_scores = Mul (stored_scores, key_scale_row)
"""
_SCALED_WEIGHTS = """
    value_scale_row = Transpose <perm: ints = [0, 1, 3, 2]> (past_value_scale)
    stored_weights = Mul (past_weights, value_scale_row)
"""

_GUARD = f"""
    seen_most = ReduceMax <keepdims: int = 1> (bias, minus_one)
    hidden_bound = Constant <value: tensor = float {{{HIDDEN / 2}}}> ()
    seen_any = Greater (seen_most, hidden_bound)
    seen_any_float = Cast <to: int = 1> (seen_any)
    guarded = Mul (attended, seen_any_float)
"""


def recurrent_attention(
    geometry: AttentionGeometry, given: list[str], states: list[str]
) -> tuple[ir.Function, ir.Function]:
    """``effc::RecurrentAttention`` of a linear form, for one token and for any number of them.

    Inputs: ``query``, ``key``, ``value`` of the new tokens, the optional inputs in ``given``, then ``past_*`` for each
    of ``states``. Outputs: ``output [batch, length, heads * head_dim]`` and ``present_*``.
    """
    inputs = ["query", "key", "value", *given, *(f"past_{name}" for name in states)]
    outputs = ["output", *(f"present_{name}" for name in states)]
    optional = frozenset(given)

    def function(kind: str, text: str) -> ir.Function:
        return parse_function(RECURRENT_ATTENTION, f"{kind}_{geometry.overload(optional)}", inputs, outputs, text)

    return function("step", step_text(geometry, optional)), function("chunked", recurrent_text(geometry, optional))


def _distance_text(distances: list[str], kv: int, groups: int) -> str:
    """Statements that add what the model adds to its scores by distance."""
    lines, total = [], "biased"
    if "distance_bias" in distances:
        lines.append("""
    table_width = Shape <start: int = 1, end: int = 2> (distance_bias)
    two = Constant <value_ints: ints = [2]> ()
    reach = Div (table_width, two)
    least = Neg (reach)
    not_below = Max (distance, least)
    clipped = Min (not_below, reach)
    column = Add (clipped, reach)
    table_rows = Gather <axis: int = 1> (distance_bias, column)""")
        lines.append(_per_head("table_rows", "table_bias", total, "tabled", kv, groups))
        total = "tabled"
    if "distance_slope" in distances:
        lines.append("""
    slope_column = Unsqueeze (distance_slope, minus_one)
    distance_float = Cast <to: int = 1> (distance)
    sloped_rows = Mul (slope_column, distance_float)""")
        lines.append(_per_head("sloped_rows", "slope_bias", total, "sloped", kv, groups))
        total = "sloped"
    if distances:
        lines.append(f"    placed = Identity ({total})")
    return "\n".join(lines)


def _per_head(rows: str, shaped: str, before: str, after: str, kv: int, groups: int) -> str:
    return f"""
    {shaped}_shape = Constant <value_ints: ints = [1, {kv}, {groups}, -1]> ()
    {shaped} = Reshape ({rows}, {shaped}_shape)
    {after} = Add ({before}, {shaped})"""
