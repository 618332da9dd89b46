"""Queries, keys and values rounded to INT8 or E4M3 in front of every attention operator, with one scale each.

What an engine whose attention takes 8-bit inputs computes with (as FlashAttention-3 does for FP8: Shah et al., 2024,
"FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision"), as far as the inputs go: scores,
softmax and weights stay in floats. ONNX Runtime rounds and multiplies in fp32, so it gains no speed; the quality can be
verified with it on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.quantize_activation import FORMATS, rounded
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_graph import Editor
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_plan import check_globs, check_opset, check_unquantized
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins.function_body import geometry_of, is_attention

_INPUTS = ("query", "key", "value")
# QuantizeLinear learnt float8 in opset 19.
_LEAST_OPSET = 19


class QuantizeAttention(Pass[ir.Model, ir.Model]):
    """Round what attention reads.

    Args:
        settings: the recipe's ``quantization`` section, whose ``attention`` names the format.
        calibration: batches of model inputs, name -> array; scales are found in every run where there are none.
        remembered: ranges that another graph of the same model has found, and takes those of this one.
        alone: refuse a graph that holds anything quantized.
    """

    name: ClassVar[str] = "quantize-attention"
    version: ClassVar[int] = 2

    def __init__(
        self,
        settings: QuantizationSection,
        calibration: Iterable[Batch] | None = None,
        remembered: Remembered | None = None,
        *,
        alone: bool = True,
    ):
        self.settings: QuantizationSection = settings
        self.calibration = calibration
        self._remembered = remembered or Remembered()
        self._alone = alone

    def requires(self, model: ir.Model) -> None:
        """Check that there is attention to quantize.

        Raises:
            PreconditionError: if there is none, all of it is excluded, the opset is too old, or the graph quantized.
        """
        if self._alone:
            check_unquantized(model)
            check_globs(model, self.settings)
        if not any(True for _ in self._chosen(model)):
            raise PreconditionError(
                "quantization.attention is given, and no attention operator is left to quantize.",
                "Leave it out, or exclude fewer layers.",
            )
        check_opset(model, _LEAST_OPSET, "8-bit attention inputs")

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        form, editor = FORMATS[self.settings.attention], Editor(model.graph)
        chosen = list(self._chosen(model))
        # A value that several layers read has one scale, under the name of the first.
        keys: dict[ir.Value, str] = {}
        for node in chosen:
            for name, value in zip(_INPUTS, node.inputs[:3], strict=True):
                assert value is not None
                keys.setdefault(value, f"{node.name}.{name}")
        peaks = self._peaks(model, keys)
        done: dict[ir.Value, ir.Value] = {}
        for node in chosen:
            for place, value in enumerate(node.inputs[:3]):
                assert value is not None
                if value not in done:
                    done[value] = rounded(editor, node, value, form, peaks.get(value), _width(node, place))
                node.replace_input_with(place, done[value])
        changed = [str(node.name) for node in chosen]
        skipped = [
            (str(node.name), f"excluded by '{glob}'")
            for node in model.graph
            if is_attention(node) and (glob := self._excluding(node)) is not None
        ]
        metrics = {
            "form": "dynamic" if self.calibration is None else "static",
            "layers": len(changed),
            "note": f"queries, keys and values rounded to {form.name.upper()}, attention in floats: no faster on CPU",
        }
        return PassResult(model, bool(changed), changed, skipped, metrics)

    def ensures(self, model: ir.Model) -> None:
        """Check that every attention operator reads rounded inputs, or is excluded.

        Raises:
            PassFailedError: naming the layer.
        """
        for node in self._chosen(model):
            for value in node.inputs[:3]:
                producer = None if value is None else value.producer()
                if producer is None or producer.op_type != "DequantizeLinear":
                    raise PassFailedError(f"{self.name} left an input of '{node.name}' as it was.")

    def _chosen(self, model: ir.Model) -> Iterator[ir.Node]:
        return (node for node in model.graph if is_attention(node) and self._excluding(node) is None)

    def _excluding(self, node: ir.Node) -> str | None:
        return next((glob for glob in self.settings.exclude if fnmatchcase(str(node.name), glob)), None)

    def _peaks(self, model: ir.Model, keys: dict[ir.Value, str]) -> dict[ir.Value, float]:
        """Measured on the calibration data, or remembered; nothing where there are no data."""
        if self.calibration is None:
            return {}
        ranges = self._remembered.measured_ranges(model, keys, self.calibration, self.settings.calibration)
        return {value: max(abs(low), abs(high)) for value, (low, high) in ranges.items()}


def _width(node: ir.Node, place: int) -> int:
    """Numbers of a position in an input; each has the scale written down.

    ONNX Runtime 1.31 moves a pair with one constant scale past the reshape in front of a branch of the operator's body,
    and ends the process there.
    """
    geometry = geometry_of(node)
    return geometry.head_dim * (geometry.num_heads if place == 0 else geometry.kv_heads)
