"""INT8 weights and activations for linear layers, INT8 embedding tables, in the forms ONNX Runtime runs fastest.

Which form is fast is not obvious, and several that look alike are slower than fp32 (``benchmarks/int8_forms.py`` prints
the table). What is emitted, and why:

* Weights are symmetric int8 with a scale per output channel. Unsigned weights would run on a slow kernel. On CPUs with
  AVX2 but no VNNI, sums of two products saturate at 16 bits: in MiniLM 3 of 100,000 do, which raises the error of a
  layer from 4.4 to 5.1 %. ``reduce_range`` (7-bit weights) avoids that at 4.8 % on every CPU, so it is not the default.
* Activations are unsigned, one scale per tensor. Without calibration data it is found at run time:
  ``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul``, which ONNX Runtime fuses, bias included. With data it is a
  constant: ``QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear``, fused as well, with a float output: a
  quantized output would lose accuracy and pick ``QLinearMatMul``, which is slower.
* Layers that read the same value share one quantization of it. A packed query/key/value projection is taken apart
  again: three products of one quantized input write their results in place, a packed one has them copied by Split.
* A float bias behind a dequantized product may make ONNX Runtime fuse both into a float Gemm that dequantizes its
  weight in every run, slower than fp32. With constant ranges a bias is therefore an int32 of the products' scale in a
  Gemm over rows, which becomes one integer kernel, bias included; the reshapes around it copy nothing.
* An embedding table has a scale per row and is dequantized after the lookup.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.quantize_calibrate import Batch, Range, measure_ranges
from effc.passes.quantize_exclude import LEAST_TABLE_BYTES, Exclusion
from effc.passes.quantize_find import Columns, Embedding, Linear, find_embeddings, find_linears
from effc.passes.quantize_graph import Editor, constant_of, initializer_bytes, only_consumer, replace_value
from effc.passes.quantize_numbers import (
    Floats,
    activation_range,
    least_scale_for_bias,
    quantize_bias,
    quantize_columns,
    quantize_rows,
)
from effc.passes.quantize_settings import QuantizationSection
from effc.passes.quantize_unfuse import split_slow_fusions

QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
        "QGemm",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "GatherBlockQuantized",
    }
)
# DequantizeLinear learnt its axis in opset 13.
LEAST_OPSET = 13


@dataclass
class _Plan:
    linears: list[tuple[Linear, list[int]]] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Activation:
    """A quantized input.

    Attributes:
        constant: its scale where that is known before the run.
        floats: the input dequantized, once a product has asked for it.
        rows: the same as a matrix.
    """

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    constant: np.float32 | None = None
    floats: ir.Value | None = None
    rows: ir.Value | None = None


class QuantizeInt8(Pass[ir.Model, ir.Model]):
    """Quantize linear layers and embeddings of an ONNX graph to INT8.

    Args:
        settings: the recipe's ``quantization`` section.
        calibration: batches of model inputs, name -> array, tokenized; None to quantize activations dynamically.
    """

    name: ClassVar[str] = "quantize-int8"
    version: ClassVar[int] = 1

    def __init__(self, settings: QuantizationSection, calibration: Iterable[Batch] | None = None):
        self.settings: QuantizationSection = settings
        self.calibration = calibration

    def requires(self, model: ir.Model) -> None:
        """Check that the graph is not quantized yet, its opset suffices and every exclusion matches something.

        Raises:
            PreconditionError: naming the node, the opset or the glob.
        """
        for node in model.graph.all_nodes():
            if node.op_type in QUANTIZED_OPS:
                raise PreconditionError(
                    f"The graph is quantized already: node '{node.name}' is a {node.op_type}.",
                    "Start from the unquantized model, or use a recipe with `quantization: none`.",
                )
        opset = model.opset_imports.get("", 0)
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"The graph uses ONNX opset {opset}, and INT8 with a scale per channel needs {LEAST_OPSET}.",
                "Export the model again with a newer opset.",
            )
        embeddings = find_embeddings(model.graph) if self.settings.embeddings else ()
        Exclusion(model.graph, self.settings.exclude).check_globs(find_linears(model.graph), embeddings)

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        before = initializer_bytes(model)
        split = split_slow_fusions(model)
        plan = self._plan(model)
        inputs = list(dict.fromkeys(_input(linear) for linear, _ in plan.linears))
        ranges: dict[str, Range] | None = None
        if self.calibration is not None and inputs:
            ranges = measure_ranges(model, inputs, self.calibration, self.settings.calibration)
        rewriter = _Rewriter(model.graph, ranges, reduce_range=self.settings.reduce_range)
        for linear, chosen in plan.linears:
            rewriter.linear(linear, chosen)
        for embedding in plan.embeddings:
            rewriter.embedding(embedding)
        rewriter.editor.drop_unused_initializers()
        metrics = {
            "form": "dynamic" if ranges is None else "static",
            "linears": sum(len(chosen) for _, chosen in plan.linears),
            "embeddings": len(plan.embeddings),
            "quantized_inputs": len(inputs),
            "slow_fusions_split": split,
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
        }
        if ranges is not None:
            metrics["calibration_method"] = self.settings.calibration.method
        return PassResult(model, bool(rewriter.changed), rewriter.changed, plan.skipped, metrics)

    def ensures(self, model: ir.Model) -> None:
        """Check that no layer is left in fp32 without a reason.

        Raises:
            PassFailedError: naming the layer.
        """
        exclusion = Exclusion(model.graph, self.settings.exclude)
        for linear in find_linears(model.graph):
            for column, columns in enumerate(linear.columns):
                if exclusion.of_linear(linear, column) is None:
                    raise PassFailedError(f"{self.name} left '{columns.name}' in fp32 without a reason.")

    def _plan(self, model: ir.Model) -> _Plan:
        plan, exclusion = _Plan(), Exclusion(model.graph, self.settings.exclude)
        for linear in find_linears(model.graph):
            reasons = [exclusion.of_linear(linear, column) for column in range(len(linear.columns))]
            plan.skipped += [
                (columns.name, reason) for columns, reason in zip(linear.columns, reasons, strict=True) if reason
            ]
            if chosen := [column for column, reason in enumerate(reasons) if reason is None]:
                plan.linears.append((linear, chosen))
        for embedding in find_embeddings(model.graph) if self.settings.embeddings else ():
            if reason := exclusion.of_embedding(embedding):
                plan.skipped.append((embedding.name, reason))
            else:
                plan.embeddings.append(embedding)
        plan.skipped += _other_weights(model.graph)
        return plan


class _Rewriter:
    """Replaces fp32 nodes by INT8 ones."""

    def __init__(self, graph: ir.Graph, ranges: dict[str, Range] | None, *, reduce_range: bool):
        self.editor = Editor(graph)
        self.changed: list[str] = []
        self._ranges = ranges
        self._reduce_range = reduce_range
        self._activations: dict[ir.Value, _Activation] = {}
        self._weights: dict[Hashable, tuple[ir.Value, ir.Value, Floats]] = {}
        self._tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._leads: dict[Hashable, ir.Value] = {}
        self._shapes: dict[tuple[Hashable, int], ir.Value] = {}
        self._constant_shapes: dict[tuple[int, ...], ir.Value] = {}

    def linear(self, linear: Linear, chosen: list[int]) -> None:
        """Replace a product; of a packed one, the ``chosen`` parts become INT8 and the others fp32 products."""
        weight, bias = linear.weight(), linear.bias()
        for index, columns in enumerate(linear.columns):
            if index not in chosen:
                part = self.editor.initializer(f"{columns.name}.weight", weight[:, columns.start : columns.stop])
                (product,) = self.editor.insert(linear.node, "MatMul", [_input(linear), part], like=columns.output)
            else:
                activation = self._activation(linear)
                build = self._dynamic if activation.constant is None else self._static
                product = build(linear, columns, activation, weight[:, columns.start : columns.stop], bias)
                self.changed.append(columns.name)
            replace_value(columns.output, product)
        self.editor.graph.remove([linear.split, linear.node] if linear.split else linear.node, safe=True)

    def embedding(self, embedding: Embedding) -> None:
        """Replace a lookup of fp32 rows by one of int8 rows and their scales."""
        node, table = embedding.node, embedding.node.inputs[0]
        assert table is not None
        if table not in self._tables:
            quantized = quantize_rows(embedding.tensor().numpy())
            self._tables[table] = (
                self.editor.initializer(f"{embedding.name}.weight_int8", quantized.values),
                self.editor.initializer(f"{embedding.name}.weight_scale", quantized.scale),
            )
        values, scales = self._tables[table]
        insert, output = self.editor.insert, node.outputs[0]
        rows = insert(node, "Gather", [values, node.inputs[1]], {"axis": 0}, dtype=ir.DataType.INT8, origin=node)
        scale = insert(node, "Gather", [scales, node.inputs[1]], {"axis": 0}, origin=node)
        floats = insert(node, "Cast", rows, {"to": ir.DataType.FLOAT}, like=output, origin=node)
        (product,) = insert(node, "Mul", floats + scale, like=output, origin=node)
        replace_value(output, product)
        self.editor.graph.remove(node, safe=True)
        self.changed.append(embedding.name)

    def _activation(self, linear: Linear) -> _Activation:
        """The quantized input of a product, shared by all products that read it."""
        value = _input(linear)
        if value not in self._activations:
            self._activations[value] = self._quantize(value, linear.node)
        return self._activations[value]

    def _quantize(self, value: ir.Value, before: ir.Node) -> _Activation:
        insert = self.editor.insert
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
        if bias is not None:
            addend = self.editor.initializer(f"{columns.name}.bias", bias)
            (result,) = insert(node, "Add", [result, addend], like=like, origin=node)
        return result

    def _static(
        self, linear: Linear, columns: Columns, x: _Activation, weight: Floats, bias: Floats | None
    ) -> ir.Value:
        node, insert, like = linear.node, self.editor.insert, columns.output
        assert x.constant is not None
        adder = None if bias is not None else _bias_behind(columns)
        if adder is not None:
            bias = _bias_of(adder)
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


def _input(linear: Linear) -> ir.Value:
    value = linear.node.inputs[0]
    assert value is not None
    return value


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


def _other_weights(graph: ir.Graph) -> list[tuple[str, str]]:
    """Large constants that nodes of other kinds compute with, so that no fp32 weight is left unmentioned."""
    found = []
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "Gather", "Transpose", "Slice"):
            continue
        for value in node.inputs:
            tensor = constant_of(value)
            if value is None or tensor is None or len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
                continue
            if tensor.nbytes >= LEAST_TABLE_BYTES:
                found.append((str(value.name), f"a weight of {node.op_type}, which is not quantized"))
    return found
