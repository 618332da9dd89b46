"""Feature maps of linear attention as ONNX statements."""

from __future__ import annotations

from effc.errors import PreconditionError
from effc.plugins.bodies.sequence_rows import literal
from effc.plugins.forms.linear import Hedgehog, Linear, LinearForm, Performer
from effc.plugins.operator import AttentionGeometry


def check_given(form: LinearForm, given: frozenset[str]) -> None:
    """Make sure that a node has the form's parameters.

    Raises:
        PreconditionError: naming one that it has not.
    """
    for name in form.extra_inputs:
        if name not in given:
            raise PreconditionError(
                f"An operator of '{form}' lacks its input '{name}'.", "Give it the layer's parameter of that name."
            )


def map_constants(g: AttentionGeometry) -> str:
    """What :func:`query_map` and :func:`key_map` share over all chunks."""
    form = g.form
    if isinstance(form, Performer):
        return f"""
        root_of_scale = Constant <value: tensor = float {{{literal(g.scale**0.5)}}}> ()
        half_scale = Constant <value: tensor = float {{{literal(g.scale / 2)}}}> ()
        features_scaled = Mul (features, root_of_scale)
        projection = Transpose <perm: ints = [1, 0]> (features_scaled)
        """
    if isinstance(form, Hedgehog) and g.num_heads != g.kv_heads:
        groups = g.num_heads // g.kv_heads
        return f"""
        query_map_shape = Constant <value_ints: ints = [{g.kv_heads}, {groups}, {g.head_dim}, {g.head_dim}]> ()
        query_map_grouped = Reshape (query_map, query_map_shape)
        """
    return ""


def elementwise(form: LinearForm, source: str, target: str) -> str:
    """The part of the map that looks at single numbers, before heads are split."""
    if not isinstance(form, Linear):
        return f"{target} = Identity ({source})"
    if form.map == "relu":
        return f"{target} = Relu ({source})"
    # Elu(x) + 1 would lose the digits of exp(x) far below zero. Sub runs on all threads where Min does not.
    return f"""
        {target}_positive = Relu ({source})
        {target}_negative = Sub ({source}, {target}_positive)
        {target}_exponential = Exp ({target}_negative)
        {target} = Add ({target}_positive, {target}_exponential)
    """


def query_map(g: AttentionGeometry, source: str, target: str, grouped: bool) -> str:
    """The rest of the map, for queries ``[..., heads, n, head_dim]``, or ``[kv_heads, groups, n, head_dim]``."""
    if isinstance(g.form, Performer):
        return f"""
        {target}_exponent = MatMul ({source}, projection)
        {target}_largest = ReduceMax <keepdims: int = 1> ({target}_exponent, last_axis)
        {target}_relative = Sub ({target}_exponent, {target}_largest)
        {target} = Exp ({target}_relative)
        """
    if isinstance(g.form, Hedgehog):
        return _both_signs(source, "query_map_grouped" if grouped else "query_map", target)
    return f"{target} = Identity ({source})"


def key_map(g: AttentionGeometry, source: str, target: str) -> str:
    """The rest of the map, for keys ``[..., kv_heads, n, head_dim]``.

    A form with a stabiliser also gives ``{target}_exponent [..., kv_heads, n, 1]``: the features are to be multiplied
    by its exponential.
    """
    if isinstance(g.form, Performer):
        return f"""
        {target}_projected = MatMul ({source}, projection)
        {target}_largest = ReduceMax <keepdims: int = 1> ({target}_projected, last_axis)
        {target}_relative = Sub ({target}_projected, {target}_largest)
        {target} = Exp ({target}_relative)
        {target}_squares = ReduceSumSquare <keepdims: int = 1> ({source}, last_axis)
        {target}_half_norm = Mul ({target}_squares, half_scale)
        {target}_exponent = Sub ({target}_largest, {target}_half_norm)
        """
    if isinstance(g.form, Hedgehog):
        return _both_signs(source, "key_map", target)
    return f"{target} = Identity ({source})"


def _both_signs(source: str, matrix: str, target: str) -> str:
    return f"""
        {target}_projected = MatMul ({source}, {matrix})
        {target}_negated = Neg ({target}_projected)
        {target}_both = Concat <axis: int = -1> ({target}_projected, {target}_negated)
        {target} = Softmax <axis: int = -1> ({target}_both)
    """
