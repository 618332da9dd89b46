"""What all stages of one compile share: the recipe, the loaded model, and what every pass is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from effc.compiler.attention_search import needs_search
from effc.compiler.calibration_data import CalibrationData
from effc.compiler.compress import Probe, run_torch
from effc.compiler.engine_check import EnginePlan
from effc.compiler.inputs import probe_inputs
from effc.compiler.manifest import OutputDeviation
from effc.compiler.metrics import compare_outputs
from effc.compiler.pipeline_log import StepLog
from effc.compiler.progress import Progress
from effc.compiler.pruned_checkpoint import check_savable
from effc.compiler.recipe import Recipe
from effc.compiler.recover import Recovery
from effc.compiler.source import SourceModel, load, locate
from effc.errors import UsageError
from effc.passes.engine_settings import TORCH_TARGET
from effc.passes.quantize import quantizing_passes
from effc.passes.quantize_for_engine import engine_quantizing_passes


@dataclass
class Job:
    """One compile.

    Attributes:
        engine: the engines to build, or None.
        source: the model; the stages change it in place.
        generates: whether the artifact is to write text.
        data: calibration data as the user gave them, or None where nothing is quantized.
        calibration: the same as inputs of the model, or None.
        recovery: what to train on, or None.
        probe: what every pass is measured on, and what the untouched model makes of it.
    """

    recipe: Recipe
    engine: EnginePlan | None
    log: StepLog
    source: SourceModel
    generates: bool
    data: CalibrationData | None
    calibration: list[dict[str, NDArray[Any]]] | None
    recovery: Recovery | None
    probe: Probe

    @property
    def benches(self) -> bool:
        """Whether speed is measured: an engine is timed on the GPU that it is for."""
        return self.recipe.bench.enabled and self.engine is None

    def deviation(self) -> dict[str, OutputDeviation]:
        """How far the model is from the untouched one now, by output."""
        return compare_outputs(self.probe.untouched, run_torch(self.source, self.probe.inputs), self.probe.mask)

    def read_calibration(self) -> None:
        """Read the calibration data as the model numbers its tokens now."""
        self.calibration = None if self.data is None else self.data.batches(self.source)


def load_job(
    recipe: Recipe, engine: EnginePlan | None, calibration_items: Iterable[Any] | None, progress: Progress | None
) -> Job:
    """Load the source model and read all data, and check what can only be checked of a loaded model.

    Raises:
        UsageError, SourceModelError, DataError, PreconditionError: see each.
    """
    log = StepLog(_steps(recipe, engine), progress)
    data = CalibrationData(recipe, calibration_items) if recipe.quantization.active else None
    with log.step("load"):
        source = load(locate(recipe.model))
    generates = recipe.generation.enabled and source.task.name == "causal-lm"
    log.steps += generates and engine is None
    _check_generation(recipe, generates)
    if recipe.checkpoint.enabled:
        check_savable(source)
    calibration = None if data is None else data.batches(source)
    recovery = Recovery.read(recipe, source) if recipe.recover.enabled else None
    inputs = probe_inputs(source)
    probe = Probe(inputs, run_torch(source, inputs))
    return Job(recipe, engine, log, source, generates, data, calibration, recovery, probe)


def _steps(recipe: Recipe, engine: EnginePlan | None) -> int:
    """How many steps a compile has, but for the graph that writes text: that depends on the model."""
    quantizers = quantizing_passes if engine is None else engine_quantizing_passes
    always = ("load", "rewrite", "export", "fuse", "verify")
    asked = (
        recipe.low_rank is not None,
        recipe.positions.max_length is not None,
        needs_search(recipe.attention),
        recipe.positions.sparse,
        recipe.recover.enabled,
        recipe.quantization.budget is not None,
        engine is not None,
        recipe.target == TORCH_TARGET,
        recipe.checkpoint.enabled,
        recipe.bench.enabled and engine is None,
    )
    return len(always) + len(recipe.prune) + sum(asked) + len(list(quantizers(recipe.quantization, None)))


def _check_generation(recipe: Recipe, generates: bool) -> None:
    kept_in = recipe.quantization.kv_cache
    if kept_in != "fp32" and not (generates and recipe.target == "onnxruntime"):
        raise UsageError(
            f"quantization.kv_cache {kept_in} is for models that write text on the target onnxruntime, with a "
            "generating graph.",
            "Leave it out.",
        )
    if generates and recipe.engine.tensor_parallel > 1:
        raise UsageError(
            "Engines that write text keep caches, which several GPUs cannot share as they are served.",
            "Leave --tensor-parallel out, or build the forward pass alone with --no-generation.",
        )
