"""effc's attention operators in a graph for TensorRT: as plugin nodes, or written out in standard operators.

As a plugin, ``effc::SparseAttention`` or ``effc::LinearAttention`` keeps its attributes and gets one more: ``inputs``
names the optional inputs it has, because TensorRT's network knows no input that is left out. ``topk-blocks`` becomes
``effc::SparseAttention`` too, behind standard operators that choose its blocks of keys.

Written out, a layer is one ``Attention`` with a mask over all pairs, which TensorRT fuses into its own kernel: right
for every pattern, and O(length^2). The bodies that ONNX Runtime runs are of no use here: TensorRT takes no Scan inside
a function, and no contrib operators. Dense layers are always written out, because TensorRT's own kernels are made for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx import TensorProto
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, LiftConstantsToInitializersPass

from effc.errors import PreconditionError
from effc.exporters.engine_eight_bit import OUTPUT_TYPE, SCALES, read_codes
from effc.exporters.engine_linear import ATTENDED, write_linear
from effc.exporters.engine_masked import write_masked
from effc.exporters.engine_states import RECURRENT, STATES, past_states
from effc.exporters.engine_sums import ENGINE_DOMAIN
from effc.exporters.engine_topk import BLOCK_UNIT, KEY_SUMS, MOST_BLOCKS, write_lists, write_mask
from effc.plugins.bodies.position_statements import Statements
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.content import BlockTopK
from effc.plugins.forms.linear import Linear
from effc.plugins.forms.terms import Dense
from effc.plugins.function_body import geometry_of, is_attention
from effc.plugins.function_text import parse_function
from effc.plugins.operator import DOMAIN, KEY_MASK, AttentionGeometry, optional_inputs
from effc.plugins.pattern import Pattern

INPUTS_ATTRIBUTE = "inputs"
LAST_QUERY = "effc.last_query"
"""In the metadata of a node: of its output only the last row is used; the other queries choose blocks of keys."""
_KEY_BLOCKS = "key_blocks"
# TensorRT warns of attributes that a plugin knows and a node leaves out.
_NOT_SET = ("block_size", "present_state", OUTPUT_TYPE)
_HALF_OR_FLOAT = {
    ir.DataType.FLOAT: TensorProto.FLOAT,
    ir.DataType.FLOAT16: TensorProto.FLOAT16,
    ir.DataType.BFLOAT16: TensorProto.BFLOAT16,
}


@dataclass
class EngineAttention:
    """Names of the attention nodes that are left to the plugin, with their operators, and of those written out.

    ``eight_bit``: those of the plugin that read FP8.
    """

    plugins: dict[str, str] = field(default_factory=dict)
    eight_bit: list[str] = field(default_factory=list)
    written_out: list[str] = field(default_factory=list)


def check_forms(model: ir.Model) -> None:
    """Refuse attention that no engine of effc's can hold.

    Raises:
        PreconditionError: naming the layer and its form.
    """
    for node in model.graph.all_nodes():
        if not is_attention(node):
            continue
        form = geometry_of(node).form
        if not isinstance(form, (Pattern, Linear, BlockTopK)):
            raise PreconditionError(
                f"'{node.name}' computes '{form}', and engines are built for patterns of positions, topk-blocks, "
                "linear:elu and linear:relu only.",
                "Use a pattern such as local:256 or local:256|global:16, or --target=onnxruntime.",
            )
        if isinstance(form, BlockTopK) and form.count > MOST_BLOCKS:
            raise PreconditionError(
                f"'{node.name}' computes '{form}', and TensorRT chooses at most {MOST_BLOCKS} blocks.",
                "Use fewer, larger blocks.",
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
    result, chosen = EngineAttention(), False
    for key in [key for key in model.functions if key[0] != ENGINE_DOMAIN]:
        del model.functions[key]
    for node in [node for node in model.graph if is_attention(node)]:
        geometry = geometry_of(node)
        form, name = geometry.form, str(node.name)
        if plugin and _for_plugin(form):
            lists = _choose_blocks(model, node, past) if isinstance(form, BlockTopK) else None
            chosen = chosen or lists is not None
            _as_plugin(node, lists)
            if read_codes(model.graph, node, geometry):
                result.eight_bit.append(name)
            result.plugins[name] = str(node.op_type)
        else:
            _as_call(model, node, past)
            result.written_out.append(name)
    if result.written_out or chosen:
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


def _for_plugin(form: AttentionForm) -> bool:
    """Dense layers are TensorRT's own, and the kernels take blocks of some sizes only."""
    if isinstance(form, BlockTopK):
        return form.block % BLOCK_UNIT == 0
    return not (isinstance(form, Pattern) and form.is_dense)


def _as_plugin(node: ir.Node, key_blocks: ir.Value | None) -> None:
    # The lists of blocks were chosen by the sums.
    given = {name: place for name, place in given_inputs(node).items() if name != KEY_SUMS}
    names = [*given]
    kept = [*node.inputs[:3], *(node.inputs[place] for place in given.values())]
    if key_blocks is not None:
        names.append(_KEY_BLOCKS)
        kept.append(key_blocks)
    node.resize_inputs(len(kept))
    for place, value in enumerate(kept):
        node.replace_input_with(place, value)
    node.overload = ""
    if node.op_type == RECURRENT:
        node.op_type = Linear.op_type
        node.attributes["present_state"] = ir.AttrInt64("present_state", 1)
    for key in _NOT_SET:
        node.attributes.setdefault(key, ir.AttrInt64(key, 0))
    for key in SCALES:
        node.attributes.setdefault(key, ir.AttrFloat32(key, 0.0))
    texts = {INPUTS_ATTRIBUTE: ",".join(names), "plugin_namespace": DOMAIN, "plugin_version": "1"}
    for key, text in texts.items():
        node.attributes[key] = ir.AttrString(key, text)


