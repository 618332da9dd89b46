"""Which variant of a model is the fastest for a request. numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Router:
    """Chooses by measured times.

    Args:
        times: milliseconds of each variant by length in tokens, as ``effc bench`` measured them.
        limits: tokens that each variant takes at most; None where nothing bounds them.
    """

    def __init__(self, times: Mapping[str, Mapping[int, float]], limits: Mapping[str, int | None]):
        self.variants = tuple(times)
        self._limits = {name: float(limits[name] or np.inf) for name in times}
        self._curves = {
            name: (np.array(sorted(curve)), np.array([curve[length] for length in sorted(curve)]))
            for name, curve in times.items()
        }

    def choose(self, length: int) -> str:
        """The variant that takes the least time for a sequence of ``length`` tokens, of those that take it at all.

        One that none takes goes to the variant with the highest limit, which says so.
        """
        able = [name for name in self.variants if length <= self._limits[name]]
        if not able:
            return max(self.variants, key=lambda name: self._limits[name])
        return min(able, key=lambda name: self.milliseconds(name, length))

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
