"""The stage that changes the torch model: compress, extend, choose forms, rewrite, thin out positions, recover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.compiler.attention_search import SEARCH_VERSION, needs_search, resolved, search
from effc.compiler.calibrate_forms import calibrate_forms
from effc.compiler.compress import Compression, compresses
from effc.compiler.manifest import AttentionLayer, AttentionSearch
from effc.compiler.pipeline_job import Job
from effc.compiler.positions import extend_positions, thin_positions
from effc.compiler.recover import RECOVER, RECOVER_VERSION, recover
from effc.compiler.recovery import refuse_untrained
from effc.compiler.rewrite import Rewritten, observe_attention, rewrite
from effc.passes.base import PassResult
from effc.passes.extend_positions import ExtendPositions
from effc.passes.observed_attention import ObservedAttention
from effc.passes.rewrite_attention import RewriteAttention
from effc.passes.sparse_positions import SparsePositions


@dataclass(frozen=True)
class ChangedModel:
    """What was done to the model.

    Attributes:
        compression: the weight passes, or None.
        search: how the attention was chosen, or None where the recipe names it.
    """

    compression: Compression | None
    search: AttentionSearch | None
    rewritten: Rewritten

    @property
    def layers(self) -> list[AttentionLayer]:
        """The attention of every layer."""
        return self.rewritten.layers


def change_model(job: Job) -> ChangedModel:
    """Run all passes on ``job.source``, each measured against the untouched model.

    Raises:
        UsageError, PreconditionError, DataError, PassFailedError: see the passes.
    """
    compression = _compress(job)
    _extend(job)
    observed = observe_attention(job.source)
    found = _choose(job, observed)
    rewritten = _rewrite(job, observed, found)
    _thin(job, rewritten)
    _recover(job, rewritten, None if compression is None else compression.kept_tokens)
    return ChangedModel(compression, found, rewritten)


def _compress(job: Job) -> Compression | None:
    if not compresses(job.recipe):
        return None
    compression = Compression(job.source, job.recipe, job.probe, job.log.tell)
    for asked in compression.steps:
        with job.log.step(compression.name(asked)) as step:
            result = compression.run(asked)
            record = step.record(compression.version(asked), result)
            record.probe = compression.deviation()
    job.probe = compression.probe
    if compression.kept_tokens is not None:
        job.read_calibration()
    return compression


def _extend(job: Job) -> None:
    if job.recipe.positions.max_length is None:
        return
    with job.log.step(ExtendPositions.name) as step:
        result = extend_positions(job.source, job.recipe.positions, job.recipe.attention)
        record = step.record(ExtendPositions.version, result)
        record.probe = job.deviation()


def _choose(job: Job, observed: ObservedAttention) -> AttentionSearch | None:
    if not needs_search(job.recipe.attention):
        return None
    with job.log.step("choose-attention") as step:
        found, hit = search(job.source, observed, job.recipe, job.log.progress)
        chosen = [row.layer for row in found.layers if row.chosen != "dense"]
        metrics = {"error": found.error, "error_name": found.error_name, "cost_share": found.cost_share}
        result: PassResult[Any] = PassResult(None, bool(chosen), chosen, metrics=metrics)
        step.record(SEARCH_VERSION, result, cached=hit)
    return found


def _rewrite(job: Job, observed: ObservedAttention, found: AttentionSearch | None) -> Rewritten:
    attention = job.recipe.attention if found is None else resolved(job.recipe.attention, found)
    with job.log.step(RewriteAttention.name) as step:
        rewritten = rewrite(job.source, attention, observed)
        if found is None and job.recovery is None:
            refuse_untrained(job.source, observed, job.recipe)
        rewritten.result.metrics.update(calibrate_forms(job.source, observed, job.recipe))
        record = step.record(RewriteAttention.version, rewritten.result)
        record.probe = job.deviation()
    return rewritten


def _thin(job: Job, rewritten: Rewritten) -> None:
    if not job.recipe.positions.sparse:
        return
    with job.log.step(SparsePositions.name) as step:
        result = thin_positions(job.source, job.recipe.positions, rewritten.layers)
        record = step.record(SparsePositions.version, result)
        record.probe = job.deviation()


def _recover(job: Job, rewritten: Rewritten, kept_tokens: list[int] | None) -> None:
    if job.recovery is None:
        return
    with job.log.step(RECOVER) as step:
        result, hit = recover(
            job.recovery, job.source, rewritten.observed, rewritten.layers, kept_tokens, job.log.progress
        )
        record = step.record(RECOVER_VERSION, result, cached=hit)
        record.probe = job.deviation()
