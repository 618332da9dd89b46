"""Turn a graph of fp32 numbers into a strongly typed one of fp16 or bf16, as TensorRT wants it since release 11.

Quantized layers keep their integers or FP8 numbers; their scales change type, and with those what is dequantized. What
half precision cannot hold stays in fp32 between casts: angles of rotary embeddings (a position times a frequency has
more digits than fp16), sums of squares, and functions other than effc's own operators.

onnxconverter-common, onnxruntime's copy of it and modelopt's autocast were looked at: the first two know no bf16 and
convert the scale inputs of quantized graphs, distance biases and angles like any other float; the last finds its types
by running the model, and asks for a dozen packages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from effc.errors import PassFailedError
from effc.passes.quantize_graph import Editor
from effc.plugins.operator import DOMAIN

_FLOAT = ir.DataType.FLOAT
# Their results or their inputs leave the range or the digits of fp16 in models that are otherwise well-behaved.
_IN_FLOAT = frozenset(
    {"Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal", "Cos", "Sin", "Exp", "Log"}
    | {"CumSum", "Range", "Resize", "Upsample", "RandomNormalLike", "RandomUniformLike"}
)
# What leads to these alone is computed in fp32 as well.
_PRECISE = frozenset({"Cos", "Sin"})
# The ONNX type is part of these nodes' attributes.
_TYPED = {"Cast": "to", "EyeLike": "dtype", "Range": "dtype"}
# Operators beyond the standard that take half precision; effc's kernels sum in fp32.
_WITH_KERNELS = ("SparseAttention", "LinearAttention", "RecurrentAttention", "BlockTopKAttention", "DistCollective")
# Inputs of effc's operators whose type does not follow the query's.
_OWN_TYPES = ("distance_bias", "distance_slope", "past_state", "past_normaliser", "key_sums")


@dataclass
class Conversion:
    """What became of a graph.

    Attributes:
        kept: nodes that still compute in fp32.
        clipped: numbers of constants that were beyond the largest fp16.
        largest: the largest of them, as a magnitude.
    """

    kept: list[str] = field(default_factory=list)
    clipped: int = 0
    largest: float = 0.0


def to_half(
    model: ir.Model, half: ir.DataType, keep: Collection[str] = (), as_half: Collection[str] = ()
) -> Conversion:
    """Convert in place; inputs and outputs stay fp32 except for those in ``as_half``.

    Args:
        half: ``FLOAT16`` or ``BFLOAT16``.
        keep: names of nodes that stay fp32 besides.
        as_half: names of graph inputs and outputs that change type, caches for example.

    Raises:
        PassFailedError: if a weight is not finite.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    _infer_types(model)
    converter = _Converter(model.graph, half, set(keep), set(as_half))
    converter.run()
    return converter.result


def _infer_types(model: ir.Model) -> None:
    """Give every value its type; rewrites leave some without."""
    if all(output.dtype is not None for node in model.graph for output in node.outputs):
        return
    functions = dict(model.functions)
    ShapeInferencePass()(model)
    model.functions.update(functions)
    for node in model.graph:
        for output in node.outputs:
            if output.dtype is None and (first := next((v for v in node.inputs if v is not None), None)) is not None:
                # What ONNX infers no type for is effc's own, and of its first input's type.
                output.type = first.type


