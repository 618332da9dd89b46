"""INT8 for TensorRT: explicit QuantizeLinear and DequantizeLinear with constant symmetric scales.

TensorRT builds a product in INT8 where both of its inputs are dequantized, and is strict about the form:

* No zero points, so activations are symmetric: one scale per tensor. Weights have one per output channel.
* Scales are constants. What ONNX Runtime does without calibration data (scales found in every run) has no counterpart.
* A bias is an addition behind the product, in the floats that the rest of the engine has. TensorRT fuses it.
* Embedding tables stay floats: a lookup of integers is no layer that TensorRT has.
* Where a product behind a gate is asked for, its outliers stay floats, see :mod:`effc.passes.quantize_gated`.

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
from effc.passes.base import PassResult
from effc.passes.quantize_activation import INT8, LEAST_HALF, rounded
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_exclude import Exclusion
from effc.passes.quantize_gated import split_gated
from effc.passes.quantize_graph import Editor, initializer_bytes
from effc.passes.quantize_numbers import Floats, quantize_columns
from effc.passes.quantize_pairs import Peaks, QuantizePairs
from effc.passes.quantize_plan import check_opset, make_plan

_LEAST_OPSET = 13


class QuantizeInt8Engine(QuantizePairs):
    """Quantize linear layers to INT8 as TensorRT takes it; see :class:`QuantizeLinears` for the arguments."""

    name: ClassVar[str] = "quantize-int8-engine"
    version: ClassVar[int] = 2

    def requires(self, model: ir.Model) -> None:
        """Check that there is calibration data and the graph is not quantized yet.

        Raises:
            PreconditionError: naming the node, the opset, the glob or the data.
        """
        super().requires(model)
        check_opset(model, _LEAST_OPSET, "INT8 with a scale per channel")
        require_calibration(self.calibration, "INT8")

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        assert self.calibration is not None
        before, editor = initializer_bytes(model), Editor(model.graph)
        split = split_gated(model, self._exclusion(model), self.calibration, self._remembered)
        plan = make_plan(model.graph, self._exclusion(model), embeddings=False)
        changed = self._replace(editor, plan, self._peaks(model, plan))
        metrics = {
            "form": "static, symmetric",
            "linears": len(changed),
            "split": len(split),
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
        }
        return PassResult(model, bool(changed), changed, plan.skipped, metrics)

    def _exclusion(self, model: ir.Model) -> Exclusion:
        return Exclusion(model.graph, self.settings.exclude, self._schemes, "int8")

    def _rounded_input(self, editor: Editor, before: ir.Node, value: ir.Value, peaks: Peaks | None) -> ir.Value:
        assert peaks is not None
        return rounded(editor, before, value, INT8, peaks[str(value.name)])

    def _rounded_weight(self, editor: Editor, before: ir.Node, name: str, weight: Floats, key: str) -> ir.Value:
        quantized = quantize_columns(weight, least_scale=np.full(weight.shape[1], LEAST_HALF, np.float32))
        stored = editor.initializer(f"{name}.weight_int8", quantized.values)
        scales = editor.initializer(f"{name}.weight_scale", quantized.scale)
        zeros = editor.initializer(f"{name}.weight_zero_point", np.zeros(quantized.scale.shape, np.int8))
        return editor.insert(before, "DequantizeLinear", [stored, scales, zeros], {"axis": 1})[0]


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
