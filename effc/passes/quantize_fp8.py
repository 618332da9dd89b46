"""FP8 (E4M3) weights and activations as QuantizeLinear and DequantizeLinear around float products.

Made for engines that run such products in FP8 (TensorRT on GPUs of compute capability 8.9 and newer). ONNX Runtime on
CPU rounds to E4M3 and multiplies in fp32: the numerics are those of the engine's inputs, bit by bit, so that the
quality can be verified on any machine; it is slower than fp32 there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effc.passes.base import PassResult
from effc.passes.quantize_activation import E4M3, rounded
from effc.passes.quantize_exclude import Exclusion, Rules
from effc.passes.quantize_gptq import Feedback, round_with_feedback
from effc.passes.quantize_graph import Editor, initializer_bytes
from effc.passes.quantize_numbers import LEAST_SCALE, Floats
from effc.passes.quantize_pairs import Peaks, QuantizePairs
from effc.passes.quantize_plan import check_opset, make_plan

# QuantizeLinear learnt float8 in opset 19.
LEAST_OPSET = 19
_GPTQ_BLOCK = 128

Numbers = npt.NDArray[Any]
"""Of ml_dtypes.float8_e4m3fn."""


class QuantizeFp8(QuantizePairs):
    """Quantize linear layers to FP8; see :class:`QuantizeLinears` for the arguments."""

    name: ClassVar[str] = "quantize-fp8"
    version: ClassVar[int] = 2

    def requires(self, model: ir.Model) -> None:
        """Check that the graph is not quantized yet and its opset knows FP8.

        Raises:
            PreconditionError: naming the node, the opset, the glob or the method.
        """
        super().requires(model)
        self._check_method()
        check_opset(model, LEAST_OPSET, "FP8")

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        before, editor = initializer_bytes(model), Editor(model.graph)
        plan = make_plan(model.graph, self._exclusion(model), embeddings=False)
        if self.settings.weights.method == "gptq":
            self._observe_moments(model, plan.keys())
        peaks = None if self.calibration is None or not plan.linears else self._peaks(model, plan)
        changed = self._replace(editor, plan, peaks)
        metrics = {
            "form": "dynamic" if peaks is None else "static",
            "linears": sum(len(chosen) for _, chosen in plan.linears),
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
            "note": "rounded to FP8 and multiplied in fp32: for engines, and no faster on CPU",
        }
        return PassResult(model, bool(changed), changed, plan.skipped, metrics)

    def _exclusion(self, model: ir.Model) -> Exclusion:
        # A floating-point format holds a gate's outliers.
        return Exclusion(model.graph, self.settings.exclude, self._schemes, "fp8", Rules(gated=False))

    def _rounded_input(self, editor: Editor, before: ir.Node, value: ir.Value, peaks: Peaks | None) -> ir.Value:
        return rounded(editor, before, value, E4M3, None if peaks is None else peaks[str(value.name)])

    def _rounded_weight(self, editor: Editor, before: ir.Node, name: str, weight: Floats, key: str) -> ir.Value:
        known = self._remembered.fp8
        if name not in known:
            feedback = self._feedback(key) if self.settings.weights.method == "gptq" else None
            known[name] = quantize_columns_fp8(weight, feedback)
        return _stored_weight(editor, before, name, *known[name])


def quantize_columns_fp8(weight: Floats, feedback: Feedback | None = None) -> tuple[Numbers, Floats]:
    """E4M3 numbers shaped like ``weight [fan_in, fan_out]`` and a scale ``[fan_out]`` per output channel.

    Args:
        feedback: round by GPTQ; to nearest if None.
    """
    scale = np.maximum(np.abs(weight).max(axis=0) / E4M3.largest, LEAST_SCALE).astype(np.float32)

    def number(part: Floats) -> Numbers:
        return np.asarray(np.clip(part / scale, -E4M3.largest, E4M3.largest).astype(ml_dtypes.float8_e4m3fn))

    if feedback is None:
        return number(weight), scale
    values = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    places = iter(feedback.order)

    def round_row(row: Floats, _: int) -> Floats:
        place = next(places)
        values[place] = number(row)
        return np.asarray(values[place].astype(np.float32) * scale, np.float32)

    round_with_feedback(weight[feedback.order], feedback.spread, _GPTQ_BLOCK, lambda left: round_row)
    return values, scale


def _stored_weight(editor: Editor, before: ir.Node, name: str, values: Numbers, scale: Floats) -> ir.Value:
    # ONNX Runtime takes a plain pair of dequantized FP8 factors for an INT8 product and then refuses the graph. It does
    # not look behind a Reshape, which costs nothing.
    stored = editor.initializer(f"{name}.weight_fp8", values[None])
    inputs = [stored, editor.initializer(f"{name}.weight_scale", scale)]
    floats = editor.insert(before, "DequantizeLinear", inputs, {"axis": 2})
    shape = editor.initializer("fp8_weight_shape", np.array(values.shape, np.int64))
    return editor.insert(before, "Reshape", [*floats, shape])[0]
