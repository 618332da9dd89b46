"""Which variant of a model is to answer a request: the fastest, or the best that is fast enough. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Budget:
    """How long an answer may take.

    Attributes:
        milliseconds: from a request's arrival at the router to its answer.
        drops: what each variant loses of quality.
        parallel: requests that are computed at the same time, each as fast as alone.
    """

    milliseconds: float
    drops: Mapping[str, float]
    parallel: int = 1


class Router:
    """Chooses by measured times.

    Args:
        times: milliseconds of each variant by length in tokens, as ``effc bench`` measured them.
        limits: tokens that each variant takes at most; None where nothing bounds them.
        budget: choose the variant that loses least of those that keep it; the fastest one where none does, or where
            there is no budget.
    """

    def __init__(
        self,
        times: Mapping[str, Mapping[int, float]],
        limits: Mapping[str, int | None],
        budget: Budget | None = None,
    ):
        self.variants = tuple(times)
        self._budget = budget
        self._limits = {name: float(limits[name] or np.inf) for name in times}
        self._curves = {
            name: (np.array(sorted(curve)), np.array([curve[length] for length in sorted(curve)]))
            for name, curve in times.items()
        }

    def choose(self, length: int, rows: int = 1, waiting: float = 0.0) -> str:
        """The variant for ``rows`` sequences of ``length`` tokens, of those that take that length at all.

        A length that none takes goes to the variant with the highest limit, which says so.

        Args:
            waiting: milliseconds of computing that requests before this one still need.
        """
        able = [name for name in self.variants if length <= self._limits[name]]
        if not able:
            return max(self.variants, key=lambda name: self._limits[name])
        fastest = min(able, key=lambda name: self.milliseconds(name, length))
        if self._budget is None:
            return fastest
        budget = self._budget
        left = budget.milliseconds - waiting / budget.parallel
        kept = [name for name in able if rows * self.milliseconds(name, length) <= left]
        return min(kept, key=lambda name: budget.drops[name], default=fastest)

    def milliseconds(self, variant: str, length: int) -> float:
        """Expected time: on a line between measured lengths, and on the line of the outer two beyond them."""
        lengths, times = self._curves[variant]
        if len(lengths) == 1:
            return float(times[0] * length / lengths[0])
        if length > lengths[-1] or length < lengths[0]:
            low, high = (-2, -1) if length > lengths[-1] else (0, 1)
            slope = (times[high] - times[low]) / (lengths[high] - lengths[low])
            return float(times[low] + slope * (length - lengths[low]))
        return float(np.interp(length, lengths, times))