def _choose_blocks(model: ir.Model, node: ir.Node, past: bool) -> ir.Value:
    """Turn the node into one of dense attention to lists of blocks, and return these."""
    geometry, given = geometry_of(node), given_inputs(node)
    form = geometry.form
    assert isinstance(form, BlockTopK)
    s = Statements()
    s.reserve("query", "key", KEY_MASK, KEY_SUMS)
    lists = write_lists(s, form, geometry, KEY_MASK in given, past, KEY_SUMS in given)
    s.cast(lists, TensorProto.INT32, to=_KEY_BLOCKS)
    chosen_by = {name: place for name, place in given.items() if name in (KEY_MASK, KEY_SUMS)}
    names = ["query", "key", *chosen_by]
    overload = f"{geometry.overload(frozenset(given))}_{'past' if past else 'whole'}"
    function = _function("ChooseBlocks", overload, names, [_KEY_BLOCKS], s)
    model.functions[function.identifier()] = function
    inputs = [*node.inputs[:2], *(node.inputs[place] for place in chosen_by.values())]
    call = ir.Node(function.domain, function.name, inputs, overload=function.overload, name=f"{node.name}/blocks")
    model.graph.insert_before(node, call)
    model.opset_imports.setdefault(function.domain, 1)
    result = call.outputs[0]
    if node.metadata_props.pop(LAST_QUERY, None) is not None:
        query = node.inputs[0]
        assert query is not None
        node.replace_input_with(0, _last(model.graph, node, query, 1))
        result = _last(model.graph, node, result, 2)
    node.op_type = Pattern.op_type
    node.attributes["pattern"] = ir.AttrString("pattern", "dense")
    node.attributes["block_size"] = ir.AttrInt64("block_size", form.block)
    return result


def _last(graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """The last slice of a tensor along an axis."""
    bounds = [ir.node("Constant", [], {"value_ints": [number]}) for number in (-1, 2**31 - 1, axis)]
    last = ir.node("Slice", [value, *(bound.outputs[0] for bound in bounds)])
    last.outputs[0].type = value.type
    if value.shape is not None:
        last.outputs[0].shape = ir.Shape([1 if place == axis else dim for place, dim in enumerate(value.shape)])
    graph.insert_before(before, [*bounds, last])
    return last.outputs[0]


def _as_call(model: ir.Model, node: ir.Node, past: bool) -> None:
    given = given_inputs(node)
    query = node.inputs[0]
    assert query is not None and query.dtype is not None
    function = _body(geometry_of(node), tuple(given), query.dtype, past, node.op_type == RECURRENT)
    model.functions[function.identifier()] = function
    inputs = [*node.inputs[:3], *(node.inputs[place] for place in given.values())]
    outputs = len(node.outputs)
    call = ir.Node(
        function.domain, function.name, inputs, overload=function.overload, name=node.name, num_outputs=outputs
    )
    model.graph.insert_before(node, call)
    for former, fresh in zip(node.outputs, call.outputs, strict=True):
        fresh.shape, fresh.type = former.shape, former.type
        name, former.name = former.name, None
        ir.convenience.replace_all_uses_with(former, fresh, replace_graph_outputs=True)
        fresh.name = name
    model.graph.remove(node, safe=True)
    model.opset_imports.setdefault(function.domain, 1)


def _body(
    geometry: AttentionGeometry, given: tuple[str, ...], dtype: ir.DataType, past: bool, states: bool
) -> ir.Function:
    form = geometry.form
    s = Statements()
    s.reserve("query", "key", "value", KEY_MASK, KEY_SUMS, *form.extra_inputs, *past_states())
    outputs = ["output"]
    if isinstance(form, Linear):
        start = past_states() if past_states()[0] in given else None
        write_linear(s, form, geometry, KEY_MASK in given, _HALF_OR_FLOAT[dtype], start, states)
        outputs += [f"present_{name}" for name in STATES] if states else []
    elif isinstance(form, BlockTopK):
        lists = write_lists(s, form, geometry, KEY_MASK in given, past, KEY_SUMS in given)
        chosen = write_mask(s, lists, form, geometry, _HALF_OR_FLOAT[dtype])
        write_masked(s, Pattern((Dense(),)), geometry, given, _HALF_OR_FLOAT[dtype], past, chosen)
    else:
        assert isinstance(form, Pattern)
        write_masked(s, form, geometry, given, _HALF_OR_FLOAT[dtype], past)
    overload = f"{geometry.overload(frozenset(given))}_{dtype.name}_{'past' if past else 'whole'}"
    overload += "_states" if states else ""
    return _function("Attention", overload, ["query", "key", "value", *given], outputs, s)


def _function(name: str, overload: str, inputs: list[str], outputs: list[str], s: Statements) -> ir.Function:
    return parse_function(name, overload, inputs, outputs, s.text(), domain=ENGINE_DOMAIN, contrib=False)
