"""Dense attention with caches by ONNX Runtime's own kernel: what a user would write text with if there were no effc.

Every attention operator becomes contrib ``GroupQueryAttention`` with ``past_key.N`` and ``past_value.N``
``[batch, kv_heads, capacity, head_dim]`` as inputs and ``present_*`` as outputs. A caller that binds the same memory to
both lets the kernel add the new token in place, as onnxruntime-genai does.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from effc.errors import PreconditionError, UsageError
from effc.passes.fuse_onnxruntime import CONTRIB
from effc.plugins.caches import ALL_KEYS, LAST_KEYS
from effc.plugins.forms.registry import parse_pattern
from effc.plugins.forms.terms import Dense, Local
from effc.plugins.function_body import geometry_of, is_attention
from effc.plugins.operator import KEY_MASK, AttentionGeometry, optional_inputs

_REMEDY = "effc has no dense baseline for writing with it; the forward pass is measured all the same."


def dense_window(pattern: str) -> int | None:
    """Keys that a causal layer sees, itself included; None for all of them.

    Raises:
        PreconditionError: if it is neither dense nor a plain window, so that ONNX Runtime's kernel does not know it.
    """
    try:
        terms = parse_pattern(pattern).terms
    except UsageError:
        terms = ()
    match terms:
        case (Dense(),):
            return None
        case (Local() as local,):
            return local.reach(causal=True)[0] + 1
    raise PreconditionError(f"The source model's attention, '{pattern}', is no plain window.", _REMEDY)


def check_attention(patterns: Iterable[str], biased: bool) -> None:
    """Whether there can be a twin of a model, before anything is loaded.

    Args:
        patterns: of its layers, as the source model has them.
        biased: whether scores depend on distances.

    Raises:
        PreconditionError: if there cannot.
    """
    for pattern in patterns:
        dense_window(pattern)
    if biased:
        raise PreconditionError("The model adds to its scores by distance, and ONNX Runtime's kernel cannot.", _REMEDY)


def add_shared_caches(model: ir.Model) -> None:
    """Give every attention operator of a forward graph a cache in ONNX Runtime's kernel, in place.

    Texts of a batch are of one length and unpadded: ``attention_mask`` is ``[batch, 1]``, of the new token, if anything
    but attention reads it at all.

    Raises:
        PreconditionError: if an operator has what the kernel does not know.
    """
    graph = model.graph
    sizes = {
        LAST_KEYS: ir.Value(name=LAST_KEYS, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32)),
        ALL_KEYS: ir.Value(name=ALL_KEYS, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32)),
    }
    graph.inputs.extend(sizes.values())
    for number, node in enumerate([node for node in graph if is_attention(node)]):
        _replace(graph, number, node, geometry_of(node), list(sizes.values()))
    model.functions.clear()
    model.opset_imports.setdefault(CONTRIB, 1)
    RemoveUnusedNodesPass()(model)


def _replace(graph: ir.Graph, number: int, node: ir.Node, geometry: AttentionGeometry, sizes: list[ir.Value]) -> None:
    given = [
        name
        for name, value in zip(optional_inputs(geometry.form), node.inputs[3:], strict=False)
        if value is not None and name != KEY_MASK
    ]
    if given:
        raise PreconditionError(f"'{node.name}' adds to its scores by distance.", _REMEDY)
    if not geometry.causal:
        raise PreconditionError(f"'{node.name}' looks ahead.", _REMEDY)
    window = dense_window(str(geometry.form))
    shape = ir.Shape(["batch", geometry.kv_heads, "capacity", geometry.head_dim])
    pasts, presents = (
        [
            ir.Value(name=f"{when}_{what}.{number}", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
            for what in ("key", "value")
        ]
        for when in ("past", "present")
    )
    result = ir.Value(name=f"{node.name}/attended", shape=node.outputs[0].shape, type=node.outputs[0].type)
    attributes: dict[str, int | float] = {
        "num_heads": geometry.num_heads,
        "kv_num_heads": geometry.kv_heads,
        "scale": float(geometry.scale),
    }
    if window is not None:
        attributes["local_window_size"] = window
    kernel = ir.node(
        "GroupQueryAttention",
        [*node.inputs[:3], *pasts, *sizes],
        attributes,
        domain=CONTRIB,
        outputs=[result, *presents],
        name=node.name,
    )
    graph.inputs.extend(pasts)
    graph.outputs.extend(presents)
    graph.insert_before(node, kernel)
    ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
