"""From an fp32 graph, quantized or not, to the strongly typed one that an engine is built from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from effc.exporters.engine_attention import EngineAttention, lower_attention
from effc.exporters.engine_pairs import plain_pairs
from effc.exporters.half_precision import Conversion, to_half
from effc.exporters.onnx_graph import save_onnx
from effc.passes.quantize_find import PART
from effc.passes.quantize_graph import constant_of, module_of
from effc.plugins.operator import DOMAIN

Precision = Literal["fp16", "bf16", "fp32"]
_DECOMPOSABLE = "TRT_decomposable"
_HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_QUANTIZED = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT4: "int4"}


@dataclass
class EngineGraph:
    """A graph for the builder.

    Attributes:
        model: strongly typed; uses effc's plugin, or standard operators alone.
        linears: for each linear layer, by the name that its node has now: ``int8``, ``fp8`` or the precision.
        attention: for each attention layer's node, whether the plugin or standard operators compute it.
        conversion: what half precision did to it; None in fp32.
    """

    model: ir.Model
    linears: dict[str, str] = field(default_factory=dict)
    attention: EngineAttention = field(default_factory=EngineAttention)
    conversion: Conversion | None = None


def make_engine_graph(
    model: ir.Model, precision: Precision, *, plugin: bool, past: bool = False, as_half: Collection[str] = ()
) -> EngineGraph:
    """Convert in place.

    Args:
        model: with ``effc::`` operators, its quantized layers as explicit QuantizeLinear and DequantizeLinear.
        plugin: leave sparse attention to effc's plugin.
        past: whether there may be fewer queries than keys.
        as_half: graph inputs and outputs that take the precision; others stay fp32.

    Raises:
        PreconditionError, PassFailedError: see :mod:`effc.exporters.engine_attention` and
            :mod:`effc.exporters.half_precision`.
    """
    plain_pairs(model)
    result = EngineGraph(model, _name_linears(model.graph, precision))
    if precision != "fp32":
        result.conversion = to_half(model, _HALVES[precision], as_half=as_half)
    result.attention = lower_attention(model, plugin, past=past)
    model.opset_imports.pop("com.microsoft", None)
    if all(node.domain != DOMAIN for node in model.graph):
        model.opset_imports.pop(DOMAIN, None)
    return result


def save_engine_graph(graph: EngineGraph, path: Path, *, builder: bool = True) -> None:
    """Write it, its weights beside it.

    Args:
        builder: for TensorRT; ONNX Runtime does not take what only TensorRT understands.
    """
    for node in graph.model.graph:
        node.metadata_props.clear()
        if node.op_type == "Attention" and node.domain == "":
            # Where no fused kernel fits, fp32 for example, the builder has to be allowed to take it apart.
            node.attributes.pop(_DECOMPOSABLE, None)
            if builder:
                node.attributes[_DECOMPOSABLE] = ir.AttrInt64(_DECOMPOSABLE, 1)
    save_onnx(graph.model, path)


def _name_linears(graph: ir.Graph, precision: Precision) -> dict[str, str]:
    """Give every product with constant weights its layer's name, by which the build log will speak of it."""
    found: dict[str, str] = {}
    taken = {node.name for node in graph}
    for node in graph:
        if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
            continue
        weight, kind = _weight_behind(node.inputs[1])
        if weight is None:
            continue
        base = module_of(node) or _layer_of(str(weight.name))
        if PART in node.metadata_props:
            base += ".outliers"
        name, number = base, 0
        while name in found or (name in taken and name != node.name):
            number += 1
            name = f"{base}_{number}"
        node.name = name
        found[name] = kind or precision
    return found


def _weight_behind(value: ir.Value | None) -> tuple[ir.Value | None, str | None]:
    """The constant matrix that a product's second input comes from, and what it is quantized to."""
    while value is not None:
        tensor = constant_of(value)
        if tensor is not None:
            return (value, _QUANTIZED.get(tensor.dtype)) if len(tensor.shape) == 2 else (None, None)
        node = value.producer()
        if node is None or node.op_type not in ("DequantizeLinear", "Transpose", "Reshape", "Cast"):
            return None, None
        value = node.inputs[0]
    return None, None


def _layer_of(weight: str) -> str:
    for end in ("_matrix", "_int8", "_fp8", ".weight"):
        weight = weight.removesuffix(end)
    return weight
