"""Linear layers and embeddings of a graph, replaced one by one by INT8 nodes; which ones and why: `quantize_int8`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.passes.quantize_calibrate import Range
from effc.passes.quantize_embeddings import quantize_embedding
from effc.passes.quantize_find import Columns, Embedding, Linear
from effc.passes.quantize_graph import Editor, constant_of, only_consumer, replace_value
from effc.passes.quantize_numbers import (
    LEAST_SCALE,
    Floats,
    activation_range,
    least_scale_for_bias,
    quantize_bias,
    quantize_columns,
)
from effc.passes.quantize_plan import input_of
from effc.passes.quantize_replace import Beside, replace_linear

_TOKEN_STEPS = 127


@dataclass
class _Activation:
    """A quantized input.

    Attributes:
        constant: its scale where that is known before the run.
        floats: the input dequantized, once a product has asked for it.
        rows: the same as a matrix.
        tokens: what each token was divided by, ``[..., 1]``.
    """

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    constant: np.float32 | None = None
    floats: ir.Value | None = None
    rows: ir.Value | None = None
    tokens: ir.Value | None = None


class Int8Rewriter:
    """Replaces fp32 nodes by INT8 ones.

    Args:
        graph: changed in place.
        ranges: the range of each input by its name; None finds it in every run.
        means: the mean of each input ``[fan_in]`` by its name, of those whose bias is to be corrected.
        reduce_range: weights of 7 bits.
        per_token: a scale per token in place of one per tensor.
        beside: keep the fp32 layers beside the INT8 ones.
    """

    def __init__(
        self,
        graph: ir.Graph,
        ranges: dict[str, Range] | None,
        means: dict[str, Floats],
        *,
        reduce_range: bool,
        per_token: bool,
        beside: Beside | None = None,
    ):
        self.editor = Editor(graph)
        self.changed: list[str] = []
        self._beside = beside
        self._ranges = ranges
        self._means = means
        self._reduce_range = reduce_range
        self._per_token = per_token
        self._activations: dict[ir.Value, _Activation] = {}
        self._weights: dict[Hashable, tuple[ir.Value, ir.Value, Floats]] = {}
        self._tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._leads: dict[Hashable, ir.Value] = {}
        self._shapes: dict[tuple[Hashable, int], ir.Value] = {}
        self._constant_shapes: dict[tuple[int, ...], ir.Value] = {}
        self._unit: tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None = None

    def linear(self, linear: Linear, chosen: list[int]) -> None:
        """Replace a product; of a packed one, the ``chosen`` parts become INT8 and the others fp32 products."""

        def build(columns: Columns, weight: Floats, bias: Floats | None) -> ir.Value:
            activation = self._activation(linear)
            make = self._dynamic if activation.constant is None else self._static
            return make(linear, columns, activation, weight, bias)

        self.changed += replace_linear(self.editor, linear, chosen, build, self._beside)

    def embedding(self, embedding: Embedding) -> None:
        """Replace a lookup of fp32 rows by one of int8 rows and their scales."""
        replace_value(embedding.node.outputs[0], quantize_embedding(self.editor, embedding, self._tables))
        self.editor.graph.remove(embedding.node, safe=True)
        self.changed.append(embedding.name)

    def _activation(self, linear: Linear) -> _Activation:
        """The quantized input of a product, shared by all products that read it."""
        value = input_of(linear)
        if value not in self._activations:
            self._activations[value] = self._quantize(value, linear.node)
        return self._activations[value]

    def _quantize(self, value: ir.Value, before: ir.Node) -> _Activation:
        insert = self.editor.insert
        if self._per_token:
            return self._quantize_tokens(value, before)
        if self._ranges is None:
            values, scale, zero = insert(
                before, "DynamicQuantizeLinear", [value], like=value, dtype=ir.DataType.UINT8, num_outputs=3
            )
            scale.dtype, zero.dtype = ir.DataType.FLOAT, ir.DataType.UINT8
            scale.shape = zero.shape = ir.Shape(())
            return _Activation(values, scale, zero)
        factor, offset = activation_range(*self._ranges[str(value.name)])
        scale = self.editor.initializer(f"{value.name}_scale", factor)
        zero = self.editor.initializer(f"{value.name}_zero_point", offset)
        (values,) = insert(before, "QuantizeLinear", [value, scale, zero], like=value, dtype=ir.DataType.UINT8)
        return _Activation(values, scale, zero, constant=factor)

    def _quantize_tokens(self, value: ir.Value, before: ir.Node) -> _Activation:
        """Divide every token by its largest value, so that one constant scale fits all."""
        insert = self.editor.insert
        if self._unit is None:
            self._unit = (
                self.editor.initializer("token_unit_scale", np.float32(1 / _TOKEN_STEPS)),
                self.editor.initializer("token_unit_zero_point", np.uint8(128)),
                self.editor.initializer("token_axis", np.array([-1], np.int64)),
                self.editor.initializer("token_least", np.float32(LEAST_SCALE)),
            )
        scale, zero, axis, least = self._unit
        size = insert(before, "Abs", [value], like=value)
        peak = insert(before, "ReduceMax", [*size, axis], {"keepdims": 1})
        (tokens,) = insert(before, "Max", [*peak, least])
        unit = insert(before, "Div", [value, tokens], like=value)
        (values,) = insert(before, "QuantizeLinear", [*unit, scale, zero], like=value, dtype=ir.DataType.UINT8)
        return _Activation(values, scale, zero, tokens=tokens)

    def _weight(
        self, linear: Linear, columns: Columns, floats: Floats, least_scale: Floats | None = None
    ) -> tuple[ir.Value, ir.Value, Floats]:
        """Quantized weight, its scale, and the scale's figures; made once for layers that share a weight."""
        floor = None if least_scale is None else least_scale.tobytes()
        key = (linear.node.inputs[1], linear.node.op_type, columns.start, columns.stop, floor)
        if key not in self._weights:
            quantized = quantize_columns(floats, reduce_range=self._reduce_range, least_scale=least_scale)
            self._weights[key] = (
                self.editor.initializer(f"{columns.name}.weight_int8", quantized.values),
                self.editor.initializer(f"{columns.name}.weight_scale", quantized.scale),
                quantized.scale,
            )
        return self._weights[key]

    def _dynamic(
        self, linear: Linear, columns: Columns, x: _Activation, weight: Floats, bias: Floats | None
    ) -> ir.Value:
        node, insert = linear.node, self.editor.insert
        values, scale, _ = self._weight(linear, columns, weight)
        like = columns.output
        product = insert(
            node, "MatMulInteger", [x.values, values, x.zero_point], like=like, dtype=ir.DataType.INT32, origin=node
        )
        floats = insert(node, "Cast", product, {"to": ir.DataType.FLOAT}, like=like, origin=node)
        # Multiplying the scales first is what ONNX Runtime's fusion looks for.
        factor = insert(node, "Mul", [x.scale, scale])
        (result,) = insert(node, "Mul", floats + factor, like=like, origin=node)
        if x.tokens is not None:
            (result,) = insert(node, "Mul", [result, x.tokens], like=like, origin=node)
        bias = self._corrected(linear, columns, weight, bias)
        if bias is not None:
            addend = self.editor.initializer(f"{columns.name}.bias", bias)
            (result,) = insert(node, "Add", [result, addend], like=like, origin=node)
        return result

    def _static(
        self, linear: Linear, columns: Columns, x: _Activation, weight: Floats, bias: Floats | None
    ) -> ir.Value:
        node, insert, like = linear.node, self.editor.insert, columns.output
        assert x.constant is not None
        # With a switch the Add has to stay behind it.
        adder = None if bias is not None or self._beside is not None else _bias_behind(columns)
        if adder is not None:
            bias = _bias_of(adder)
        bias = self._corrected(linear, columns, weight, bias)
        floor = None if bias is None else least_scale_for_bias(bias, x.constant)
        values, scale, figures = self._weight(linear, columns, weight, floor)
        zeros = self.editor.initializer(f"{columns.name}.weight_zero_point", np.zeros(figures.shape, np.int8))
        floats = insert(node, "DequantizeLinear", [values, scale, zeros], {"axis": 1})
        if bias is None:
            return insert(node, "MatMul", [self._dequantized(x, node), *floats], like=like, origin=node)[0]
        products = np.float32(x.constant) * figures
        integers = self.editor.initializer(f"{columns.name}.bias_int32", quantize_bias(bias, products))
        unit = self.editor.initializer(f"{columns.name}.bias_scale", products)
        addend = insert(node, "DequantizeLinear", [integers, unit], {"axis": 0})
        rank = None if x.values.shape is None else len(x.values.shape)
        if rank is None and adder is not None:
            adder.replace_input_with(_bias_index(adder), addend[0])
            return insert(node, "MatMul", [self._dequantized(x, node), *floats], like=like, origin=node)[0]
        if rank is None or rank == 2:
            result = insert(node, "Gemm", [self._dequantized(x, node), *floats, *addend], like=like, origin=node)
        else:
            flat = insert(node, "Gemm", [self._rows(x, node, linear.fan_in), *floats, *addend], origin=node)
            shape = self._leading(x, node, len(figures))
            result = insert(node, "Reshape", [*flat, shape], like=like, origin=node)
        if adder is not None:
            replace_value(adder.outputs[0], *result)
            self.editor.graph.remove(adder, safe=True)
        return result[0]

    def _corrected(self, linear: Linear, columns: Columns, weight: Floats, bias: Floats | None) -> Floats | None:
        """The bias, plus what rounding the weight takes from the mean of the output."""
        mean = self._means.get(str(input_of(linear).name))
        if mean is None:
            return bias
        quantized = quantize_columns(weight, reduce_range=self._reduce_range)
        shift = (mean @ (weight - quantized.values * quantized.scale)).astype(np.float32)
        return shift if bias is None else np.asarray(bias + shift, np.float32)

    def _dequantized(self, x: _Activation, before: ir.Node) -> ir.Value:
        if x.floats is None:
            inputs = [x.values, x.scale, x.zero_point]
            (x.floats,) = self.editor.insert(before, "DequantizeLinear", inputs, like=x.values)
        return x.floats

    def _rows(self, x: _Activation, before: ir.Node, width: int) -> ir.Value:
        """The dequantized input as a matrix ``[rows, width]``: only a Gemm takes a bias into the integer product."""
        if x.rows is None:
            shape = self._constant_shape(-1, width)
            (rows,) = self.editor.insert(before, "Reshape", [x.values, shape], dtype=ir.DataType.UINT8)
            rows.shape = ir.Shape([None, width])
            (x.rows,) = self.editor.insert(before, "DequantizeLinear", [rows, x.scale, x.zero_point], like=rows)
        return x.rows

    def _leading(self, x: _Activation, before: ir.Node, width: int) -> ir.Value:
        """The shape ``[..., width]`` with the leading dimensions of ``x``; made once for inputs of equal dimensions."""
        assert x.values.shape is not None
        dimensions = tuple(x.values.shape)[:-1]
        known = all(isinstance(size, int) or size.value is not None for size in dimensions)
        key = tuple(map(str, dimensions)) if known else x.values
        if key not in self._leads:
            rank = {"start": 0, "end": len(dimensions)}
            (self._leads[key],) = self.editor.insert(before, "Shape", [x.values], rank, dtype=ir.DataType.INT64)
        if (key, width) not in self._shapes:
            parts = [self._leads[key], self._constant_shape(width)]
            (self._shapes[key, width],) = self.editor.insert(
                before, "Concat", parts, {"axis": 0}, dtype=ir.DataType.INT64
            )
        return self._shapes[key, width]

    def _constant_shape(self, *sizes: int) -> ir.Value:
        if sizes not in self._constant_shapes:
            name = "shape_" + "_".join(map(str, sizes)).replace("-1", "any")
            self._constant_shapes[sizes] = self.editor.initializer(name, np.array(sizes, np.int64))
        return self._constant_shapes[sizes]


def _bias_behind(columns: Columns) -> ir.Node | None:
    """The Add of a constant ``[fan_out]`` that alone reads the product."""
    adder = only_consumer(columns.output, "Add")
    if adder is None:
        return None
    tensor = constant_of(adder.inputs[_bias_index(adder)])
    return adder if tensor is not None and tuple(tensor.shape.numpy()) == (columns.stop - columns.start,) else None


def _bias_index(adder: ir.Node) -> int:
    return 1 if constant_of(adder.inputs[1]) is not None else 0


def _bias_of(adder: ir.Node) -> Floats:
    tensor = constant_of(adder.inputs[_bias_index(adder)])
    assert tensor is not None
    return tensor.numpy()
