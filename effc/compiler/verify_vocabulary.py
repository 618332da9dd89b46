"""Comparing a model of a pruned vocabulary with its source, which has other ids for the same tokens.

Each model reads the texts with its own tokenizer. A text whose tokens are all left is the same sequence for both, so
that outputs can be compared token by token. Of a text that the pruned tokenizer cuts otherwise, only what
belongs to the whole text is compared: its embedding, its class, and how likely a language model finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.data import Sample, tokenize
from effc.compiler.inputs import ordinary_tokens
from effc.compiler.quality import CosineQuality, MaskedQuality, Quality, TokenClassQuality
from effc.compiler.source import SourceModel

Array = NDArray[Any]
Batch = Mapping[str, Array]
Outputs = Mapping[str, Array]

POSITIONAL = (CosineQuality, MaskedQuality, TokenClassQuality)
"""Qualities that need the same tokens at the same places."""
# The logit of a token that is gone; small enough that it is never predicted, and finite, unlike a failure.
_GONE = -1e30
_BATCH = 32


class OwnTokens:
    """What a compiled model is given where the source model is given a batch.

    Args:
        source_ids: the source's id of each of its tokens.
        own_batches: the samples as its own tokenizer reads them, in the batches that the source gets; None if the
            batches hold left tokens only, so that their ids need only be renumbered.
    """

    def __init__(self, source_ids: Sequence[int], own_batches: Iterable[Batch] | None = None) -> None:
        self._ids = np.asarray(source_ids)
        self._new = np.full(int(self._ids.max()) + 1, -1)
        self._new[self._ids] = np.arange(len(self._ids))
        self._batches = None if own_batches is None else iter(own_batches)

    def inputs(self, original: Batch, prepared: Batch) -> Batch:
        """The compiled model's inputs for the next batch.

        Args:
            original: the source's batch as it was tokenized.
            prepared: the same after the quality has masked tokens; masks are carried over where that is possible.
        """
        if self._batches is None:
            return {name: self._renumbered(value) if _holds_ids(name) else value for name, value in prepared.items()}
        own = dict(next(self._batches))
        for row in self.same_rows(original, own):
            length = int(own["attention_mask"][row].sum())
            own["input_ids"][row, :length] = self._new[prepared["input_ids"][row, :length]]
        return own

    def same_rows(self, original: Batch, own: Batch) -> list[int]:
        """The samples that both read as the same tokens."""
        same = []
        for row, (theirs, ours) in enumerate(zip(original["attention_mask"], own["attention_mask"], strict=True)):
            length = int(ours.sum())
            equal = int(theirs.sum()) == length and np.array_equal(
                self._ids[own["input_ids"][row, :length]], original["input_ids"][row, :length]
            )
            if equal:
                same.append(row)
        return same

    def comparable(
        self, name: str, original: Batch, given: Batch, expected: Outputs, actual: Outputs
    ) -> Iterator[tuple[Array, Array, Array | None]]:
        """Parts of one output that mean the same, as (expected, actual, mask of real tokens)."""
        reference, candidate = self.columns(expected)[name], actual[name]
        if reference.ndim < 3:
            yield reference, candidate, None
            return
        mask = original.get("decoder_attention_mask", original.get("attention_mask"))
        if self._batches is None:
            yield reference, candidate, mask
            return
        for row in self.same_rows(original, given):
            length = int(given["attention_mask"][row].sum())
            yield reference[row, :length], candidate[row, :length], None

    def columns(self, expected: Outputs) -> Outputs:
        """The source's outputs, with logits of the tokens that are left alone."""
        logits = expected.get("logits")
        if logits is None or logits.ndim < 3 or logits.shape[-1] <= int(self._ids.max()):
            return expected
        return {**expected, "logits": logits[..., self._ids]}

    def for_quality(self, quality: Quality, expected: Outputs, actual: Outputs) -> tuple[Outputs, Outputs]:
        """Both models' outputs in ids that ``quality`` can compare."""
        if isinstance(quality, CosineQuality):
            return self.columns(expected), actual
        if isinstance(quality, MaskedQuality):
            wide = np.full_like(expected["logits"], _GONE)
            wide[..., self._ids] = actual["logits"]
            return expected, {**actual, "logits": wide}
        return expected, actual

    def _renumbered(self, ids: Array) -> Array:
        return np.asarray(self._new[np.minimum(ids, len(self._new) - 1)])


def split_texts(
    samples: Sequence[Sample], source: SourceModel, tokenizer: Any, source_ids: Sequence[int], limit: int | None
) -> tuple[list[Sample], list[Sample]]:
    """The samples that both tokenizers read as the same tokens, and the others."""
    tokens = OwnTokens(source_ids)
    same: list[Sample] = []
    for start in range(0, len(samples), _BATCH):
        part = samples[start : start + _BATCH]
        theirs = next(tokenize(part, source.processor, limit, _BATCH))
        ours = next(tokenize(part, tokenizer, limit, _BATCH))
        same += [part[row] for row in tokens.same_rows(theirs, ours)]
    chosen = {id(sample) for sample in same}
    return same, [sample for sample in samples if id(sample) not in chosen]


def with_left_tokens(batches: Iterable[Batch], source: SourceModel, source_ids: Sequence[int]) -> Iterator[Batch]:
    """Random batches in which every token that is gone is replaced by one that is left."""
    left = set(source_ids)
    ordinary = np.asarray([token for token in ordinary_tokens(source) if token in left] or list(source_ids))
    for batch in batches:
        result = dict(batch)
        for name in filter(_holds_ids, batch):
            gone = ~np.isin(batch[name], np.asarray(source_ids))
            result[name] = np.where(gone, ordinary[batch[name] % len(ordinary)], batch[name])
        yield result


def _holds_ids(name: str) -> bool:
    return name.endswith("input_ids")
