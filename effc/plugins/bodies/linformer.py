"""The ONNX function body of ``effc::LinformerAttention``.

A graph cannot refuse an input in words: with more keys than the projections have columns, the sizes of projection and
mask, or of projection and keys, do not match, and the run fails there instead of giving a wrong result.
"""

from __future__ import annotations

from effc.errors import PreconditionError
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.few_keys import HIDDEN, attend_to_few
from effc.plugins.bodies.sequence_rows import each_sequence, literal, row_constants, split_keys
from effc.plugins.forms.low_rank import Linformer
from effc.plugins.operator import KEY_MASK, AttentionGeometry


@body_text.register
def _(form: Linformer, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    if geometry.causal:
        form.refuse_causal()
    for name in form.extra_inputs:
        if name not in given:
            raise PreconditionError(
                f"An operator of '{form}' lacks its input '{name}'.", "Give it the layer's parameter of that name."
            )
    masked = KEY_MASK in given
    inputs = {"query_sequence": "query", "key_sequence": "key", "value_sequence": "value"}
    if masked:
        inputs["mask_sequence"] = "mask_float"
    steps = f"""
        {_project("key", masked)}
        key_mass_float = Cast <to: int = 1> (key_covered)
        sees_any = ReduceMax <keepdims: int = 1> (key_mass_float, zero)
        {split_keys("key_projected", "key_heads")}
        few_keys_unscaled = Transpose <perm: ints = [0, 2, 1]> (key_heads)
        few_keys_transposed = Mul (few_keys_unscaled, scale)
        few_bias_column = Where (key_covered, float_zero, hidden)
        few_bias = Transpose <perm: ints = [1, 0]> (few_bias_column)
        {_project("value", masked)}
        value_seen = Mul (value_projected, sees_any)
        {split_keys("value_seen", "few_values")}
        {attend_to_few(geometry, form.projected, False, "sequence_output")}
    """
    return f"""
    {row_constants(geometry)}
    scale = Constant <value: tensor = float {{{literal(geometry.scale)}}}> ()
    hidden = Constant <value: tensor = float {{{HIDDEN}}}> ()
    {_columns("key")}
    {_columns("value")}
    {"mask_float = Cast <to: int = 1> (key_mask)" if masked else ""}
    {each_sequence(inputs, steps, "output")}
    """


def _columns(name: str) -> str:
    """Define the columns of a projection that the input has, and the absolute sums of its whole rows."""
    return f"""
    {name}_absolute = Abs ({name}_projection)
    {name}_whole = ReduceSum <keepdims: int = 1> ({name}_absolute, one)
    {name}_columns = Slice ({name}_projection, zero, key_length_1d, one)
    """


def _project(name: str, masked: bool) -> str:
    """Define ``{name}_projected [projected, width]`` and ``{name}_covered [projected, 1]``, True with visible keys."""
    return f"""
        {name}_kept = {f"Mul ({name}_columns, mask_sequence)" if masked else f"Identity ({name}_columns)"}
        {name}_kept_absolute = Abs ({name}_kept)
        {name}_mass = ReduceSum <keepdims: int = 1> ({name}_kept_absolute, one)
        {name}_covered = Greater ({name}_mass, float_zero)
        {name}_divisor = Where ({name}_covered, {name}_mass, float_one)
        {name}_factor = Div ({name}_whole, {name}_divisor)
        {name}_sums = MatMul ({name}_kept, {name}_sequence)
        {name}_projected = Mul ({name}_sums, {name}_factor)
    """
