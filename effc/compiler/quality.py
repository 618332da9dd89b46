"""Task metrics of the source model and the compiled one, side by side, and the quality lost between them.

What is lost is one number per task, ``drop``, so that ``--max-quality-drop`` has one meaning:

* classification with labels, masked language models: accuracy lost, absolute
* classification without labels: share of predictions that changed, which bounds the accuracy lost
* causal language models: relative increase of perplexity
* feature extraction: 1 - mean cosine of the mean-pooled embeddings
* language models on random tokens, where no prediction means anything: 1 - mean cosine of the logits
* regression (one output): relative error of the output

A negative drop means that the compiled model did better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.inputs import token_mask
from effc.compiler.metrics import DeviationSum, pooled_cosines

Array = NDArray[Any]
Batch = Mapping[str, Array]
Outputs = Mapping[str, Array]

_MASKED_SHARE = 0.15
# Elements of logits that are turned to float64 at a time.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Score:
    """The quality of both models.

    Attributes:
        metric: ``{"name": ..., "source": ..., "compiled": ..., ...}``, or None where no task metric applies.
        drop: what was lost, see the module's description.
        drop_name: what ``drop`` is, in words.
    """

    metric: dict[str, Any] | None
    drop: float
    drop_name: str


class Quality(ABC):
    """Collects a score over batches, which must come in the order of the samples."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch that both models are given."""
        return batch

    @abstractmethod
    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        """Add one batch: the prepared inputs, and what each model made of them.

        Args:
            own: the same samples as the compiled model was given them, where its vocabulary is another.
        """

    @abstractmethod
    def score(self) -> Score:
        """The score over all batches so far."""


class EmbeddingQuality(Quality):
    """Cosine of mean-pooled embeddings."""

    def __init__(self) -> None:
        self._cosines: list[float] = []

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        name = "last_hidden_state"
        masks = batch.get("attention_mask"), (own or batch).get("attention_mask")
        self._cosines += pooled_cosines(source[name], compiled[name], *masks).tolist()

    def score(self) -> Score:
        mean = sum(self._cosines) / len(self._cosines)
        worst = int(np.argmin(self._cosines))
        metric = {"name": "pooled cosine", "mean": mean, "min": self._cosines[worst], "worst_sample": worst}
        return Score(metric, 1.0 - mean, "1 - mean cosine of pooled embeddings")


class CosineQuality(Quality):
    """Cosine of the logits, for predictions that mean nothing."""

    def __init__(self) -> None:
        self._sum = DeviationSum(logits=True)

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        self._sum.update(source["logits"], compiled["logits"], token_mask(batch))

    def score(self) -> Score:
        return Score(None, 1.0 - self._sum.result().cosine, "1 - mean cosine of logits")


class RegressionQuality(Quality):
    """Relative error of a single output."""

    def __init__(self) -> None:
        self._sum = DeviationSum()

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        self._sum.update(source["logits"], compiled["logits"])

    def score(self) -> Score:
        return Score(None, self._sum.result().relative_error, "relative error of the output")


class ClassQuality(Quality):
    """Accuracy where there are labels, agreement where there are none.

    Args:
        labels: the right class of each sample, or None.
    """

    def __init__(self, labels: Sequence[int] | None = None):
        self._labels = None if labels is None else np.asarray(labels)
        self._predictions: tuple[list[int], list[int]] = ([], [])

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        for predictions, outputs in zip(self._predictions, (source, compiled), strict=True):
            predictions += predicted(outputs["logits"]).tolist()

    def score(self) -> Score:
        source, compiled = map(np.asarray, self._predictions)
        if self._labels is None:
            return _agreement(source, compiled)
        score = _accuracy(source, compiled, self._labels)
        assert score.metric is not None
        score.metric["macro_f1"] = {
            "source": macro_f1(source, self._labels),
            "compiled": macro_f1(compiled, self._labels),
        }
        return score


class TokenClassQuality(Quality):
    """Accuracy over labelled tokens, or agreement over all real tokens.

    Args:
        labels: for each sample the right class of each token position, -100 where a position has none; or None.
    """

    def __init__(self, labels: Sequence[Sequence[int]] | None = None):
        self._labels = labels
        self._next = 0
        self._found: tuple[list[int], list[int], list[int]] = ([], [], [])

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        real = batch["attention_mask"] != 0
        right = np.zeros(real.shape, dtype=np.int64)
        if self._labels is not None:
            for row, labels in enumerate(self._labels[self._next : self._next + len(real)]):
                right[row] = -100
                right[row, : len(labels)] = labels
            real = real & (right != -100)
        self._next += len(real)
        arrays = predicted(source["logits"]), predicted(compiled["logits"]), right
        for found, array in zip(self._found, arrays, strict=True):
            found += array[real].tolist()

    def score(self) -> Score:
        source, compiled, right = map(np.asarray, self._found)
        return _agreement(source, compiled) if self._labels is None else _accuracy(source, compiled, right)


