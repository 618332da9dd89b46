"""What a decode engine of ``topk-blocks`` keeps of its keys to choose blocks by: the sum of each block's, in fp32.

``KeySums`` of domain ``effc.engine`` is a function that gives ``key_sums [batch, blocks, kv_heads * head_dim]``, the
sums of the unpadded keys of every block: of a whole text, or of one more token and the sums before it. The operator
then has ``key_sums`` behind its mask, so that a step reads one row for each block in place of all keys. Its attribute
``inputs`` names the optional inputs it has.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx import TensorProto

from effc.exporters.engine_masked import write_masked
from effc.exporters.engine_topk import KEY_SUMS, sum_keys, write_lists, write_mask
from effc.plugins.bodies.position_statements import Statements
from effc.plugins.forms.content import BlockTopK
from effc.plugins.forms.terms import Dense
from effc.plugins.function_body import ATTRIBUTES, geometry_of
from effc.plugins.function_text import parse_function
from effc.plugins.operator import KEY_MASK, AttentionGeometry
from effc.plugins.pattern import Pattern

ENGINE_DOMAIN = "effc.engine"
_PAST, _COUNT = "past_sums", "key_count"


def sums_width(geometry: AttentionGeometry) -> int:
    """Numbers of a row of the sums."""
    return geometry.kv_heads * geometry.head_dim


def with_sums(model: ir.Model, node: ir.Node, step: tuple[ir.Value, ir.Value] | None = None) -> ir.Value:
    """Let an operator of ``topk-blocks`` read the sums of its keys, in place.

    Args:
        step: the keys of the one new token and the sums before it; None for a text before which there is nothing.

    Returns:
        The sums of all keys, ``[batch, blocks, kv_heads * head_dim]`` in fp32.
    """
    geometry = geometry_of(node)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    given = (KEY_SUMS,) if mask is None else (KEY_MASK, KEY_SUMS)
    sums = _sums(model, node, geometry, mask, step)
    body = _body(geometry, given, past=step is not None)
    model.functions[body.identifier()] = body
    node.overload = body.overload
    node.attributes["inputs"] = ir.AttrString("inputs", ",".join(given))
    node.resize_inputs(3 + len(given))
    node.replace_input_with(2 + len(given), sums)
    return sums


def _sums(
    model: ir.Model,
    node: ir.Node,
    geometry: AttentionGeometry,
    mask: ir.Value | None,
    step: tuple[ir.Value, ir.Value] | None,
) -> ir.Value:
    key = node.inputs[1]
    assert key is not None
    function = _sums_function(geometry, mask is not None, step is not None)
    model.functions[function.identifier()] = function
    model.opset_imports.setdefault(ENGINE_DOMAIN, 1)
    inputs, nodes = [key if step is None else step[0]], list[ir.Node]()
    if mask is not None:
        inputs.append(mask)
    if step is not None:
        count = ir.node("Shape", [key], {"start": 1, "end": 2})
        count.outputs[0].dtype, count.outputs[0].shape = ir.DataType.INT64, ir.Shape([1])
        nodes.append(count)
        inputs += [count.outputs[0], step[1]]
    call = ir.Node(function.domain, function.name, inputs, overload=function.overload, name=f"{node.name}/sums")
    sums = call.outputs[0]
    sums.dtype, sums.shape = ir.DataType.FLOAT, ir.Shape(["batch", None, sums_width(geometry)])
    model.graph.insert_before(node, [*nodes, call])
    return sums


def _sums_function(geometry: AttentionGeometry, masked: bool, step: bool) -> ir.Function:
    form = geometry.form
    assert isinstance(form, BlockTopK)
    inputs = ["key", *([KEY_MASK] if masked else []), *([_COUNT, _PAST] if step else [])]
    s = Statements()
    s.reserve(*inputs, KEY_SUMS)
    mask = s.cast(KEY_MASK, TensorProto.FLOAT, to="own_mask") if masked else None
    if step and mask is not None:
        mask = s("Slice", mask, [-1], [2**31 - 1], [1])
    if step:
        _add_token(s, form, mask)
    else:
        keys = s.size("key", 1)
        blocks = s("Div", s("Add", keys, form.block - 1), form.block)
        s("Identity", sum_keys(s, form, geometry, s("Sub", s("Mul", blocks, form.block), keys), mask), to="block_rows")
    text = s.text() + f"\n{KEY_SUMS} = Identity (block_rows)\n"
    overload = f"{'step' if step else 'whole'}_{geometry.overload(frozenset(inputs[1:2] if masked else ()))}"
    return parse_function("KeySums", overload, inputs, [KEY_SUMS], text, domain=ENGINE_DOMAIN, contrib=False)


def _add_token(s: Statements, form: BlockTopK, mask: str | None) -> None:
    """Define ``block_rows``: the sums before, and the token's keys in the last block, which may be a new one."""
    own = s.cast("key", TensorProto.FLOAT)
    if mask is not None:
        own = s("Mul", own, s("Unsqueeze", mask, [2]))
    blocks = s("Div", s("Add", s("Squeeze", _COUNT, [0]), form.block - 1), form.block, to="blocks")
    grown = s("Pad", _PAST, s.shape(0, 0, 0, 0, s("Sub", blocks, s.size(_PAST, 1)), 0))
    place = s.cast(s("Equal", s.range(blocks), s("Sub", blocks, 1)), TensorProto.FLOAT)
    s("Add", grown, s("Mul", own, s("Unsqueeze", place, [0, 2])), to="block_rows")


def _body(geometry: AttentionGeometry, given: tuple[str, ...], past: bool) -> ir.Function:
    """The operator for ONNX Runtime, with the choice that the engine makes."""
    form = geometry.form
    assert isinstance(form, BlockTopK)
    s = Statements()
    s.reserve("query", "key", "value", *given)
    lists = write_lists(s, form, geometry, KEY_MASK in given, past, sums=True)
    chosen = write_mask(s, lists, form, geometry, TensorProto.FLOAT)
    write_masked(s, Pattern((Dense(),)), geometry, given, TensorProto.FLOAT, past, chosen)
    overload = f"{'step' if past else 'whole'}_{geometry.overload(frozenset(given))}"
    inputs, attributes = ["query", "key", "value", *given], (*ATTRIBUTES, "inputs")
    return parse_function(form.op_type, overload, inputs, ["output"], s.text(), attributes=attributes, contrib=False)
