"""Base of the passes that write products as pairs of QuantizeLinear and DequantizeLinear around a float MatMul."""

from __future__ import annotations

from abc import abstractmethod

import onnx_ir as ir

from effc.passes.quantize_find import Columns, Linear
from effc.passes.quantize_graph import Editor
from effc.passes.quantize_linears import QuantizeLinears
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_plan import Plan, input_of
from effc.passes.quantize_replace import replace_linear

Peaks = dict[str, float]
"""The largest magnitude of each input, by its name in the graph."""


class QuantizePairs(QuantizeLinears):
    """A product of two dequantized factors, and an addition behind it for a bias."""

    @abstractmethod
    def _rounded_input(self, editor: Editor, before: ir.Node, value: ir.Value, peaks: Peaks | None) -> ir.Value:
        """``value``, quantized and dequantized; ``peaks`` is None where ranges are found in every run."""

    @abstractmethod
    def _rounded_weight(self, editor: Editor, before: ir.Node, name: str, weight: Floats, key: str) -> ir.Value:
        """A weight ``[fan_in, width]``, dequantized; ``key`` names what multiplies it, see :meth:`Plan.keys`."""

    def _replace(self, editor: Editor, plan: Plan, peaks: Peaks | None) -> list[str]:
        """Replace every product of the plan, rounding what several of them read once; their names."""
        keys = plan.keys()
        inputs: dict[ir.Value, ir.Value] = {}
        weights: dict[tuple[str, int, int], ir.Value] = {}
        changed: list[str] = []
        for linear, chosen in plan.linears:

            def build(columns: Columns, weight: Floats, bias: Floats | None, linear: Linear = linear) -> ir.Value:
                node, value = linear.node, input_of(linear)
                place = (linear.weight_name, columns.start, columns.stop)
                if value not in inputs:
                    inputs[value] = self._rounded_input(editor, node, value, peaks)
                if place not in weights:
                    weights[place] = self._rounded_weight(editor, node, columns.name, weight, keys[value])
                both = [inputs[value], weights[place]]
                (result,) = editor.insert(node, "MatMul", both, like=columns.output, origin=node)
                if bias is not None:
                    addend = editor.initializer(f"{columns.name}.bias", bias)
                    (result,) = editor.insert(node, "Add", [result, addend], like=columns.output)
                return result

            changed += replace_linear(editor, linear, chosen, build, self._beside)
        if self._beside is None:
            editor.drop_unused_initializers()
        return changed

    def _peaks(self, model: ir.Model, plan: Plan) -> Peaks:
        """Measured on the calibration data, or remembered."""
        assert self.calibration is not None
        ranges = self._remembered.measured_ranges(model, plan.keys(), self.calibration, self.settings.calibration)
        return {str(value.name): max(abs(low), abs(high)) for value, (low, high) in ranges.items()}
