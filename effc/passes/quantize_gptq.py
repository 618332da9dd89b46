"""GPTQ: rounding a weight input by input, and letting later inputs make up for the error of earlier ones.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Written
here, because the two packages that offer it for ONNX graphs do it for whole models of their own (docs/quantization.md),
and none for FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effc.passes.quantize_numbers import Floats

RoundRow = Callable[[Floats, int], Floats]
"""What the weights of one input ``[fan_out]`` become, the ``n``-th of its block."""

# Share of the mean of the second moments that is added to each, as in GPTQ's reference code.
_DAMPING = 0.01


def error_spread(gram: Floats) -> Floats:
    """How an error of input i spreads to the inputs behind it: the upper Cholesky factor of the inverse moments.

    Args:
        gram: second moments of the inputs ``[fan_in, fan_in]``.
    """
    moments = gram.astype(np.float64)
    dead = np.diag(moments) <= 0
    moments[dead, dead] = 1
    moments[np.diag_indices(len(moments))] += _DAMPING * float(np.mean(np.diag(moments)))
    return np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)


@dataclass(frozen=True)
class Feedback:
    """An order of inputs, those with the largest second moments first, and how errors spread in that order.

    What is rounded first has the most inputs behind it to make up for its errors (`act-order` of GPTQ's reference
    code). Blocks of inputs that share a scale have to stay together; inputs of one scale are free.
    """

    order: npt.NDArray[np.intp]
    spread: Floats

    @classmethod
    def of(cls, gram: Floats) -> Feedback:
        """From second moments ``[fan_in, fan_in]``."""
        order = np.argsort(-np.diag(gram), kind="stable")
        return cls(order, error_spread(gram[np.ix_(order, order)]))


def round_with_feedback(weight: Floats, spread: Floats, block_size: int, grid: Callable[[Floats], RoundRow]) -> Floats:
    """``weight [fan_in, fan_out]`` on a grid.

    Args:
        spread: what :func:`error_spread` makes of the inputs' second moments.
        block_size: inputs that are rounded before the others hear of their errors.
        grid: makes the rounding of one block from what is left of its weights ``[block_size, fan_out]``.
    """
    left, rounded = weight.astype(np.float32).copy(), np.empty(weight.shape, np.float32)
    for start in range(0, len(weight), block_size):
        stop = min(start + block_size, len(weight))
        round_row = grid(left[start:stop])
        errors = np.zeros((stop - start, weight.shape[1]), np.float32)
        for row in range(start, stop):
            rounded[row] = round_row(left[row], row - start)
            errors[row - start] = (left[row] - rounded[row]) / spread[row, row]
            left[row + 1 : stop] -= np.outer(spread[row, row + 1 : stop], errors[row - start])
        left[stop:] -= spread[start:stop, stop:].T @ errors
    return rounded
