"""``--quant auto:0.01``: quantize as many layers as a quality budget allows, the least sensitive ones first.

1. Layers of shapes that quantization makes slower are left out; every shape is timed.
2. The change of the model's output by each layer alone is estimated, of all layers in one run.
3. The layers that change it most for each of their weights are left out, as few as bring the drop of all others
   together within the budget. Every number that is tried is measured on the finished graph, embeddings included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.calibration_text import CalibrationText, calibration_text, names_text, random_text
from effc.compiler.fewest_kept import fewest_kept
from effc.compiler.manifest import QuantizationSearch, QuantizedLayer
from effc.compiler.quantization_errors import LayerErrors, error_name, layer_errors, measured_error
from effc.compiler.quantization_speed import Shape, measure_speedups
from effc.compiler.recipe import Recipe
from effc.compiler.sensitivity import Effect, EffectSum, next_token_loss
from effc.compiler.source import SourceModel
from effc.passes.base import PassResult
from effc.passes.quantize import quantizing_passes
from effc.passes.quantize_calibrate import Batch, session_with_outputs
from effc.passes.quantize_find import find_linears
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_plan import input_of
from effc.passes.quantize_replace import Beside
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection
from effc.passes.quantize_smooth import smooths

CHOOSE, CHOOSE_VERSION = "choose-quantization", 2
# Tokens that a layer is timed on: of a prompt, and of one token written.
_PROMPT_ROWS, _WRITTEN_ROWS = 256, 1
# Timing two equal things differs by so much.
_NOISE = 0.97
FOR_QUALITY = "kept in fp32 to stay within the quality budget"
FOR_SPEED = "kept in fp32: quantized it is slower, {:.2f}x the speed"

Progress = Callable[[str], None]


@dataclass
class _Layer:
    """A linear layer.

    Attributes:
        group: layers of one group are kept together.
        asked: the recipe names its mode.
    """

    name: str
    shape: Shape
    group: Hashable
    asked: bool
    speedup: float | None = None
    error: float | None = None

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]


_Group = list[_Layer]


def choose_quantization(
    source: SourceModel,
    recipe: Recipe,
    graph: Path,
    calibration: Sequence[Batch] | None,
    remembered: Remembered,
    tell: Progress,
) -> tuple[QuantizationSearch, PassResult[Any]]:
    """Choose as the recipe says, on the texts that it names for calibration or else verification; on random inputs
    where it names none.

    Args:
        graph: the fused fp32 graph.
        remembered: takes what smoothing and calibration find.
        tell: told of every step.
    """
    if names_text(recipe, source):
        texts = calibration_text(recipe, source, "The choice of layers to quantize")
    else:
        texts = random_text(source, recipe.attention.max_length)
    found = search_quantization(source, graph, recipe.quantization, calibration, texts, remembered, tell)
    quantized = [layer.layer for layer in found.layers if layer.quantized]
    kept = [(name, reason) for name, (_, reason) in found.reasons().items()]
    metrics = {"drop": found.drop, "drop_name": found.drop_name, "budget": found.budget, "met": found.met}
    return found, PassResult(None, bool(quantized), quantized, kept, metrics)


def search_quantization(
    source: SourceModel,
    graph: Path,
    settings: QuantizationSection,
    calibration: Sequence[Batch] | None,
    texts: CalibrationText,
    remembered: Remembered,
    tell: Progress,
) -> QuantizationSearch:
    """Choose which layers of a graph are quantized.

    Args:
        source: says which metric fits; its model is what the graph was exported from.
        graph: the fused fp32 graph.
        settings: with a budget.
        texts: what the drop is measured on.
        remembered: takes what smoothing and calibration find.
    """
    started = time.perf_counter()
    budget = settings.budget
    assert budget is not None
    tell("timing layers")
    model = ir.load(str(graph))
    layers = _layers(model.graph, settings)
    beside = Beside(model.graph)
    for step in quantizing_passes(settings, calibration, None, remembered, beside):
        step.run(model)
    quantizable = {layer.name for layer in beside.layers}
    layers = [layer for layer in layers if layer.name in quantizable]
    slow = _time_layers([layer for layer in layers if not layer.asked], settings, source, calibration is not None)
    run = MeasuredChoices(source, graph, settings, calibration, texts, remembered)
    errors = layer_errors(source, model, beside, texts, tell)
    measured = [layer for layer in layers if not layer.asked and layer not in slow]
    run.measure_missing(errors, [layer.name for layer in measured], [layer.name for layer in layers], tell)
    for layer in measured:
        layer.error = errors.errors[layer.name]
    order = _order(measured)
    effects: dict[int, Effect] = {}

    def drop(kept: int) -> float:
        tell(f"{sum(map(len, order[kept:]))} of {len(measured)} layers together")
        effects[kept] = run.effect(_chosen(order[:kept], slow))
        return effects[kept].error

    kept = fewest_kept([_error(group) for group in order], budget, drop)
    chosen, final = _chosen(order[:kept], slow), effects[kept]
    return QuantizationSearch(
        request=settings.mode,
        mode=settings.base_mode,
        budget=budget,
        data=texts.data,
        samples=len(texts.samples),
        tokens=texts.tokens,
        layers=[_record(layer, chosen) for layer in layers],
        error_name=errors.name,
        drop=final.error,
        drop_name=final.error_name,
        output_error=final.output_error,
        met=final.error <= budget,
        measured=len(effects),
        seconds=time.perf_counter() - started,
    )


def _layers(graph: ir.Graph, settings: QuantizationSection) -> list[_Layer]:
    """All linear layers, in graph order; one that runs several times counts once."""
    schemes = Schemes(settings)
    found: dict[str, _Layer] = {}
    for linear in find_linears(graph):
        for columns in linear.columns:
            asked = schemes.asked(columns.name, linear.weight_name, linear.node.name)
            shape = (linear.fan_in, columns.stop - columns.start)
            # Smoothing scales an activation for all layers that read it, or for none.
            group: Hashable = input_of(linear) if smooths(settings) else columns.name
            found.setdefault(columns.name, _Layer(columns.name, shape, group, asked))
    return list(found.values())


def _order(layers: list[_Layer]) -> list[_Group]:
    """The groups, those first that change the output most for each of their weights."""
    groups: dict[Hashable, _Group] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return sorted(groups.values(), key=lambda group: -_error(group) / sum(layer.weights for layer in group))


def _error(group: _Group) -> float:
    return sum(layer.error or 0.0 for layer in group)


def _time_layers(
    layers: list[_Layer], settings: QuantizationSection, source: SourceModel, static: bool
) -> list[_Layer]:
    """Time every layer; those that are slower than in fp32."""
    mode = settings.base_mode
    if mode == "fp8":
        return []  # Made for engines; on CPU it is emulated.
    writes = mode.endswith("-weights") and source.task.name == "causal-lm"
    rows = _WRITTEN_ROWS if writes else _PROMPT_ROWS
    speedups = measure_speedups((layer.shape for layer in layers), settings, mode, rows, static=static)
    for layer in layers:
        layer.speedup = speedups[layer.shape]
    return [layer for layer in layers if speedups[layer.shape] < _NOISE]


def _chosen(sensitive: list[_Group], slow: list[_Layer]) -> dict[str, tuple[str, str]]:
    kept = {layer.name: ("none", FOR_QUALITY) for group in sensitive for layer in group}
    return kept | {layer.name: ("none", FOR_SPEED.format(layer.speedup)) for layer in slow}


def _record(layer: _Layer, chosen: Mapping[str, tuple[str, str]]) -> QuantizedLayer:
    mode, reason = chosen.get(layer.name, ("", None))
    return QuantizedLayer(
        layer=layer.name,
        weights=layer.weights,
        quantized=mode != "none",
        reason=reason,
        error=layer.error,
        speedup=layer.speedup,
    )


class MeasuredChoices:
    """Runs finished graphs of any choice of layers on the texts, beside the fp32 graph."""

    def __init__(
        self,
        source: SourceModel,
        graph: Path,
        settings: QuantizationSection,
        calibration: Sequence[Batch] | None,
        texts: CalibrationText,
        remembered: Remembered,
    ):
        self._source, self._graph, self._settings = source, graph, settings
        self._calibration, self._texts, self._remembered = calibration, texts, remembered

    def measure_missing(self, errors: LayerErrors, layers: Sequence[str], every: Sequence[str], tell: Progress) -> None:
        """Add the errors of ``layers`` that have none, each measured with all of ``every`` but itself in fp32."""
        missing = [name for name in layers if name not in errors.errors]
        for number, name in enumerate(missing, 1):
            tell(f"sensitivity, layer {number} of {len(missing)} by a run of its own")
            chosen = {other: ("none", FOR_QUALITY) for other in every if other != name}
            outputs = self._outputs(chosen, EffectSum(self._source, self._texts), embeddings=False)
            found = []
            for prepared, expected, actual in outputs:
                errors.name = error_name(expected)
                found.append(measured_error(expected, actual, prepared))
            errors.errors[name] = sum(found) / len(found)

    def effect(self, chosen: Mapping[str, tuple[str, str]]) -> Effect:
        """What quantizing changes when layers have the modes ``chosen``, and the others that of the settings."""
        total = EffectSum(self._source, self._texts)
        for prepared, expected, actual in self._outputs(chosen, total):
            total.add(prepared, expected, actual, self._loss(prepared, expected))
        return total.effect()

    def _outputs(
        self, chosen: Mapping[str, tuple[str, str]], total: EffectSum, *, embeddings: bool = True
    ) -> Iterator[tuple[Mapping[str, Any], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
        """Each batch as both graphs are given it, what the fp32 graph makes of it, and what the quantized one makes."""
        settings = self._settings
        settings = settings if embeddings else settings.model_copy(update={"embeddings": False})
        plain, model = ir.load(str(self._graph)), ir.load(str(self._graph))
        for step in quantizing_passes(settings, self._calibration, Schemes(settings, chosen), self._remembered):
            step.run(model)
        with session_with_outputs(plain, []) as before, session_with_outputs(model, []) as after:
            for batch in self._texts.batches:
                prepared = total.quality.prepare(batch)
                yield prepared, _run(before, prepared), _run(after, prepared)

    def _loss(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[float, int] | None:
        predicts = self._source.task.name == "causal-lm" and self._texts.samples
        return next_token_loss(batch, outputs) if predicts else None


def _run(session: onnxruntime.InferenceSession, batch: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: np.asarray(batch[value.name]) for value in session.get_inputs()}
    return dict(zip(names, session.run(None, feeds), strict=True))
