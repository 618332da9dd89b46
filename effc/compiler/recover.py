"""Train the rewritten model to do what the untouched source model does, between the last change and the export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from effc.compiler.cache import cache_directory, cache_key, cached
from effc.compiler.data import Sample, read_samples
from effc.compiler.distill_checkpoint import put_back
from effc.compiler.distill_data import Material, material_of, text_collate
from effc.compiler.distill_losses import terms_of
from effc.compiler.distill_record import describe
from effc.compiler.distill_run import run_distillation
from effc.compiler.inputs import input_names
from effc.compiler.manifest import AttentionLayer
from effc.compiler.progress import Progress
from effc.compiler.recipe import Recipe
from effc.compiler.source import SourceModel, load
from effc.compiler.toolchain import toolchain
from effc.compiler.weights import note_changed_weights, weights_digest
from effc.errors import DataError, UsageError
from effc.passes.base import PassResult
from effc.passes.fake_quant import check_fake_quant
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.hook import PARAMETERS

RECOVER = "recover"
RECOVER_VERSION = 1
_WEIGHTS, _RECORD = "weights.safetensors", "run.json"


@dataclass(frozen=True)
class Recovery:
    """What a recovery will train on, read before anything expensive is done."""

    recipe: Recipe
    samples: tuple[Sample, ...]
    never: frozenset[Sample]

    @classmethod
    def read(cls, recipe: Recipe, source: SourceModel) -> Recovery:
        """Check the recipe's section and read its texts.

        Raises:
            UsageError, DataError, PreconditionError: if the section cannot be carried out.
        """
        settings = recipe.recover
        if source.task.modality != "text":
            raise DataError(
                f"Recovery trains on texts, and this model reads {source.task.modality}.",
                "Train the rewritten model with effc.distill(student, teacher, examples) from Python.",
            )
        if settings.data is None:
            raise UsageError(
                "Recovery trains on texts, and none are given.",
                "Give some with --recover-data (recover.data in the recipe): texts like those the model will read.",
            )
        if settings.fake_quant:
            check_fake_quant(recipe.quantization)
        verified: list[Sample] = []
        if recipe.verify.data is not None:
            # Quality is verified on these, so they are not trained on wherever they stand.
            verified = read_samples(recipe.verify.data, recipe.verify.samples)
        return cls(recipe, tuple(read_samples(settings.data)), frozenset(verified))


def recover(
    recovery: Recovery,
    source: SourceModel,
    observed: ObservedAttention,
    layers: Sequence[AttentionLayer],
    kept_tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[PassResult[Any], bool]:
    """Train ``source.model`` in place, or take the trained weights from the cache.

    A compile that was killed meanwhile goes on from its last checkpoint when it is repeated.

    Args:
        observed: of ``source.model``; remembers learned parameters of forms.
        layers: the attention that was assigned.
        kept_tokens: the source's ids of the tokens that are left where the vocabulary was pruned.

    Returns:
        the pass's record, and whether it came from the cache.

    Raises:
        DataError, PreconditionError, PassFailedError: see :func:`effc.compiler.distill_run.run_distillation`.
    """
    recipe, settings = recovery.recipe, recovery.recipe.recover
    # The teacher takes no more than it was made for, however far positions were extended.
    trained = source.max_length if source.positions is None else source.positions.trained
    limits = [limit for limit in (settings.length, source.max_length, trained) if limit is not None]
    labels = getattr(source.config, "id2label", None) if "classification" in source.task.name else None
    material = material_of(
        recovery.samples,
        held_out=settings.held_out,
        seed=settings.seed,
        collate_texts=text_collate(source.processor, min(limits), input_names(source), labels),
        never=recovery.never,
    )
    key = _key(recipe, source, layers, material)
    directory = cache_directory() / "recovering" / key

    def make(entry: Path) -> None:
        terms = terms_of(settings.losses, source.task.name, settings.temperature)
        run = run_distillation(
            source.model,
            load(source.located).model,
            material,
            settings,
            terms,
            directory,
            quantization=recipe.quantization,
            kept_tokens=kept_tokens,
            progress=progress,
        )
        record = describe(run) | {"losses": [f"{term.name}:{term.weight:g}" for term in terms], "data": settings.data}
        save_file({name: value.contiguous() for name, value in _weights(source).items()}, entry / _WEIGHTS)
        (entry / _RECORD).write_text(json.dumps(record))

    entry, hit = cached(RECOVER, key, make)
    shutil.rmtree(directory, ignore_errors=True)
    put_back(_weights(source), load_file(entry / _WEIGHTS))
    _remember(source, observed)
    note_changed_weights(source)
    record = json.loads((entry / _RECORD).read_text())
    changed = [name for name, value in source.model.named_parameters() if value.ndim > 1]
    return PassResult(source.model, True, changed, [], record), hit


def _key(recipe: Recipe, source: SourceModel, layers: Sequence[AttentionLayer], material: Material) -> str:
    settings = recipe.recover.model_dump(mode="json", exclude={"data", "enabled", "trackers"})
    return cache_key(
        version=RECOVER_VERSION,
        fingerprint=source.located.fingerprint,
        weights=weights_digest(source.model),
        attention=[layer.model_dump(mode="json") for layer in layers],
        settings=settings,
        quantization=recipe.quantization.model_dump(mode="json") if recipe.recover.fake_quant else None,
        data=material.digest,
        toolchain=toolchain(),
    )


def _weights(source: SourceModel) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in source.model.named_parameters()}


def _remember(source: SourceModel, observed: ObservedAttention) -> None:
    """Let trained parameters of forms outlast every change of forms from now on."""
    # Read before any is set: setting those of one layer places those of all.
    held = {layer.name: getattr(layer.module, PARAMETERS, {}) for layer in observed.layers}
    trained = {layer: {name: value.detach().clone() for name, value in own.items()} for layer, own in held.items()}
    for name, values in trained.items():
        if values and name in observed.forms:
            observed.set_parameters(name, observed.forms[name], values)
    source.model.requires_grad_(False)
