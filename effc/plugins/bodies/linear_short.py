"""Linear attention of short texts, the whole batch at once, as ONNX statements.

Where all pairs are few, computing them costs less than the loops over sequences and chunks. The arithmetic is the
definition's.
"""

from __future__ import annotations

from effc.plugins.bodies.linear_chunks import form_of
from effc.plugins.bodies.linear_maps import elementwise, key_map, query_map
from effc.plugins.operator import AttentionGeometry

SHORT = 128
"""Keys up to which all pairs are computed. Measured there at 12 heads x 64: about half the time of the loops."""


def all_pairs(g: AttentionGeometry, masked: bool, result: str) -> str:
    """Define ``result [batch, query_length, heads * head_dim]``; uses ``offset``, the first query's position."""
    form, heads, kv, dim = form_of(g), g.num_heads, g.kv_heads, g.head_dim
    features = form.features(dim)
    visible = (_causal(heads // kv) if g.causal else "") + (_MASK if masked else "") + _visible(g.causal, masked)
    weights = "short_products"
    text = f"""
        short_queries_by_token = Constant <value_ints: ints = [0, -1, {heads}, {dim}]> ()
        short_keys_by_token = Constant <value_ints: ints = [0, -1, {kv}, {dim}]> ()
        {elementwise(form, "query", "short_query_mapped")}
        short_query_split = Reshape (short_query_mapped, short_queries_by_token)
        short_query_heads = Transpose <perm: ints = [0, 2, 1, 3]> (short_query_split)
        {query_map(g, "short_query_heads", "short_queries", grouped=False)}
        short_folded_shape = Constant <value_ints: ints = [0, {kv}, -1, {features}]> ()
        short_queries_folded = Reshape (short_queries, short_folded_shape)
        {elementwise(form, "key", "short_key_mapped")}
        short_key_split = Reshape (short_key_mapped, short_keys_by_token)
        short_key_heads = Transpose <perm: ints = [0, 2, 1, 3]> (short_key_split)
        {key_map(g, "short_key_heads", "short_keys")}
        short_value_split = Reshape (value, short_keys_by_token)
        short_values = Transpose <perm: ints = [0, 2, 1, 3]> (short_value_split)
        short_keys_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (short_keys)
        short_products = MatMul (short_queries_folded, short_keys_transposed)
        {visible}
    """
    if visible:
        weights = "short_products_visible"
        text += f"""
        short_visible_float = Cast <to: int = 1> (short_visible)
        {weights} = Mul (short_products, short_visible_float)
        """
    if form.has_stabiliser:
        text += _stabilised(weights, bool(visible))
        weights = "short_weights"
    return f"""{text}
        short_numerator = MatMul ({weights}, short_values)
        short_denominator = ReduceSum <keepdims: int = 1> ({weights}, last_axis)
        short_positive = Clip (short_denominator, smallest)
        short_attended = Div (short_numerator, short_positive)
        short_unfolded_shape = Constant <value_ints: ints = [0, {heads}, -1, {dim}]> ()
        short_unfolded = Reshape (short_attended, short_unfolded_shape)
        short_by_token = Transpose <perm: ints = [0, 2, 1, 3]> (short_unfolded)
        {result} = Reshape (short_by_token, joined_shape)
    """


def _causal(groups: int) -> str:
    return f"""
        short_query_places = Range (n0, query_length, n1)
        short_positions = Add (short_query_places, offset)
        short_repeats = Constant <value_ints: ints = [{groups}]> ()
        short_positions_folded = Tile (short_positions, short_repeats)
        short_position_column = Unsqueeze (short_positions_folded, one)
        short_key_places = Range (n0, key_length, n1)
        short_not_behind = LessOrEqual (short_key_places, short_position_column)
    """


_MASK = """
        short_mask_axes = Constant <value_ints: ints = [1, 2]> ()
        short_mask = Unsqueeze (key_mask, short_mask_axes)
"""


def _visible(causal: bool, masked: bool) -> str:
    if causal and masked:
        return "short_visible = And (short_mask, short_not_behind)"
    if causal or masked:
        return f"short_visible = Identity ({'short_not_behind' if causal else 'short_mask'})"
    return ""


def _stabilised(weights: str, hides: bool) -> str:
    """Define ``short_weights``: each row relative to the largest exponent that it sees."""
    seen = (
        "short_exponents_seen = Where (short_visible, short_exponents, no_exponent)"
        if hides
        else "short_exponents_seen = Identity (short_exponents)"
    )
    return f"""
        short_exponents = Transpose <perm: ints = [0, 1, 3, 2]> (short_keys_exponent)
        {seen}
        short_largest = ReduceMax <keepdims: int = 1> (short_exponents_seen, last_axis)
        short_relative = Sub (short_exponents_seen, short_largest)
        short_decay = Exp (short_relative)
        short_weights = Mul ({weights}, short_decay)
    """
