"""The texts that attention is chosen on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc.compiler.data import Sample, random_batches, read_samples, tokenize
from effc.compiler.inputs import input_names
from effc.compiler.recipe import Recipe
from effc.compiler.source import SourceModel
from effc.errors import DataError

# Texts of a batch are padded to the longest; two keep both padding and memory small.
_BATCH = 2
# The texts are the longest of this many times as many, drawn at random: on short ones a window hides nothing, and the
# longest of a whole file are often no ordinary texts.
_DRAWN = 16


@dataclass(frozen=True)
class CalibrationText:
    """Texts as a model reads them.

    Attributes:
        data: the file they come from.
        samples: the texts; none where the inputs are random.
        batches: inputs by name, int64 ``[batch, length]``, in the order of ``samples``.
        max_length: where texts were cut.
        longest: tokens of the longest.
        tokens: real tokens in all.
    """

    data: str
    samples: list[Sample]
    batches: Sequence[Mapping[str, Any]]
    max_length: int
    longest: int
    tokens: int


def calibration_text(recipe: Recipe, source: SourceModel, purpose: str) -> CalibrationText:
    """Read the texts that the recipe names for calibration, or else those for verification.

    Of a file that quality is verified on too, other texts are taken where it has enough of them.

    Args:
        purpose: what they are needed for, the subject of the error's sentence.

    Raises:
        DataError: if none are given, or the model reads none.
    """
    settings, data = recipe.attention, _data(recipe)
    if source.task.modality != "text":
        raise DataError(
            f"{purpose} measures on text, and this model reads {source.task.modality}.",
            "Give every layer its form yourself, for example --attn 0-3=dense,4-*=local:64.",
        )
    if data is None:
        raise DataError(f"{purpose} measures on text, and none is given.", "Give some with --data or --calibration.")
    samples = unverified(recipe, data, settings.samples)
    limit = min(settings.max_length, source.max_length or settings.max_length)
    samples = _longest(_drawn(samples, _DRAWN * settings.samples), settings.samples)
    batches = list(tokenize(samples, source.processor, limit, _BATCH, "np", input_names(source)))
    lengths = [int(count) for batch in batches for count in batch["attention_mask"].sum(axis=1)]
    return CalibrationText(str(data), samples, batches, limit, max(lengths), sum(lengths))


def unverified(recipe: Recipe, data: str, enough: int) -> list[Sample]:
    """The texts of a file, without those that quality is verified on where it has ``enough`` others.

    Raises:
        DataError: if the file cannot be read.
    """
    samples = read_samples(data)
    if recipe.verify.data is None or Path(data) != Path(recipe.verify.data):
        return samples
    verified = set(read_samples(data, recipe.verify.samples))
    others = [sample for sample in samples if sample not in verified]
    return others if len(others) >= enough else samples


def names_text(recipe: Recipe, source: SourceModel) -> bool:
    """Whether there is any text to measure on."""
    return _data(recipe) is not None and source.task.modality == "text"


def _data(recipe: Recipe) -> str | None:
    return recipe.attention.data or recipe.quantization.calibration.data or recipe.verify.data


def random_text(source: SourceModel, length: int) -> CalibrationText:
    """Random inputs in place of texts, on which only the deviation of outputs means anything."""
    length = min(length, source.max_length or length)
    batches = list(random_batches(source, _BATCH, length, _BATCH))
    counts = [int(count) for batch in batches if "attention_mask" in batch for count in batch["attention_mask"].sum(1)]
    kind = "tokens" if source.task.modality == "text" else source.task.modality
    return CalibrationText(f"random {kind}", [], batches, length, max(counts, default=0), sum(counts))


def _drawn(samples: list[Sample], count: int) -> list[Sample]:
    if count >= len(samples):
        return samples
    return [samples[index] for index in sorted(random.Random(0).sample(range(len(samples)), count))]


def _longest(samples: list[Sample], count: int) -> list[Sample]:
    """The longest texts, in file order."""
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].text) - len(samples[index].pair or ""))
    return [samples[index] for index in sorted(order[:count])]
