"""effc's attention operators in a graph for TensorRT: as plugin nodes, or written out in standard operators.

As a plugin, ``effc::SparseAttention`` or ``effc::LinearAttention`` keeps its attributes and gets one more: ``inputs``
names the optional inputs it has, because TensorRT's network knows no input that is left out.

Written out, a layer is one ``Attention`` with a mask over all pairs, which TensorRT fuses into its own kernel: right
for every pattern, and O(length^2). The bodies that ONNX Runtime runs are of no use here: TensorRT takes no Scan inside
a function, and no contrib operators. Dense layers are always written out, because TensorRT's own kernels are made for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx import TensorProto, parser
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, LiftConstantsToInitializersPass

from effc.errors import PreconditionError
from effc.exporters.engine_linear import ATTENDED, write_linear
from effc.plugins.bodies import OPSET
from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.bodies.position_visible import all_visible
from effc.plugins.caches import sees_itself
from effc.plugins.forms.linear import Linear
from effc.plugins.forms.terms import Sinks
from effc.plugins.function_body import geometry_of, is_attention
from effc.plugins.operator import DOMAIN, KEY_MASK, AttentionGeometry, optional_inputs
from effc.plugins.pattern import Pattern

INPUTS_ATTRIBUTE = "inputs"
# Within the range of fp16, and out of reach of any score.
_HIDDEN = -30000.0
_HALF_OR_FLOAT = {
    ir.DataType.FLOAT: TensorProto.FLOAT,
    ir.DataType.FLOAT16: TensorProto.FLOAT16,
    ir.DataType.BFLOAT16: TensorProto.BFLOAT16,
}


@dataclass
class EngineAttention:
    """Names of the attention nodes that are left to the plugin, with their operators, and of those written out."""

    plugins: dict[str, str] = field(default_factory=dict)
    written_out: list[str] = field(default_factory=list)


def check_forms(model: ir.Model) -> None:
    """Refuse attention that no engine of effc's can hold.

    Raises:
        PreconditionError: naming the layer and its form.
    """
    for node in model.graph.all_nodes():
        if is_attention(node) and not isinstance(geometry_of(node).form, (Pattern, Linear)):
            form = node.attributes["pattern"].as_string()
            raise PreconditionError(
                f"'{node.name}' computes '{form}', and engines are built for patterns of positions, linear:elu and "
                "linear:relu only.",
                "Use a pattern such as local:256 or local:256|global:16, or --target=onnxruntime.",
            )


def given_inputs(node: ir.Node) -> dict[str, int]:
    """The optional inputs that a node has, and where."""
    if INPUTS_ATTRIBUTE in node.attributes:
        names: Sequence[str] = [name for name in node.attributes[INPUTS_ATTRIBUTE].as_string().split(",") if name]
        return {name: 3 + place for place, name in enumerate(names)}
    optional = zip(optional_inputs(geometry_of(node).form), node.inputs[3:], strict=False)
    return {name: 3 + place for place, (name, value) in enumerate(optional) if value is not None}


def lower_attention(model: ir.Model, plugin: bool, *, past: bool = False) -> EngineAttention:
    """Make every attention node a plugin node or standard operators, in place; function bodies go.

    Args:
        plugin: leave patterns to the plugin; without it every layer is written out.
        past: whether there may be fewer queries than keys.
    """
    check_forms(model)
    result = EngineAttention()
    model.functions.clear()
    for node in [node for node in model.graph if is_attention(node)]:
        form = geometry_of(node).form
        name = str(node.name)
        if plugin and not (isinstance(form, Pattern) and form.is_dense):
            _as_plugin(node)
            result.plugins[name] = str(node.op_type)
        else:
            _as_call(model, node, past)
            result.written_out.append(name)
    if result.written_out:
        InlinePass()(model)
        # The build log speaks of a layer by the name of its node.
        inlined = [node for node in model.graph if _is_written_out(node)]
        for node, name in zip(inlined, result.written_out, strict=True):
            node.name = name
        # Layers of one pattern share its mask.
        LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        CommonSubexpressionEliminationPass()(model)
    return result


def _is_written_out(node: ir.Node) -> bool:
    """Whether the node is what gives a written-out layer its output."""
    if node.domain != "":
        return False
    return node.op_type == "Attention" or (node.op_type == "Div" and ATTENDED in str(node.outputs[0].name))


def _as_plugin(node: ir.Node) -> None:
    given = given_inputs(node)
    kept = [*node.inputs[:3], *(node.inputs[place] for place in given.values())]
    node.resize_inputs(len(kept))
    for place, value in enumerate(kept):
        node.replace_input_with(place, value)
    node.overload = ""
    texts = {INPUTS_ATTRIBUTE: ",".join(given), "plugin_namespace": DOMAIN, "plugin_version": "1"}
    for key, text in texts.items():
        node.attributes[key] = ir.AttrString(key, text)


def _as_call(model: ir.Model, node: ir.Node, past: bool) -> None:
    given = given_inputs(node)
    query = node.inputs[0]
    assert query is not None and query.dtype is not None
    function = _body(geometry_of(node), tuple(given), query.dtype, past)
    model.functions[function.identifier()] = function
    inputs = [*node.inputs[:3], *(node.inputs[place] for place in given.values())]
    call = ir.Node(function.domain, function.name, inputs, overload=function.overload, name=node.name, num_outputs=1)
    former, fresh = node.outputs[0], call.outputs[0]
    fresh.shape, fresh.type = former.shape, former.type
    model.graph.insert_before(node, call)
    name, former.name = former.name, None
    ir.convenience.replace_all_uses_with(former, fresh, replace_graph_outputs=True)
    fresh.name = name
    model.graph.remove(node, safe=True)
    model.opset_imports.setdefault(function.domain, 1)


def _body(geometry: AttentionGeometry, given: tuple[str, ...], dtype: ir.DataType, past: bool) -> ir.Function:
    form = geometry.form
    s = Statements()
    s.reserve("query", "key", "value", KEY_MASK, *form.extra_inputs)
    if isinstance(form, Linear):
        write_linear(s, form, geometry, KEY_MASK in given, _HALF_OR_FLOAT[dtype])
    else:
        assert isinstance(form, Pattern)
        _write(s, form, geometry, given, _HALF_OR_FLOAT[dtype], past)
    overload = f"{geometry.overload(frozenset(given))}_{dtype.name}_{'past' if past else 'whole'}"
    proto: onnx.FunctionProto = parser.parse_function(
        f'<domain: "effc.engine", overload: "{overload}", opset_import: ["": {OPSET}]>\n'
        f"Attention ({', '.join(['query', 'key', 'value', *given])}) => (output)\n{{{s.text()}}}"
    )
    for inner in proto.node:
        inner.name = inner.output[0]
    return ir.serde.deserialize_function(proto)


def _write(
    s: Statements, form: Pattern, geometry: AttentionGeometry, given: tuple[str, ...], dtype: int, past: bool
) -> None:
    bias_given = "distance_bias" in given or "distance_slope" in given
    # Where queries and keys are the same tokens, the kernels know causality themselves.
    by_kernel = form.is_dense and geometry.causal and not past and not bias_given
    positions = None if form.is_dense and not bias_given and (by_kernel or not geometry.causal) else _positions(s)
    masks: list[Value | None] = []
    if positions is not None:
        query, key, keys = positions
        marked = _marked(s) if "marks" in given else None
        seen = all_visible(s, form.terms, query, key, keys, geometry.causal, marked)
        masks.append(None if seen is None else s("Identity", seen, to="pattern"))
    if KEY_MASK in given:
        masks.append(s("Unsqueeze", "key_mask", [1, 2], to="padding"))
    mask = s.all_of(*masks)
    never_empty = KEY_MASK not in given and (form.is_dense or sees_itself(form))
    some: Value | None = None
    if mask is not None:
        if not never_empty and not by_kernel:
            some = s.cast(s("ReduceMax", s.cast(mask, dtype), [-1], keepdims=1), TensorProto.BOOL, to="sees_some")
            # A row that sees nothing is made to see everything, and its result to be zero: a softmax over nothing is
            # not a number, and would spread.
            mask = s("Or", mask, s("Not", some), to="mask")
        mask = _four_axes(s, mask, len(masks) > 1 or KEY_MASK in given or "marks" in given)
    bias = _distance(s, given, positions, dtype)
    if mask is not None and (bias is not None or by_kernel):
        # Finite, so that a row of padding that sees nothing but padding is a number.
        shown = bias or s.cast(s.value(0.0), dtype)
        bias = s("Where", mask, shown, s.cast(s.value(_HIDDEN), dtype), to="scores")
    if bias is None and mask is not None and _same_for_all_queries(form, positions is not None):
        rows = s("Concat", [1, 1], s("Shape", "query", start=1, end=2), [1], axis=0)
        mask = s("Expand", mask, rows, to="mask_of_each_query")
    elif bias is not None and by_kernel:
        rows = s("Concat", [1, 1], s("Shape", "query", start=1, end=2), [1], axis=0)
        bias = s("Expand", bias, rows, to="scores_of_each_query")
    attributes = {"q_num_heads": geometry.num_heads, "kv_num_heads": geometry.kv_heads, "scale": geometry.scale}
    if by_kernel:
        attributes["is_causal"] = 1
    attended = s("Attention", "query", "key", "value", bias or mask, to="attended", **attributes)
    if some is None:
        s("Identity", attended, to="output")
        return
    # [batch, 1, queries, 1], or without its batch, to [batch, queries, 1].
    rows = s("Reshape", some, s.value([0, -1, 1] if KEY_MASK in given or "marks" in given else [1, -1, 1]))
    s("Where", rows, attended, s.cast(s.value(0.0), dtype), to="output")


def _same_for_all_queries(form: Pattern, positions: bool) -> bool:
    """Whether the mask has one row, which ONNX Runtime does not spread over the queries by itself."""
    return not positions or all(isinstance(term, Sinks) for term in form.terms)


def _positions(s: Statements) -> tuple[Value, Value, Value]:
    """Positions of the queries ``[queries, 1]`` and of the keys ``[1, keys]``, and the number of keys."""
    queries, keys = s.size("query", 1, to="query_length"), s.size("key", 1, to="key_length")
    # The queries are the last positions.
    rows = s("Add", s.range(queries), s("Sub", keys, queries), to="query_places")
    return s("Unsqueeze", rows, [1]), s("Unsqueeze", s.range(keys), [0]), keys


def _marked(s: Statements) -> Value:
    """``[batch, 1, queries, keys]``: pairs with a marked token."""
    offset = s("Sub", s("Shape", "key", start=1, end=2), s("Shape", "query", start=1, end=2))
    rows = s("Slice", "marks", offset, [2**31 - 1], [1], to="query_marks")
    return s("Or", s("Unsqueeze", "marks", [1, 2]), s("Unsqueeze", rows, [1, 3]), to="marked")


def _four_axes(s: Statements, mask: Value, batched: bool) -> Value:
    return mask if batched else s("Unsqueeze", mask, [0, 1])


def _distance(
    s: Statements, given: tuple[str, ...], positions: tuple[Value, Value, Value] | None, dtype: int
) -> Value | None:
    """What is added to the scores by distance, ``[1, heads, queries, keys]``."""
    if positions is None:
        return None
    parts = []
    distance = s("Sub", positions[1], positions[0], to="key_distance")
    if "distance_bias" in given:
        width = s("Squeeze", s("Shape", "distance_bias", start=1, end=2), [0])
        reach = s("Div", width, 2)
        place = s("Min", s("Max", s("Add", distance, reach), 0), s("Sub", width, 1))
        parts.append(s("Unsqueeze", s("Gather", "distance_bias", place, axis=1), [0]))
    if "distance_slope" in given:
        slope = s("Unsqueeze", "distance_slope", [0, 2, 3])
        parts.append(s("Mul", slope, s.cast(distance, TensorProto.FLOAT)))
    if not parts:
        return None
    return s.cast(parts[0] if len(parts) == 1 else s("Add", *parts), dtype, to="distance_scores")
