"""The stage that adds the source's own files, and describes the artifact for ``effc.json``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import onnx_ir as ir

from effc import __version__
from effc.compiler.artifact import record_files
from effc.compiler.artifact_files import MODEL_NAME
from effc.compiler.inputs import graph_inputs
from effc.compiler.manifest import CheckpointRecord, EnginesRecord, GenerationRecord, Manifest, TensorRecord
from effc.compiler.pipeline_graph import Exported, Quantized
from effc.compiler.pipeline_job import Job
from effc.compiler.pipeline_model import ChangedModel
from effc.compiler.pruned_checkpoint import save_checkpoint
from effc.compiler.sentence_transformers import copy_modules
from effc.compiler.source import SourceModel
from effc.compiler.toolchain import toolchain


def save_source(job: Job, staging: Path) -> CheckpointRecord | None:
    """Write config and processor, and the changed model for transformers where it is asked for."""
    _save_files(job.source, staging)
    if not job.recipe.checkpoint.enabled:
        return None
    with job.log.step("checkpoint"):
        return save_checkpoint(job.source, staging, job.probe.inputs)


def describe(
    job: Job,
    changed: ChangedModel,
    exported: Exported,
    quantized: Quantized,
    generation: GenerationRecord | None,
    engines: EnginesRecord | None,
    checkpoint: CheckpointRecord | None,
    staging: Path,
) -> Manifest:
    """What ``effc.json`` says before anything is measured; all files of the artifact must be there."""
    source = job.source
    # Writes the tokens that a pruned vocabulary keeps, which is one of the files.
    compression = None if changed.compression is None else changed.compression.record(staging)
    return Manifest(
        effc_version=__version__,
        created=datetime.now(UTC),
        target=job.recipe.target,
        source=source.record(),
        recipe=job.recipe.model_dump(mode="json"),
        toolchain=toolchain(),
        export_key=exported.key,
        passes=job.log.records,
        attention=changed.layers,
        attention_search=changed.search,
        quantization_search=quantized.search,
        positions=source.positions,
        compression=compression,
        checkpoint=checkpoint,
        inputs=graph_inputs(source),
        outputs=_output_records(staging / MODEL_NAME),
        files=record_files(staging),
        generation=generation,
        engines=engines,
    )


def _save_files(source: SourceModel, directory: Path) -> None:
    source.config.save_pretrained(directory)
    if source.processor is not None:
        source.processor.save_pretrained(directory)
    copy_modules(source.located.directory, directory)


def _output_records(path: Path) -> list[TensorRecord]:
    graph = ir.load(str(path)).graph
    return [
        TensorRecord(
            name=value.name or "",
            dtype=str(value.dtype.numpy()) if value.dtype is not None else "unknown",
            shape=[dim if isinstance(dim, int) else str(dim.value) for dim in (value.shape or ())],
        )
        for value in graph.outputs
    ]
