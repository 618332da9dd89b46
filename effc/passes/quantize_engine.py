"""INT8 for TensorRT: explicit QuantizeLinear and DequantizeLinear with constant symmetric scales.

TensorRT builds a product in INT8 where both of its inputs are dequantized, and is strict about the form:

* No zero points, so activations are symmetric: one scale per tensor. Weights have one per output channel.
* Scales are constants. What ONNX Runtime does without calibration data (scales found in every run) has no counterpart.
* A bias is an addition behind the product, in the floats that the rest of the engine has. TensorRT fuses it.
* Embedding tables stay floats: a lookup of integers is no layer that TensorRT has.

ONNX Runtime runs the same graph on CPU, rounding as the engine does and multiplying the dequantized numbers in fp32
(INT8 products may be fused into integer kernels). So quality can be verified without a GPU.

FP8 needs no pass of its own: :class:`QuantizeFp8` writes the same form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.quantize_calibrate import Batch, measure_ranges
from effc.passes.quantize_exclude import Exclusion
from effc.passes.quantize_find import Columns, Linear
from effc.passes.quantize_graph import Editor, initializer_bytes
from effc.passes.quantize_numbers import Floats, quantize_columns
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_plan import (
    check_globs,
    check_nothing_left,
    check_opset,
    check_unquantized,
    input_of,
    make_plan,
)
from effc.passes.quantize_replace import replace_linear
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection

_STEPS = 127
# fp16 holds no smaller number without losing digits, and the scale becomes one.
_LEAST_HALF = float(np.finfo(np.float16).tiny)
_LEAST_OPSET = 13


class QuantizeInt8Engine(Pass[ir.Model, ir.Model]):
    """Quantize linear layers to INT8 as TensorRT takes it; see :class:`QuantizeInt8` for the arguments."""

    name: ClassVar[str] = "quantize-int8-engine"
    version: ClassVar[int] = 1

    def __init__(
        self,
        settings: QuantizationSection,
        calibration: Iterable[Batch] | None = None,
        schemes: Schemes | None = None,
        remembered: Remembered | None = None,
        *,
        alone: bool = True,
    ):
        self.settings: QuantizationSection = settings
        self.calibration = calibration
        self._schemes = schemes or Schemes(settings)
        self._remembered = remembered or Remembered()
        self._alone = alone

    def requires(self, model: ir.Model) -> None:
        """Check that there is calibration data and the graph is not quantized yet.

        Raises:
            PreconditionError: naming the node, the opset, the glob or the data.
        """
        if self._alone:
            check_unquantized(model)
            check_globs(model, self.settings)
        check_opset(model, _LEAST_OPSET, "INT8 with a scale per channel")
        require_calibration(self.calibration, "INT8")

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        before, editor = initializer_bytes(model), Editor(model.graph)
        plan = make_plan(model.graph, self._exclusion(model), embeddings=False)
        peaks = self._peaks(model, plan.keys())
        inputs: dict[ir.Value, ir.Value] = {}
        weights: dict[tuple[str, int, int], ir.Value] = {}
        changed: list[str] = []
        for linear, chosen in plan.linears:

            def build(columns: Columns, weight: Floats, bias: Floats | None, linear: Linear = linear) -> ir.Value:
                value, place = input_of(linear), (linear.weight_name, columns.start, columns.stop)
                if value not in inputs:
                    inputs[value] = _rounded_input(editor, linear.node, value, peaks[str(value.name)])
                if place not in weights:
                    weights[place] = _rounded_weight(editor, linear.node, columns.name, weight)
                both = [inputs[value], weights[place]]
                (result,) = editor.insert(linear.node, "MatMul", both, like=columns.output, origin=linear.node)
                if bias is not None:
                    addend = editor.initializer(f"{columns.name}.bias", bias)
                    (result,) = editor.insert(linear.node, "Add", [result, addend], like=columns.output)
                return result

            changed += replace_linear(editor, linear, chosen, build)
        editor.drop_unused_initializers()
        metrics = {
            "form": "static, symmetric",
            "linears": len(changed),
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
        }
        return PassResult(model, bool(changed), changed, plan.skipped, metrics)

    def ensures(self, model: ir.Model) -> None:
        """Check that no layer is left in floats without a reason.

        Raises:
            PassFailedError: naming the layer.
        """
        check_nothing_left(model, self._exclusion(model), self.name)

    def _exclusion(self, model: ir.Model) -> Exclusion:
        return Exclusion(model.graph, self.settings.exclude, self._schemes, "int8")

    def _peaks(self, model: ir.Model, keys: dict[ir.Value, str]) -> dict[str, float]:
        """The largest magnitude of each input by its name in this graph."""
        assert self.calibration is not None
        known = self._remembered.ranges
        if missing := [value for value, key in keys.items() if key not in known]:
            measured = measure_ranges(model, missing, self.calibration, self.settings.calibration)
            known.update({keys[value]: measured[str(value.name)] for value in missing})
        return {str(value.name): max(abs(edge) for edge in known[key]) for value, key in keys.items()}


def require_calibration(calibration: Iterable[Batch] | None, what: str) -> None:
    """Engines have no scales that are found in every run.

    Raises:
        PreconditionError: if there is no calibration data.
    """
    if calibration is None:
        raise PreconditionError(
            f"{what} engines need constant ranges of activations, and there is no calibration data.",
            "Give --calibration FILE, with texts like those that the model will see.",
        )


def _rounded_input(editor: Editor, before: ir.Node, value: ir.Value, peak: float) -> ir.Value:
    scale = editor.initializer(f"{value.name}_scale", np.float32(max(peak / _STEPS, _LEAST_HALF)))
    zero = editor.initializer("int8_zero_point", np.int8(0))
    rounded = editor.insert(before, "QuantizeLinear", [value, scale, zero], like=value, dtype=ir.DataType.INT8)
    return editor.insert(before, "DequantizeLinear", [*rounded, scale, zero], like=value)[0]


def _rounded_weight(editor: Editor, before: ir.Node, name: str, weight: Floats) -> ir.Value:
    quantized = quantize_columns(weight, least_scale=np.full(weight.shape[1], _LEAST_HALF, np.float32))
    stored = editor.initializer(f"{name}.weight_int8", quantized.values)
    scales = editor.initializer(f"{name}.weight_scale", quantized.scale)
    zeros = editor.initializer(f"{name}.weight_zero_point", np.zeros(quantized.scale.shape, np.int8))
    return editor.insert(before, "DequantizeLinear", [stored, scales, zeros], {"axis": 1})[0]