class PerplexityQuality(Quality):
    """Perplexity of next-token predictions on the texts themselves, per token of the source model."""

    def __init__(self) -> None:
        self._loss = [0.0, 0.0]
        self._tokens = 0

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        for index, (inputs, outputs) in enumerate(((batch, source), (own or batch, compiled))):
            mask = inputs["attention_mask"] != 0
            predicted_tokens = mask[:, 1:] & mask[:, :-1]
            targets = inputs["input_ids"][:, 1:][predicted_tokens]
            # Texts, not tokens, are what both models are asked about: one may cut them into more tokens.
            self._tokens += len(targets) if index == 0 else 0
            self._loss[index] += float(token_losses(outputs["logits"][:, :-1][predicted_tokens], targets).sum())

    def score(self) -> Score:
        tokens = max(1, self._tokens)
        source, compiled = (_exp(loss / tokens) for loss in self._loss)
        metric = {"name": "perplexity", "source": source, "compiled": compiled, "tokens": self._tokens}
        return Score(metric, compiled / source - 1.0, "relative increase of perplexity")


class MaskedQuality(Quality):
    """Accuracy at guessing tokens that were masked, the same ones for the same seed.

    Args:
        mask_token: id of the mask token.
        special: ids that are never masked.
    """

    def __init__(self, mask_token: int, special: Sequence[int], seed: int = 0):
        self._mask_token = mask_token
        self._special = np.asarray(sorted(special), dtype=np.int64)
        self._random = np.random.default_rng(seed)
        self._chosen = np.zeros((0, 0), dtype=bool)
        self._right = np.zeros(0, dtype=np.int64)
        self._found: tuple[list[int], list[int], list[int]] = ([], [], [])

    def prepare(self, batch: Batch) -> Batch:
        tokens = batch["input_ids"]
        candidates = (batch["attention_mask"] != 0) & ~np.isin(tokens, self._special)
        order = np.where(candidates, self._random.random(tokens.shape), np.inf)
        # At least one a sample, or a short text would count for nothing.
        share = np.ceil(candidates.sum(axis=1, keepdims=True) * _MASKED_SHARE)
        self._chosen = candidates & (order.argsort(axis=1).argsort(axis=1) < share)
        self._right = tokens[self._chosen]
        return {**batch, "input_ids": np.where(self._chosen, self._mask_token, tokens)}

    def update(self, batch: Batch, source: Outputs, compiled: Outputs, own: Batch | None = None) -> None:
        guesses = (predicted(outputs["logits"][self._chosen]) for outputs in (source, compiled))
        for found, array in zip(self._found, (*guesses, self._right), strict=True):
            found += array.tolist()

    def score(self) -> Score:
        score = _accuracy(*map(np.asarray, self._found))
        assert score.metric is not None
        return Score({**score.metric, "name": "masked-token accuracy"}, score.drop, "masked-token accuracy lost")


def predicted(logits: Array) -> NDArray[np.int64]:
    """The class with the largest logit, over the last axis; -1, which is never right, where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=-1)
    return np.where(finite, np.argmax(logits, axis=-1), -1).astype(np.int64)


def macro_f1(predictions: Array, labels: Array) -> float:
    """Mean F1 over the classes that the labels or the predictions hold."""
    scores = []
    for label in np.union1d(labels, predictions[predictions >= 0]):
        hits = int(((predictions == label) & (labels == label)).sum())
        scores.append(2 * hits / int((predictions == label).sum() + (labels == label).sum()))
    return float(np.mean(scores)) if scores else 0.0


def token_losses(logits: Array, targets: Array) -> NDArray[np.float64]:
    """Cross-entropy in nats of ``logits`` ``[tokens, vocabulary]`` against ``targets`` ``[tokens]``."""
    result = np.empty(len(targets))
    rows = max(1, _BLOCK // max(1, logits.shape[-1]))
    for start in range(0, len(targets), rows):
        block = logits[start : start + rows].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        chosen = block[np.arange(len(block)), targets[start : start + rows]]
        result[start : start + rows] = np.log(np.exp(block).sum(axis=1)) - chosen
    # A model that returns NaN has no idea at all.
    return np.where(np.isfinite(result), result, np.inf)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _accuracy(source: Array, compiled: Array, labels: Array) -> Score:
    right = [float((predictions == labels).mean()) if len(labels) else 0.0 for predictions in (source, compiled)]
    metric = {"name": "accuracy", "source": right[0], "compiled": right[1], "labels": len(labels)}
    return Score(metric, right[0] - right[1], "accuracy lost")


def _agreement(source: Array, compiled: Array) -> Score:
    agreement = float(((source == compiled) & (compiled >= 0)).mean()) if len(source) else 1.0
    return Score(None, 1.0 - agreement, "share of predictions that changed")
