"""Prune and factorize a source model, before its attention is rewritten: which passes, in which order, on which texts.

Every pass is measured against the untouched model. Where the vocabulary is pruned, the two have different ids for the
same tokens; the probe then holds tokens that both have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effc.compiler.calibration_text import unverified
from effc.compiler.data import Sample, read_samples, tokenize
from effc.compiler.inputs import input_names, ordinary_tokens, ragged_inputs, token_mask
from effc.compiler.manifest import CompressionRecord
from effc.compiler.metrics import compare_outputs
from effc.compiler.recipe import Recipe
from effc.compiler.source import SourceModel
from effc.compiler.vocabulary import save_vocabulary
from effc.compiler.weights import note_changed_weights
from effc.errors import DataError
from effc.passes.base import Pass, PassResult
from effc.passes.low_rank import LowRank
from effc.passes.low_rank_settings import LowRankSection
from effc.passes.prune_calibration import Calibration
from effc.passes.prune_ffn import PruneFeedForward
from effc.passes.prune_heads import PruneHeads
from effc.passes.prune_layers import PruneLayers
from effc.passes.prune_magnitude import PruneUnstructured
from effc.passes.prune_masks import masks_of
from effc.passes.prune_settings import MASKING, PruneStep
from effc.passes.prune_speed import sparse_requirements, speed_note
from effc.passes.prune_two_four import PruneTwoFour
from effc.passes.prune_vocabulary import PruneVocabulary

_BATCH = 4
# Images and recordings have no texts; a few random ones show at least which layers do least.
_RANDOM = 4

Outputs = dict[str, NDArray[Any]]
_PASSES: dict[str, type[Pass[Any, Any]]] = {
    "vocab": PruneVocabulary,
    "layers": PruneLayers,
    "heads": PruneHeads,
    "ffn": PruneFeedForward,
    "unstructured": PruneUnstructured,
    "2:4": PruneTwoFour,
}


@dataclass(frozen=True)
class Probe:
    """Inputs that every pass is measured on, and what the untouched model makes of them.

    Attributes:
        inputs: for the model as it is now.
        untouched: outputs by name, of the tokens and classes that the model still has.
    """

    inputs: Mapping[str, torch.Tensor]
    untouched: Outputs

    @property
    def mask(self) -> NDArray[Any] | None:
        """The mask of real tokens, ``[batch, length]``, None where nothing is padded."""
        mask = token_mask(self.inputs)
        return None if mask is None else mask.numpy()


class Compression:
    """The weight passes of one compile.

    Args:
        source: changed in place, step by step.
        recipe: says which steps.
        probe: of the untouched model.
        told: called with what is being measured, or None.

    Attributes:
        steps: in the order in which :meth:`run` must be given them.
        probe: the one to use after the last step.
        kept_tokens: the source's ids of the tokens that are left, in the order of the new ones; None if all are.

    Raises:
        DataError: if texts that a step needs are missing or cannot be read.
    """

    def __init__(
        self, source: SourceModel, recipe: Recipe, probe: Probe, told: Callable[[str], None] | None = None
    ) -> None:
        self.source, self.recipe, self.probe, self._told = source, recipe, probe, told
        self.kept_tokens: list[int] | None = None
        self._notes: list[str] = []
        self._rows = 0
        self._modified = False
        masking = [step for step in recipe.prune if step.method in MASKING]
        shrinking = [step for step in recipe.prune if step.method not in MASKING]
        low_rank = [recipe.low_rank] if recipe.low_rank is not None else []
        self.steps: list[PruneStep | LowRankSection] = [*shrinking, *low_rank, *masking]
        self._samples = {id(step): self._read(step) for step in self.steps}

    def name(self, step: PruneStep | LowRankSection) -> str:
        """The name of the pass behind a step."""
        return LowRank.name if isinstance(step, LowRankSection) else _PASSES[step.method].name

    def version(self, step: PruneStep | LowRankSection) -> int:
        """The version of the pass behind a step."""
        return LowRank.version if isinstance(step, LowRankSection) else _PASSES[step.method].version

    def run(self, step: PruneStep | LowRankSection) -> PassResult[Any]:
        """Run one step, and let the source know after the last one.

        Raises:
            PreconditionError, UsageError, DataError, PassFailedError: see the passes.
        """
        model = self.source.model
        if isinstance(step, LowRankSection):
            made: Pass[Any, Any] = LowRank(step, self._calibration(step))
        elif step.method == "vocab":
            return self._prune_vocabulary(step)
        elif step.method == "layers":
            made = PruneLayers(step, self.probe.inputs, self._layer_calibration(step))
        elif step.method in MASKING:
            made = _PASSES[step.method](step, self._calibration(step))  # type: ignore[call-arg]
        else:
            made = _PASSES[step.method](step, self.probe.inputs, self._calibration(step))  # type: ignore[call-arg]
        result = made.run(model)
        made.ensures(model)
        if isinstance(step, PruneStep):
            self._note(step, result)
        self._finish(step, result)
        return result

    def deviation(self) -> dict[str, Any]:
        """How far the model is from the untouched one now, by output."""
        return compare_outputs(self.probe.untouched, run_torch(self.source, self.probe.inputs), self.probe.mask)

    def record(self, directory: Path) -> CompressionRecord:
        """What ``effc.json`` says of all steps together; a pruned vocabulary is written into ``directory``."""
        model = self.source.model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        zeros = sum(int((~mask).sum()) for mask in masks_of(model).values())
        return CompressionRecord(
            steps=[step.text if isinstance(step, PruneStep) else f"low-rank:{step.text}" for step in self.steps],
            parameters=parameters,
            nonzero=parameters - zeros,
            notes=self._notes,
            vocabulary=None if self.kept_tokens is None else save_vocabulary(directory, self.kept_tokens, self._rows),
        )

    def _finish(self, step: PruneStep | LowRankSection, result: PassResult[Any]) -> None:
        self._modified |= result.modified
        # Reading every weight takes seconds where there are gigabytes, and nothing asks in between.
        if self._modified and step is self.steps[-1]:
            note_changed_weights(self.source)

    def _note(self, step: PruneStep, result: PassResult[Any]) -> None:
        note = speed_note(step.method, self.recipe.target)
        if note:
            result.metrics["speed"] = note
            self._notes.append(f"{step.text}: {note}")
        if step.method == "2:4":
            rules = sparse_requirements(self.recipe.target, self.recipe.quantization.modes)
            if rules:
                result.metrics["requires"] = rules
                self._notes.append(f"{step.text} is computed as such if: {'; '.join(rules)}.")

    def _read(self, step: PruneStep | LowRankSection) -> tuple[str, list[Sample]] | None:
        """Where a step's texts come from, and the texts; None where it has none."""
        if isinstance(step, PruneStep) and step.method == "vocab":
            assert step.corpus is not None
            return step.corpus, read_samples(step.corpus)
        data = step.data or self.recipe.quantization.calibration.data or self.recipe.verify.data
        if data is None or self.source.task.modality != "text":
            return None
        samples = unverified(self.recipe, data, step.samples)
        if len(samples) > step.samples:
            chosen = sorted(random.Random(0).sample(range(len(samples)), step.samples))
            samples = [samples[number] for number in chosen]
        return data, samples

    def _calibration(self, step: PruneStep | LowRankSection) -> Calibration | None:
        """Texts in the model's present ids, or None."""
        read, source = self._samples[id(step)], self.source
        if read is None or step.criterion in ("magnitude", "plain"):
            return None
        data, samples = read
        limit = min(step.max_length, source.max_length or step.max_length)
        batches = list(tokenize(samples, source.processor, limit, _BATCH, "np", input_names(source)))
        return Calibration(source.model, batches, data, self._told)

    def _layer_calibration(self, step: PruneStep) -> Calibration:
        found = self._calibration(step)
        if found is not None:
            return found
        if self.source.task.modality == "text":
            raise DataError(
                "Which layers do least is measured on text, and none is given.",
                "Give some with --calibration or --data.",
            )
        inputs = ragged_inputs(self.source, [1] * _RANDOM)
        return Calibration(self.source.model, [inputs], f"random {self.source.task.modality}", self._told)

    def _prune_vocabulary(self, step: PruneStep) -> PassResult[Any]:
        source = self.source
        read = self._samples[id(step)]
        assert read is not None
        texts = [text for sample in read[1] for text in (sample.text, sample.pair) if text]
        made = PruneVocabulary(step, source.processor, texts)
        kept = made.choose(source.model)
        table: Any = source.model.get_input_embeddings()
        self._rows = int(table.weight.shape[0])
        self.probe, renumbered = self._shared_probe(kept)
        result = made.run(source.model)
        made.ensures(source.model)
        source.processor, self.kept_tokens = made.tokenizer, kept
        self.probe = Probe(renumbered, self.probe.untouched)
        self._finish(step, result)
        return result

    def _shared_probe(self, kept: list[int]) -> tuple[Probe, Mapping[str, torch.Tensor]]:
        """The probe in tokens that stay, as the untouched model numbers them, and the same in new numbers."""
        known = set(kept)
        ordinary = [token for token in ordinary_tokens(self.source) if token in known] or kept
        replacement = torch.zeros(int(max(max(kept), self._largest())) + 1, dtype=torch.int64)
        replacement[:] = torch.tensor(ordinary)[torch.arange(len(replacement)) % len(ordinary)]
        replacement[torch.tensor(kept)] = torch.tensor(kept)
        inputs = {
            name: replacement[value] if name.endswith("input_ids") else value
            for name, value in self.probe.inputs.items()
        }
        untouched = run_torch(self.source, inputs)
        if "logits" in untouched and untouched["logits"].shape[-1] > max(kept):
            untouched["logits"] = untouched["logits"][..., np.asarray(kept)]
        lookup = torch.zeros(len(replacement), dtype=torch.int64)
        lookup[torch.tensor(kept)] = torch.arange(len(kept))
        new = {name: lookup[value] if name.endswith("input_ids") else value for name, value in inputs.items()}
        return Probe(inputs, untouched), new

    def _largest(self) -> int:
        return max(int(value.max()) for name, value in self.probe.inputs.items() if name.endswith("input_ids"))


def compresses(recipe: Recipe) -> bool:
    """Whether a recipe asks for any weight pass."""
    return bool(recipe.prune) or recipe.low_rank is not None


def run_torch(source: SourceModel, inputs: Mapping[str, torch.Tensor]) -> Outputs:
    """What the model makes of inputs: tensors by name, as arrays."""
    with torch.no_grad():
        outputs = source.model(**inputs)
    return {name: value.numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
