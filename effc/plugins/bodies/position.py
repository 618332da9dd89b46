"""The ONNX function body of ``effc::SparseAttention``: any union of position terms, in memory O(length).

Blocked form, as in Longformer's and BigBird's block-sparse attention: queries are cut into blocks, and a loop gathers
for each the keys it may see, so that scores stay in cache. See :mod:`effc.plugins.bodies.position_plan` for how a union
is cut into parts. The exact predicate takes over where queries are few or everything fits one block.
"""

from __future__ import annotations

from onnx import TensorProto

from effc.plugins.bodies.dense import dense_text
from effc.plugins.bodies.dispatch import body_text
from effc.plugins.bodies.position_block import Attended
from effc.plugins.bodies.position_classes import class_part
from effc.plugins.bodies.position_gathered import gathered
from effc.plugins.bodies.position_inputs import INPUTS, Inputs, read_inputs
from effc.plugins.bodies.position_plan import Plan, plan
from effc.plugins.bodies.position_rows import Predicate, attend_rows
from effc.plugins.bodies.position_slots import marked_positions
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import all_visible
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import Pattern

# Decoding steps, and prompts that are verified a few tokens at a time.
_FEW_QUERIES = 16
# Sequences no longer than a block's keys are computed as a whole, but not beyond this many keys.
_WHOLE_AT_LEAST, _WHOLE_AT_MOST = 128, 1024


@body_text.register
def _(form: Pattern, geometry: AttentionGeometry, given: frozenset[str]) -> str:
    if form.is_dense:
        return dense_text(geometry, given)
    parts = plan(form, geometry.causal, given)
    s = Statements()
    s.reserve(*INPUTS)
    inputs = read_inputs(s, geometry, given)
    per_block = parts.gathered.keys if parts.gathered is not None else 0
    whole = s("LessOrEqual", inputs.keys, min(max(per_block, _WHOLE_AT_LEAST), _WHOLE_AT_MOST))
    few = s("LessOrEqual", inputs.queries, _FEW_QUERIES)
    s.choose(
        s("Or", whole, few, to="is_short"),
        lambda branch: _whole(branch, inputs, parts),
        lambda branch: _in_parts(branch, inputs, parts),
        to="output",
    )
    return s.text()


def _whole(s: Statements, inputs: Inputs, parts: Plan) -> Value:
    places = s("Unsqueeze", s("Add", s.range(inputs.queries), inputs.offset), [0])
    return attend_rows(
        s,
        inputs,
        "query",
        s("Expand", places, s.shape(inputs.batch, inputs.queries)),
        _predicate(inputs, parts),
        side_by_side=True,
        bounded=parts.bounded,
        may_see_nothing=_may_see_nothing(inputs, parts),
    )


def _predicate(inputs: Inputs, parts: Plan) -> Predicate:
    def visible(s: Statements, query: Value, key: Value, marks: Value | None) -> Value | None:
        marked = None
        if marks is not None and parts.marked:
            # A query is a key, too: the marks of the queries are among those of the keys.
            marked = s("Or", marks, s("Gather", s("Squeeze", marks, [0]), query))
        return all_visible(s, parts.terms, query, key, inputs.keys, parts.causal, marked)

    return visible


def _everything(causal: bool) -> Predicate:
    """What global queries see."""
    return lambda s, query, key, marks: s("LessOrEqual", key, query) if causal else None


def _in_parts(s: Statements, inputs: Inputs, parts: Plan) -> Value:
    merged = len(parts.classes) + (parts.gathered is not None) > 1
    attended: Attended | None = None
    for number, part in enumerate(parts.classes):
        attended = class_part(
            s,
            inputs,
            part,
            parts.causal,
            excluded=[other.term for other in parts.classes[:number]],
            earlier=attended,
            last=parts.gathered is None and number == len(parts.classes) - 1,
        )
    if parts.gathered is not None:
        unsure = merged or _may_see_nothing(inputs, parts)
        output = gathered(s, inputs, parts.gathered, parts.causal, unsure, attended)
    else:
        assert attended is not None
        width = inputs.geometry.num_heads * inputs.geometry.head_dim
        output = s.reshape(attended.output, inputs.batch, -1, width)
    if parts.global_queries:
        output = _with_global_queries(s, inputs, parts, output)
    if parts.marked:
        output = _with_marked_queries(s, inputs, parts, output)
    return output


def _may_see_nothing(inputs: Inputs, parts: Plan) -> bool:
    return inputs.mask_rows is not None or not parts.sees_itself


def _with_global_queries(s: Statements, inputs: Inputs, parts: Plan, output: Value) -> Value:
    """Put the first queries in place, as many of them as are there at all: none in a later chunk of a sequence."""
    count = s("Min", s("Sub", parts.global_queries, inputs.offset), inputs.queries, to="global_query_count")

    def replaced(b: Statements) -> Value:
        end = b("Unsqueeze", count, [0])
        places = b("Unsqueeze", b("Add", b.range(count), inputs.offset), [0])
        rows = attend_rows(
            b,
            inputs,
            b("Slice", "query", [0], end, [1], to="global_query_rows"),
            b("Expand", places, b.shape(inputs.batch, count)),
            _everything(False),
            side_by_side=True,
            may_see_nothing=inputs.mask_rows is not None,
        )
        return b("Concat", rows, b("Slice", output, end, [2**62], [1]), axis=1, to="with_global_queries")

    return s.choose(s("Greater", count, 0), replaced, lambda b: b("Identity", output), to="all_queries")


def _with_marked_queries(s: Statements, inputs: Inputs, parts: Plan, output: Value) -> Value:
    """Put the rows of marked tokens in place."""
    assert inputs.mark_rows is not None
    marks = s.reshape(inputs.mark_rows, inputs.batch, inputs.keys)
    own = s("Slice", marks, s("Unsqueeze", inputs.offset, [0]), [2**62], [1], to="query_marks")
    any_marked = s.cast(s("ReduceMax", s.cast(own, TensorProto.INT32), keepdims=0), TensorProto.BOOL)

    def replaced(b: Statements) -> Value:
        indices, there = marked_positions(b, own)
        flat = b("Add", indices, b("Unsqueeze", b("Mul", b.range(inputs.batch), inputs.queries), [1]))
        rows = attend_rows(
            b,
            inputs,
            b("Gather", inputs.query_rows, flat, axis=0, to="marked_query_rows"),
            b("Add", indices, inputs.offset),
            _everything(parts.causal),
            side_by_side=False,
            may_see_nothing=inputs.mask_rows is not None,
        )
        width = inputs.geometry.num_heads * inputs.geometry.head_dim
        valid = b("Transpose", b("NonZero", there), perm="[1, 0]", to="marked_slots")
        targets = b("Unsqueeze", b("GatherND", flat, valid), [1])
        updates = b("GatherND", rows, valid, to="marked_rows")
        replaced_rows = b("ScatterND", b.reshape(output, -1, width), targets, updates)
        return b.reshape(replaced_rows, inputs.batch, -1, width)

    return s.choose(any_marked, replaced, lambda b: b("Identity", output), to="all_rows")