class _Converter:
    def __init__(self, graph: ir.Graph, half: ir.DataType, keep: set[str], as_half: set[str]):
        self.result = Conversion()
        self._graph, self._half, self._as_half = graph, half, as_half
        self._numbers = np.dtype(np.float16 if half == ir.DataType.FLOAT16 else ml_dtypes.bfloat16)
        self._editor = Editor(graph)
        self._precise = _leading_to(graph, _PRECISE)
        self._keep = keep
        # For each value of the graph before: itself in the other precision.
        self._halves: dict[ir.Value, ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._were_float: set[ir.Value] = set()

    def run(self) -> None:
        for value in self._graph.inputs:
            if value.dtype == _FLOAT and value.name in self._as_half:
                value.dtype = self._half
                self._were_float.add(value)
        for node in list(self._graph):
            if node in self._precise or node.name in self._keep or self._stays(node):
                self._in_float(node)
            else:
                self._in_half(node)
        self._outputs()
        self._editor.drop_unused_initializers()

    def _stays(self, node: ir.Node) -> bool:
        if node.domain not in ("", DOMAIN) or any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            return True
        return (node.domain == DOMAIN and node.op_type not in _WITH_KERNELS) or node.op_type in _IN_FLOAT

    def _in_float(self, node: ir.Node) -> None:
        floats = False
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._were_float:
                node.replace_input_with(index, self._float(value, node))
                floats = True
        if floats or any(output.dtype == _FLOAT for output in node.outputs):
            self.result.kept.append(str(node.name or node.op_type))

    def _in_half(self, node: ir.Node) -> None:
        own = _own_types(node)
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if index in own:
                if value in self._were_float:
                    node.replace_input_with(index, self._float(value, node))
            elif value.dtype == _FLOAT and value not in self._were_float:
                node.replace_input_with(index, self._half_of(value, node))
        self._attributes(node)
        # States, which attention gives besides its output, are sums over a whole text.
        for output in node.outputs[:1] if node.domain == DOMAIN else node.outputs:
            if output.dtype == _FLOAT:
                output.dtype = self._half
                self._were_float.add(output)

    def _attributes(self, node: ir.Node) -> None:
        name = _TYPED.get(node.op_type)
        if name and node.domain == "" and node.attributes.get_int(name, 0) == _FLOAT:
            node.attributes[name] = ir.AttrInt64(name, self._half)
        elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == _FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self._narrow("value", tensor.numpy())))

    def _half_of(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._halves:
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input() and value.producer() is None:
                array = self._narrow(str(value.name), tensor.numpy())
                self._halves[value] = self._editor.initializer(f"{value.name}_half", array)
            else:
                self._halves[value] = self._cast(value, self._half, before)
        return self._halves[value]

    def _float(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._floats:
            self._floats[value] = self._cast(value, _FLOAT, before)
        return self._floats[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        return self._editor.insert(before, "Cast", [value], {"to": dtype}, like=value, dtype=dtype)[0]

    def _narrow(self, name: str, array: np.ndarray) -> np.ndarray:
        if np.isnan(array).any():
            raise PassFailedError(f"The constant '{name}' holds NaN.", "The checkpoint is damaged; load another one.")
        if self._half == ir.DataType.FLOAT16:
            top = float(np.finfo(np.float16).max)
            beyond = np.abs(array) > top
            if beyond.any():
                # Masks are made of such numbers, infinities among them; what counts is that they are very negative.
                self.result.clipped += int(beyond.sum())
                finite = np.abs(array[beyond & np.isfinite(array)])
                self.result.largest = max(self.result.largest, float(finite.max()) if finite.size else float("inf"))
                array = np.clip(array, -top, top)
        return array.astype(self._numbers)

    def _outputs(self) -> None:
        for index, value in enumerate(self._graph.outputs):
            if value not in self._were_float or value.name in self._as_half:
                continue
            name, producer = value.name, value.producer()
            assert producer is not None
            value.name = f"{name}_half"
            cast = ir.node("Cast", [value], {"to": _FLOAT}, name=f"{name}_float")
            cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = name, value.shape, _FLOAT
            self._graph.append(cast)
            self._graph.outputs[index] = cast.outputs[0]


def _own_types(node: ir.Node) -> set[int]:
    """Inputs of effc's operators that are fp32 whatever the query is."""
    from effc.plugins.function_body import is_attention

    if not is_attention(node):
        return set()
    from effc.exporters.engine_attention import given_inputs

    return {index for name, index in given_inputs(node).items() if name in _OWN_TYPES}


def _leading_to(graph: ir.Graph, targets: Iterable[str]) -> set[ir.Node]:
    """Nodes of those types, and float nodes all of whose results are read by such nodes alone."""
    found: set[ir.Node] = set()
    for node in reversed(graph):
        if node.op_type in targets:
            found.add(node)
            continue
        uses = [use.node for output in node.outputs for use in output.uses()]
        floats = any(output.dtype == _FLOAT for output in node.outputs)
        ends = any(output.is_graph_output() for output in node.outputs)
        if floats and uses and not ends and all(user in found for user in uses):
            found.add(node)
    return found
