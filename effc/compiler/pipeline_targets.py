"""The stage that makes what stands beside ``model.onnx``: the graph that writes text, engines, a torch program."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from effc.compiler.artifact_files import MODEL_NAME
from effc.compiler.engine_check import EnginePlan
from effc.compiler.engine_sources import forward_source, generation_sources
from effc.compiler.engine_torch import build_torch_program
from effc.compiler.engines import ENGINES_VERSION, build_engines
from effc.compiler.generation_build import GENERATION_VERSION, add_generation, end_and_padding
from effc.compiler.manifest import AttentionLayer, EnginesRecord, GenerationRecord
from effc.compiler.pipeline_graph import Exported, Quantized
from effc.compiler.pipeline_job import Job
from effc.compiler.pipeline_log import Step
from effc.errors import PreconditionError
from effc.exporters.generation_export import positions_of
from effc.passes.base import PassResult
from effc.passes.engine_settings import TORCH_TARGET


def make_generation(
    job: Job, layers: list[AttentionLayer], exported: Exported, quantized: Quantized, staging: Path
) -> GenerationRecord | None:
    """Make the generating graph; a model that cannot generate from caches is compiled without one, and told so."""
    if job.engine is not None or not job.generates:
        return None
    settings = job.recipe.quantization
    with job.log.step("generation") as step:
        try:
            record, proof, hit = add_generation(
                job.source,
                layers,
                settings if settings.active else None,
                job.calibration,
                exported.path,
                staging,
                quantized.schemes,
                quantized.remembered,
                kept_in=settings.kv_cache,
            )
        except PreconditionError as error:
            _without(step, job, error)
            return None
        metrics = {
            "bytes_shared": record.weights_shared,
            "relative_error_to_torch": proof.relative_error,
            "top1_agreement_with_torch": proof.top1_agreement,
        }
        result: PassResult[Any] = PassResult(None, True, [layer.layer for layer in record.layers], metrics=metrics)
        step.record(GENERATION_VERSION, result, cached=hit)
    return record


def _without(step: Step, job: Job, error: PreconditionError) -> None:
    reason = [(type(job.source.model).__name__, error.problem)]
    step.record(GENERATION_VERSION, PassResult(None, False, skipped=reason))


def make_engines(
    job: Job, layers: list[AttentionLayer], exported: Exported, quantized: Quantized, staging: Path
) -> EnginesRecord | None:
    """Build the engines that the recipe asks for."""
    if job.engine is None:
        return None
    with job.log.step("engines") as step:
        record, skipped = _build_engines(job, job.engine, layers, exported, quantized, staging)
        result: PassResult[Any] = PassResult(None, True, [engine.file for engine in record.engines], skipped)
        step.record(ENGINES_VERSION, result)
    return record


def _build_engines(
    job: Job,
    plan: EnginePlan,
    layers: list[AttentionLayer],
    exported: Exported,
    quantized: Quantized,
    staging: Path,
) -> tuple[EnginesRecord, list[tuple[str, str]]]:
    """The engines; a model that cannot generate from caches gets that of its forward pass, and the reason is told."""
    source, path = job.source, staging / MODEL_NAME
    skipped: list[tuple[str, str]] = []
    given = {name: value.numpy() for name, value in job.probe.inputs.items()}
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f".{staging.name}-graphs-") as work:
        sources = forward_source(path)
        if job.generates:
            job.log.tell("prefill and decode graphs")
            alike = (quantized.schemes, quantized.remembered)
            try:
                sources = generation_sources(
                    source, layers, job.recipe, job.calibration, alike, exported.path, path, Path(work)
                )
            except PreconditionError as error:
                skipped.append((type(source.model).__name__, error.problem))
        mask = job.probe.inputs.get("attention_mask")
        if mask is not None:
            given["position_ids"] = positions_of(mask).numpy()
        record = build_engines(
            plan, job.recipe.engine, sources, source.max_length, exported.path, given, staging, job.log.tell
        )
    if sources[0].name != "forward":
        record.eos_token_ids, record.pad_token_id = end_and_padding(source.model, source.processor)
    return record, skipped


def make_torch_program(job: Job, staging: Path) -> None:
    """Build the program for Torch-TensorRT, if that is the target."""
    if job.recipe.target != TORCH_TARGET:
        return
    with job.log.step("torch-tensorrt") as step:
        program = build_torch_program(job.source, job.recipe.engine, staging, job.log.tell)
        result: PassResult[Any] = PassResult(None, True, [f"{program.parent.name}/{program.name}"])
        step.record(ENGINES_VERSION, result)
