"""``--quant auto:0.01``: quantize as many layers as a quality budget allows, the least sensitive ones first.

One graph holds every layer in fp32 and quantized, with a switch for each. So one session measures what a layer alone
changes and what any choice changes together, with the kernels that will be deployed.

1. Layers of shapes that quantization makes slower are left out; every shape is timed.
2. Each layer alone is quantized, and the change of the model's output is measured.
3. The most sensitive layers are left out, as few as bring the drop of all others together within the budget.
4. The graph is quantized so, embeddings included, and measured; more layers are left out if it misses the budget.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.calibration_text import CalibrationText, calibration_text, names_text, random_text
from effc.compiler.manifest import QuantizationSearch, QuantizedLayer
from effc.compiler.quantization_speed import Shape, measure_speedups
from effc.compiler.recipe import Recipe
from effc.compiler.sensitivity import Effect, EffectSum, next_token_loss
from effc.compiler.source import SourceModel
from effc.passes.base import PassResult
from effc.passes.quantize import quantizing_passes
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_find import find_linears
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_plan import input_of
from effc.passes.quantize_replace import FLAGS, Switches
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection

CHOOSE, CHOOSE_VERSION = "choose-quantization", 1
# Tokens that a layer is timed on: of a prompt, and of one token written.
_PROMPT_ROWS, _WRITTEN_ROWS = 256, 1
# Timing two equal things differs by so much.
_NOISE = 0.97
_TRIES = 4
FOR_QUALITY = "kept in fp32 to stay within the quality budget"
FOR_SPEED = "kept in fp32: quantized it is slower, {:.2f}x the speed"

Progress = Callable[[str], None]


@dataclass
class _Unit:
    """Layers of one shape that read the same value, which are quantized together."""

    name: str
    layers: list[str]
    shape: Shape
    asked: bool
    speedup: float | None = None
    effect: Effect | None = None


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
    quantized = [name for unit in found.layers if unit.quantized for name in unit.layers]
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
        source: says which metric fits.
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
    units = _units(model.graph, settings)
    switches = Switches(model.graph)
    for step in quantizing_passes(settings, calibration, None, remembered, switches):
        step.run(model)
    units = _switched(units, switches.names)
    free = [unit for unit in units if not unit.asked]
    slow = _time_units(free, settings, source, static=calibration is not None)
    measured = [unit for unit in free if unit not in slow]
    with _session(model) as session:
        run = _Run(source, session, texts, switches)
        always = [name for unit in units if unit.asked for name in unit.layers]
        choices = [unit.layers for unit in measured]
        for unit, effect in zip(measured, run.effects(choices, tell), strict=True):
            unit.effect = effect
        order = sorted(measured, key=_sensitivity)
        kept = _fewest_kept(order, budget, always, run, tell)
    final: Effect | None = None
    chosen: dict[str, tuple[str, str]] = {}
    for attempt in range(_TRIES):
        tell("proving the choice")
        chosen = _chosen(order[len(order) - kept :], slow)
        final = _deployed(source, graph, settings, calibration, texts, remembered, chosen)
        if final.error <= budget or kept == len(order) or attempt == _TRIES - 1:
            break
        kept = min(len(order), kept + max(1, len(order) // 10))
    assert final is not None
    return QuantizationSearch(
        request=settings.mode,
        mode=settings.base_mode,
        budget=budget,
        data=texts.data,
        samples=len(texts.samples),
        tokens=texts.tokens,
        layers=[_record(unit, chosen) for unit in units],
        drop=final.error,
        drop_name=final.error_name,
        output_error=final.output_error,
        met=final.error <= budget,
        seconds=time.perf_counter() - started,
    )


def _sensitivity(unit: _Unit) -> float:
    """The relative error of the output: the drop of a single layer is often smaller than its noise."""
    assert unit.effect is not None
    return unit.effect.output_error


def _units(graph: ir.Graph, settings: QuantizationSection) -> list[_Unit]:
    """All linear layers of a graph without switches, those that read the same value together, in graph order."""
    schemes = Schemes(settings)
    units: dict[tuple[ir.Value, bool, Shape], _Unit] = {}
    for linear in find_linears(graph):
        for columns in linear.columns:
            asked = schemes.asked(columns.name, linear.weight_name, linear.node.name)
            shape = (linear.fan_in, columns.stop - columns.start)
            key = (input_of(linear), asked, shape)
            units.setdefault(key, _Unit(columns.name, [], shape, asked)).layers.append(columns.name)
    return list(units.values())


def _switched(units: list[_Unit], names: Sequence[str]) -> list[_Unit]:
    """The units whose layers have a switch; others are not to be quantized at all."""
    for unit in units:
        unit.layers = [name for name in unit.layers if name in names]
        unit.name = unit.layers[0] if unit.layers else unit.name
    return [unit for unit in units if unit.layers]


def _time_units(units: list[_Unit], settings: QuantizationSection, source: SourceModel, *, static: bool) -> list[_Unit]:
    """Time every unit; those that are slower than fp32."""
    mode = settings.base_mode
    if mode == "fp8":
        return []  # Made for engines; on CPU it is emulated.
    writes = mode.endswith("-weights") and source.task.name == "causal-lm"
    rows = _WRITTEN_ROWS if writes else _PROMPT_ROWS
    speedups = measure_speedups((unit.shape for unit in units), settings, mode, rows, static=static)
    for unit in units:
        unit.speedup = speedups[unit.shape]
    return [unit for unit in units if speedups[unit.shape] < _NOISE]


def _fewest_kept(order: list[_Unit], budget: float, always: list[str], run: _Run, tell: Progress) -> int:
    """How many of the most sensitive units (the last ones) must stay in fp32; by bisection."""
    low, high = 0, len(order)
    while low < high:
        kept = (low + high) // 2
        tell(f"{len(order) - kept} of {len(order)} layers together")
        layers = always + [name for unit in order[: len(order) - kept] for name in unit.layers]
        (effect,) = run.effects([layers], None)
        if effect.error <= budget:
            high = kept
        else:
            low = kept + 1
    return low


def _chosen(sensitive: list[_Unit], slow: list[_Unit]) -> dict[str, tuple[str, str]]:
    kept = {name: ("none", FOR_QUALITY) for unit in sensitive for name in unit.layers}
    reverted = {name: ("none", FOR_SPEED.format(unit.speedup)) for unit in slow for name in unit.layers}
    return kept | reverted


def _record(unit: _Unit, chosen: Mapping[str, tuple[str, str]]) -> QuantizedLayer:
    mode, reason = chosen.get(unit.name, ("", None))
    effect = unit.effect
    return QuantizedLayer(
        layer=unit.name,
        layers=unit.layers,
        quantized=mode != "none",
        reason=reason,
        error=None if effect is None else effect.output_error,
        drop=None if effect is None else effect.error,
        speedup=unit.speedup,
    )


class _Run:
    """Runs choices of layers on the texts, in the graph with switches."""

    def __init__(
        self, source: SourceModel, session: onnxruntime.InferenceSession, texts: CalibrationText, switches: Switches
    ):
        self._source, self._session, self._texts = source, session, texts
        self._names = switches.names

    def effects(self, choices: Sequence[Sequence[str]], tell: Progress | None) -> list[Effect]:
        """What each choice of layers changes against none."""
        sums = [EffectSum(self._source, self._texts) for _ in choices]
        total = len(self._texts.batches) * len(choices)
        if not sums:
            return []
        for number, batch in enumerate(self._texts.batches):
            for sum_ in sums:
                prepared = sum_.quality.prepare(batch)
            expected = self._outputs(prepared, [])
            loss = _loss(self._source, self._texts, prepared, expected)
            for index, (sum_, layers) in enumerate(zip(sums, choices, strict=True)):
                if tell:
                    tell(f"sensitivity, run {number * len(choices) + index + 1} of {total}")
                sum_.add(prepared, expected, self._outputs(prepared, layers), loss)
        return [sum_.effect() for sum_ in sums]

    def _outputs(self, batch: Mapping[str, Any], layers: Sequence[str]) -> dict[str, NDArray[Any]]:
        chosen = set(layers)
        flags = np.array([name in chosen for name in self._names], dtype=bool)
        return _run(self._session, {**batch, FLAGS: flags})


def _deployed(
    source: SourceModel,
    graph: Path,
    settings: QuantizationSection,
    calibration: Sequence[Batch] | None,
    texts: CalibrationText,
    remembered: Remembered,
    chosen: Mapping[str, tuple[str, str]],
) -> Effect:
    """What the finished choice changes, embeddings included."""
    model = ir.load(str(graph))
    for step in quantizing_passes(settings, calibration, Schemes(settings, chosen), remembered):
        step.run(model)
    total = EffectSum(source, texts)
    with _session(ir.load(str(graph))) as plain, _session(model) as quantized:
        for batch in texts.batches:
            prepared = total.quality.prepare(batch)
            expected = _run(plain, prepared)
            total.add(prepared, expected, _run(quantized, prepared), _loss(source, texts, prepared, expected))
    return total.effect()


def _loss(
    source: SourceModel, texts: CalibrationText, batch: Mapping[str, Any], outputs: Mapping[str, Any]
) -> tuple[float, int] | None:
    return next_token_loss(batch, outputs) if source.task.name == "causal-lm" and texts.samples else None


def _run(session: onnxruntime.InferenceSession, batch: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: np.asarray(batch[value.name]) for value in session.get_inputs()}
    return dict(zip(names, session.run(None, feeds), strict=True))


@contextmanager
def _session(model: ir.Model) -> Iterator[onnxruntime.InferenceSession]:
    """A session of a graph, whose weights go through a file, which has no 2 GB limit."""
    with tempfile.TemporaryDirectory(prefix="effc-search-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
