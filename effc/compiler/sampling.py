"""How the next token is chosen from logits. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class SamplingSettings:
    """What transformers' ``generate`` calls by the same names, applied in the same order.

    Attributes:
        do_sample: draw from the distribution; the most likely token if False. None: True if any of the next three is
            given.
        temperature: divides the logits, above 0.
        top_k: only the ``top_k`` most likely tokens may be drawn (Fan et al., 2018).
        top_p: only the most likely tokens that together have this probability (nucleus sampling, Holtzman et al.,
            2020), above 0 and at most 1.
        repetition_penalty: divides positive logits of tokens that already stand in the text and multiplies negative
            ones (Keskar et al., 2019), above 0; also without sampling.
        seed: equal seeds give equal texts; None draws a fresh one.

    Raises:
        UsageError: if a value is out of range, or would have no effect.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not (self.temperature > 0 and np.isfinite(self.temperature)):
            raise UsageError(
                f"temperature must be above 0, not {self.temperature}.", "For the most likely token leave it out."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}.", "Leave it out to draw from all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}.", "Give, for example, 0.9.")
        if not (self.repetition_penalty > 0 and np.isfinite(self.repetition_penalty)):
            raise UsageError(
                f"repetition_penalty must be above 0, not {self.repetition_penalty}.", "1 changes nothing; try 1.1."
            )
        if self.do_sample is False and self._narrowed:
            raise UsageError(
                "temperature, top_k and top_p have no effect with do_sample=False.", "Leave them out, or do_sample."
            )

    @property
    def _narrowed(self) -> bool:
        return any(value is not None for value in (self.temperature, self.top_k, self.top_p))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self._narrowed if self.do_sample is None else self.do_sample


class Sampler:
    """Chooses tokens for one batch; holds the state of the random generator."""

    def __init__(self, settings: SamplingSettings):
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    def choose(self, logits: Floats, tokens: Tokens, mask: NDArray[np.bool_]) -> Tokens:
        """The next token of each sequence, ``[batch]``.

        Args:
            logits: ``[batch, vocabulary]``.
            tokens: ``[batch, length]``, the text so far.
            mask: ``[batch, length]``, False for padding.
        """
        settings = self._settings
        if not settings.samples:
            return np.asarray(self._penalised(logits, tokens, mask).argmax(axis=-1), dtype=np.int64)
        probabilities = self.probabilities(logits, tokens, mask)
        drawn = self._random.random(len(logits))
        chosen = (probabilities.cumsum(axis=-1) <= drawn[:, None]).sum(axis=-1)
        # Rounding may leave the whole sum just below the number drawn.
        last = probabilities.shape[1] - 1 - (probabilities[:, ::-1] > 0).argmax(axis=-1)
        return np.asarray(np.minimum(chosen, last), dtype=np.int64)

    def probabilities(self, logits: Floats, tokens: Tokens, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What tokens are drawn from, ``[batch, vocabulary]``; arguments as for :meth:`choose`."""
        settings = self._settings
        logits = self._penalised(logits, tokens, mask)
        scores = logits.astype(np.float64) / (settings.temperature or 1.0)
        if settings.top_k is not None and settings.top_k < scores.shape[1]:
            least = np.partition(scores, -settings.top_k, axis=-1)[:, -settings.top_k]
            scores = np.where(scores < least[:, None], -np.inf, scores)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        result = powers / powers.sum(axis=-1, keepdims=True)
        if settings.top_p is not None and settings.top_p < 1:
            result = _nucleus(result, settings.top_p)
        return np.asarray(result, dtype=np.float64)

    def _penalised(self, logits: Floats, tokens: Tokens, mask: NDArray[np.bool_]) -> Floats:
        penalty = self._settings.repetition_penalty
        return logits if penalty == 1.0 else _penalised(logits, tokens, mask, penalty)


def _penalised(logits: Floats, tokens: Tokens, mask: NDArray[np.bool_], penalty: float) -> Floats:
    logits = logits.copy()
    for row, (own, real) in enumerate(zip(tokens, mask, strict=True)):
        seen = np.unique(own[real])
        values = logits[row, seen]
        logits[row, seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _nucleus(probabilities: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=-1)
    # A token stays while those before it do not yet have the share, so the first one always stays.
    ranked[ranked.cumsum(axis=-1) - ranked >= share] = 0
    kept = np.zeros_like(probabilities)
    np.put_along_axis(kept, order, ranked, axis=-1)
    return np.asarray(kept / kept.sum(axis=-1, keepdims=True), dtype=np.float64)
