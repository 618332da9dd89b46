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

from typing import ClassVar

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.base import PassResult
from effc.passes.quantize_calibrate import Range
from effc.passes.quantize_exclude import Exclusion
from effc.passes.quantize_graph import initializer_bytes
from effc.passes.quantize_int8_rewrite import Int8Rewriter
from effc.passes.quantize_linears import QuantizeLinears
from effc.passes.quantize_numbers import (
    Floats,
)
from effc.passes.quantize_observe import observe
from effc.passes.quantize_plan import check_opset, make_plan
from effc.passes.quantize_unfuse import split_slow_fusions

# DequantizeLinear learnt its axis in opset 13, ReduceMax takes its axes as an input since 18.
LEAST_OPSET = 13
LEAST_OPSET_PER_TOKEN = 18


class QuantizeInt8(QuantizeLinears):
    """Quantize linear layers and embeddings of an ONNX graph to INT8.

    Without calibration data activations are quantized dynamically.
    """

    name: ClassVar[str] = "quantize-int8"
    version: ClassVar[int] = 2

    def requires(self, model: ir.Model) -> None:
        """Check that the graph is not quantized yet, its opset suffices and every exclusion matches something.

        Raises:
            PreconditionError: naming the node, the opset, the glob or the option.
        """
        super().requires(model)
        check_opset(model, LEAST_OPSET, "INT8 with a scale per channel")
        if self.settings.activations == "token":
            check_opset(model, LEAST_OPSET_PER_TOKEN, "INT8 with a scale per token")
        if self.settings.bias_correction and self.calibration is None:
            raise PreconditionError(
                "Bias correction needs the mean of every input, and there is no calibration data.",
                "Give --calibration, or leave bias_correction out.",
            )

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        before = initializer_bytes(model)
        split = split_slow_fusions(model)
        embeddings = self.settings.embeddings and self._beside is None
        plan = make_plan(model.graph, self._exclusion(model), embeddings=embeddings)
        form = self._form()
        keys = plan.keys()
        ranges = self._ranges(model, keys) if form == "static" and keys else None
        means = self._means(model, keys) if self.settings.bias_correction else {}
        rewriter = Int8Rewriter(
            model.graph,
            ranges,
            means,
            reduce_range=self.settings.reduce_range,
            per_token=form == "per-token",
            beside=self._beside,
        )
        for linear, chosen in plan.linears:
            rewriter.linear(linear, chosen)
        for embedding in plan.embeddings:
            rewriter.embedding(embedding)
        if self._beside is None:
            rewriter.editor.drop_unused_initializers()
        metrics = {
            "form": form,
            "linears": sum(len(chosen) for _, chosen in plan.linears),
            "embeddings": len(plan.embeddings),
            "quantized_inputs": len(keys),
            "slow_fusions_split": split,
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
        }
        if ranges is not None:
            metrics["calibration_method"] = self.settings.calibration.method
        return PassResult(model, bool(rewriter.changed), rewriter.changed, plan.skipped, metrics)

    def _exclusion(self, model: ir.Model) -> Exclusion:
        return Exclusion(model.graph, self.settings.exclude, self._schemes, "int8")

    def _form(self) -> str:
        if self.settings.activations == "token":
            return "per-token"
        return "dynamic" if self.calibration is None else "static"

    def _ranges(self, model: ir.Model, keys: dict[ir.Value, str]) -> dict[str, Range]:
        """The range of each input, by its name in this graph."""
        assert self.calibration is not None
        known, stats = self._remembered.ranges, self._remembered.stats
        if self.settings.calibration.method == "minmax":
            for key in keys.values():
                if key in stats and key not in known:
                    seen = self._remembered.smoothed(key)
                    known[key] = float(seen.low.min()), float(seen.high.max())
        ranges = self._remembered.measured_ranges(model, keys, self.calibration, self.settings.calibration)
        return {str(value.name): found for value, found in ranges.items()}

    def _means(self, model: ir.Model, keys: dict[ir.Value, str]) -> dict[str, Floats]:
        """The mean of each input ``[fan_in]``, by its name in this graph."""
        assert self.calibration is not None
        known = self._remembered
        if missing := {value: key for value, key in keys.items() if key not in known.stats}:
            known.put(observe(model, missing, self.calibration))
        return {str(value.name): known.smoothed(key).mean for value, key in keys.items()}
