"""The stage that makes ``model.onnx``: export, fuse, choose modes, quantize; every graph is run on the probe."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from effc.compiler.compress import Probe
from effc.compiler.exported import EXPORT_VERSION, export_key, exported_graph
from effc.compiler.manifest import OutputDeviation, QuantizationSearch
from effc.compiler.metrics import compare_outputs
from effc.compiler.pipeline_job import Job
from effc.compiler.pipeline_model import ChangedModel
from effc.compiler.quantization_search import CHOOSE, CHOOSE_VERSION, choose_quantization
from effc.errors import PassFailedError
from effc.exporters.onnx_graph import save_onnx
from effc.passes.base import PassResult
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.prepare_engine import PrepareEngine
from effc.passes.quantize import GraphPass, quantizing_passes
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes
from effc.plugins.bodies import OPSET


@dataclass(frozen=True)
class Exported:
    """The exported graph, unfused and in fp32, in the cache.

    Attributes:
        key: that of the cache, and of the dense twin.
    """

    path: Path
    key: str


@dataclass(frozen=True)
class Quantized:
    """What further graphs of the same model need, to be quantized alike.

    Attributes:
        schemes: the mode of every layer.
        remembered: what quantizing the first graph has found.
        search: how the modes were chosen, or None where the recipe names them.
    """

    schemes: Schemes
    remembered: Remembered
    search: QuantizationSearch | None


def export(job: Job, changed: ChangedModel) -> Exported:
    """Export the changed model, or take it from the cache."""
    with job.log.step("export") as step:
        path, hit = exported_graph(job.source, changed.layers)
        key = export_key(job.source, changed.layers)
        step.record(EXPORT_VERSION, PassResult(None, True, metrics={"opset": OPSET}), cached=hit)
    return Exported(path, key)


def fuse(job: Job, exported: Exported, path: Path) -> None:
    """Write the exported graph to ``path``, fused for what will run it."""
    fusion: GraphPass = FuseOnnxRuntime() if job.engine is None else PrepareEngine()
    with job.log.step(fusion.name) as step:
        graph = ir.load(str(exported.path))
        result = fusion.run(graph)
        fusion.ensures(graph)
        save_onnx(graph, path)
        record = step.record(fusion.version, result)
        record.probe = _deviation(path, job.probe)


def quantize(job: Job, path: Path) -> Quantized:
    """Quantize the graph at ``path`` as the recipe says.

    Raises:
        PreconditionError, DataError, PassFailedError: see the passes.
    """
    settings, remembered = job.recipe.quantization, Remembered()
    schemes, found = _choose(job, path, remembered)
    if settings.active:
        quantizers = quantizing_passes if job.engine is None else engine_quantizing_passes
        for quantizer in quantizers(settings, job.calibration, schemes, remembered):
            with job.log.step(quantizer.name) as step:
                graph = ir.load(str(path))
                result = quantizer.run(graph)
                quantizer.ensures(graph)
                _replace(graph, path)
                record = step.record(quantizer.version, result)
                record.probe = _deviation(path, job.probe)
    return Quantized(schemes, remembered, found)


def _choose(job: Job, path: Path, remembered: Remembered) -> tuple[Schemes, QuantizationSearch | None]:
    settings = job.recipe.quantization
    if settings.budget is None:
        return Schemes(settings), None
    with job.log.step(CHOOSE) as step:
        found, result = choose_quantization(job.source, job.recipe, path, job.calibration, remembered, job.log.tell)
        step.record(CHOOSE_VERSION, result)
    return Schemes(settings, found.reasons()), found


def _deviation(path: Path, probe: Probe) -> dict[str, OutputDeviation]:
    """The graph against the untouched model on the probe inputs.

    Raises:
        PassFailedError: if an output is not finite.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feed = {value.name: probe.inputs[value.name].numpy() for value in session.get_inputs()}
    outputs = dict(zip(names, session.run(None, feed), strict=True))
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise PassFailedError(
                f"The graph's output '{name}' is not finite after this pass.", "Exclude layers, or report this model."
            )
    return compare_outputs(probe.untouched, outputs, probe.mask)


def _replace(graph: ir.Model, path: Path) -> None:
    """Write a graph over the files that its own weights are still read from."""
    with tempfile.TemporaryDirectory(dir=path.parent) as fresh:
        save_onnx(graph, Path(fresh) / path.name)
        for file in sorted(Path(fresh).iterdir()):
            file.replace(path.with_name(file.name))
