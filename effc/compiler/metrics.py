"""How far outputs are from their reference, in numbers that need no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from effc.compiler.manifest import OutputDeviation

Array = NDArray[np.generic]

# The outputs of transformers models that are compared. Others (key/value caches, hidden states) are by-products.
COMPARED_OUTPUTS = ("last_hidden_state", "pooler_output", "logits")
# Rows are compared in float64, in blocks of about this many elements, so that logits over a large vocabulary do not
# take several times their memory.
_BLOCK = 1 << 22


class DeviationSum:
    """The deviation of one output over any number of batches.

    Relative error is ``||candidate - reference|| / ||reference||`` (Frobenius norm over all batches); cosine is the
    mean over vectors (the last axis); top-1 agreement is the share of vectors whose largest element stands at the same
    place. Vectors with a value that is not finite, in the candidate alone, count as wholly wrong: infinite error,
    cosine 0, no agreement.
    """

    def __init__(self, *, logits: bool = False):
        self._logits = logits
        self._error = self._norm = self._cosine = 0.0
        self._agree = self._vectors = self._offered = 0

    def update(self, reference: Array, candidate: Array, mask: Array | None = None) -> None:
        """Add one batch.

        Args:
            reference: ``[batch, length, size]``, or ``[batch, size]`` for one vector per sample.
            candidate: of the same shape.
            mask: ``[batch, length]``, nonzero where a token is real. Ignored for one vector per sample.

        Raises:
            ValueError: if the shapes differ, or the mask has another shape than the tokens.
        """
        expected, actual = _vectors(reference, candidate, mask)
        rows = max(1, _BLOCK // max(1, expected.shape[1]))
        for start in range(0, len(expected), rows):
            self._add(
                expected[start : start + rows].astype(np.float64), actual[start : start + rows].astype(np.float64)
            )

    def result(self) -> OutputDeviation:
        """The deviation so far. Of nothing at all, it is none."""
        if self._offered and not self._vectors:
            return OutputDeviation(relative_error=math.inf, cosine=0.0, top1_agreement=0.0 if self._logits else None)
        vectors = max(1, self._vectors)
        error = math.sqrt(self._error / self._norm) if self._norm > 0 else (math.inf if self._error > 0 else 0.0)
        return OutputDeviation(
            relative_error=error,
            cosine=self._cosine / vectors if self._vectors else 1.0,
            top1_agreement=(self._agree / vectors if self._vectors else 1.0) if self._logits else None,
        )

    def _add(self, reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> None:
        # Where the reference itself is not finite (an attention row with nothing to see), nothing can be compared.
        comparable = np.isfinite(reference).all(axis=1)
        self._offered += len(reference)
        reference, candidate = reference[comparable], candidate[comparable]
        good = np.isfinite(candidate).all(axis=1)
        if not good.all():
            self._error = math.inf
        self._norm += float(np.square(reference).sum())
        self._vectors += len(reference)
        reference, candidate = reference[good], candidate[good]
        self._error += float(np.square(candidate - reference).sum())
        self._cosine += float(_cosines(reference, candidate).sum())
        if self._logits and reference.shape[1]:
            self._agree += int((reference.argmax(axis=1) == candidate.argmax(axis=1)).sum())


def deviation(
    reference: Array, candidate: Array, mask: Array | None = None, *, logits: bool = False
) -> OutputDeviation:
    """The deviation of one batch of one output; see :class:`DeviationSum`."""
    total = DeviationSum(logits=logits)
    total.update(reference, candidate, mask)
    return total.result()


def compare_outputs(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], mask: Array | None = None
) -> dict[str, OutputDeviation]:
    """The deviation of every output that both have, of those that are compared at all.

    Args:
        reference: output name to array.
        candidate: output name to array.
        mask: ``[batch, length]``, nonzero where a token is real.

    Raises:
        ValueError: if they share no output to compare, or a shape differs.
    """
    return {
        name: deviation(reference[name], candidate[name], mask, logits=name == "logits")
        for name in shared_outputs(reference, candidate)
    }


def shared_outputs(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> tuple[str, ...]:
    """The names of the outputs to compare.

    Raises:
        ValueError: if there are none.
    """
    names = tuple(name for name in COMPARED_OUTPUTS if name in reference and name in candidate)
    if not names:
        raise ValueError(f"no output in common: {sorted(reference)} and {sorted(candidate)}")
    return names


def pool(hidden: Array, mask: Array | None = None) -> NDArray[np.float64]:
    """Mean over the real tokens of ``[batch, length, size]``: one embedding per sample, ``[batch, size]``."""
    values = hidden.astype(np.float64)
    if mask is None:
        return np.asarray(values.mean(axis=1))
    weight = (np.asarray(mask) != 0).astype(np.float64)[:, :, None]
    # Not a product with the mask: padding positions may hold NaN, and 0 * NaN is NaN.
    return np.asarray(np.where(weight > 0, values, 0.0).sum(axis=1) / np.maximum(weight.sum(axis=1), 1.0))


def pooled_cosines(
    reference: Array, candidate: Array, mask: Array | None = None, candidate_mask: Array | None = None
) -> NDArray[np.float64]:
    """Per sample, the cosine of the mean-pooled embeddings, ``[batch]``. 0 where the candidate is not finite.

    Args:
        candidate_mask: the candidate's real tokens, where they are others than the reference's.
    """
    expected, actual = pool(reference, mask), pool(candidate, mask if candidate_mask is None else candidate_mask)
    finite = np.isfinite(actual).all(axis=1)
    result = np.zeros(len(expected))
    result[finite] = _cosines(expected[finite], actual[finite])
    return result


def _vectors(reference: Array, candidate: Array, mask: Array | None) -> tuple[Array, Array]:
    """Both as ``[vectors, size]``, without padding."""
    reference, candidate = np.asarray(reference), np.asarray(candidate)
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
    if reference.ndim < 2:
        reference, candidate = reference.reshape(-1, 1), candidate.reshape(-1, 1)
    if mask is not None and reference.ndim > 2:
        real = np.asarray(mask) != 0
        if real.shape != reference.shape[:2]:
            raise ValueError(f"the mask is {real.shape}, the tokens are {reference.shape[:2]}")
        reference, candidate = reference[real], candidate[real]
    size = reference.shape[-1]
    return reference.reshape(-1, size), candidate.reshape(-1, size)


def _cosines(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each pair of rows. Two zero vectors are equal (1), a zero and another are not (0)."""
    norms = np.linalg.norm(reference, axis=1), np.linalg.norm(candidate, axis=1)
    product = norms[0] * norms[1]
    dot = np.einsum("ij,ij->i", reference, candidate)
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    cosine = np.clip(dot / np.where(product > 0, product, 1.0), -1.0, 1.0)
    return np.asarray(np.where(product > 0, cosine, both_zero.astype(np.float64)))
