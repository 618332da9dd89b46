"""The stage that measures the finished artifact: against the untouched model, and against its dense twin."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from effc.compiler.bench import bench, choose_lengths
from effc.compiler.exported import decode_twin_of, export_now, has_head_forms, twin_of
from effc.compiler.generation_build import forward_graph
from effc.compiler.manifest import BenchRecord, Manifest
from effc.compiler.pipeline_graph import Exported
from effc.compiler.pipeline_job import Job
from effc.compiler.pipeline_model import ChangedModel
from effc.compiler.twin import check_decode, dense_decode_twin, dense_twin
from effc.compiler.verify import verify

# Default lengths of the measurement that every compile makes; `effc bench` measures more.
_QUICK_LENGTHS = 3


def measure(job: Job, changed: ChangedModel, exported: Exported, staging: Path, manifest: Manifest) -> None:
    """Put quality and speed into ``manifest``, which the artifact at ``staging`` has as its ``effc.json``."""
    with job.log.step("verify"):
        manifest.verification = verify(staging, trust_remote_code=job.recipe.model.trust_remote_code)
    if job.benches:
        with job.log.step("bench"):
            manifest.benchmark = _bench(job, changed, exported, staging, manifest)


def _bench(job: Job, changed: ChangedModel, exported: Exported, staging: Path, manifest: Manifest) -> BenchRecord:
    recipe, source = job.recipe, job.source
    trusted = recipe.model.trust_remote_code

    def dense_export() -> ir.Model:
        with changed.rewritten.observed.using({}):
            return export_now(source)

    def dense_decode() -> Path:
        if source.weights is not None or has_head_forms(manifest.attention):
            return dense_decode_twin(manifest, trust_remote_code=trusted)
        check_decode(manifest)
        graph, _ = forward_graph(source, manifest.attention, exported.path)
        return decode_twin_of(graph, exported.key, manifest.attention)

    if source.weights is not None:
        # The model in memory is no longer the one to compare with.
        twin = dense_twin(manifest, trust_remote_code=trusted)
    else:
        twin = twin_of(exported.path, exported.key, manifest.attention, dense_export)
    return bench(
        staging,
        lengths=list(recipe.bench.lengths) or choose_lengths(manifest, None)[:_QUICK_LENGTHS],
        batch=recipe.bench.batch,
        rounds=recipe.bench.rounds,
        decode=recipe.bench.decode,
        twin=twin,
        decode_twin=dense_decode,
    )
