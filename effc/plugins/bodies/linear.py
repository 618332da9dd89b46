"""The ONNX function body of ``effc::LinearAttention``: short texts at once, others chunk by chunk."""

from __future__ import annotations

from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.linear_chunks import (
    causal_chunks,
    constants,
    empty_state,
    gather_earlier_state,
    gather_state,
    read_state,
)
from effc.plugins.bodies.linear_maps import check_given
from effc.plugins.bodies.linear_short import SHORT, all_pairs
from effc.plugins.bodies.sequence_rows import each_sequence
from effc.plugins.forms.linear import LinearForm
from effc.plugins.operator import KEY_MASK, AttentionGeometry


@body_text.register
def _(form: LinearForm, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    check_given(form, given)
    masked = KEY_MASK in given
    steps = _causal(geometry, masked) if geometry.causal else _bidirectional(geometry, masked)
    inputs = {"query_sequence": "query", "key_sequence": "key", "value_sequence": "value"}
    if masked:
        inputs["mask_sequence"] = "mask_float"
    return f"""
    {constants(geometry)}
    {empty_state(geometry)}
    offset = Sub (key_length, query_length)
    {"mask_float = Cast <to: int = 1> (key_mask)" if masked else ""}
    short_length = Constant <value: tensor = int64 {{{SHORT}}}> ()
    is_short = LessOrEqual (key_length, short_length)
    output = If (is_short) <then_branch: graph = short () => (short_output) {{
        {all_pairs(geometry, masked, "short_output")}
    }}, else_branch: graph = long () => (long_output) {{
        {each_sequence(inputs, steps, "long_output")}
    }}>
    """


def _bidirectional(g: AttentionGeometry, masked: bool) -> str:
    return f"""
        {gather_state(g, masked, "whole", "key_length")}
        {read_state(g, "whole", "sequence_output")}
    """


def _causal(g: AttentionGeometry, masked: bool) -> str:
    return f"""
        {gather_earlier_state(g, masked, "earlier")}
        {causal_chunks(g, masked, "earlier", "final", "sequence_output")}
    """
