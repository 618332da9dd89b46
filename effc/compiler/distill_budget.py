"""How long a training run goes on."""

from __future__ import annotations

import time

import torch


class Budget:
    """How much of a run is done, by steps or by time, whichever is further.

    Args:
        steps: optimizer steps, or None.
        seconds: wall time, or None; at least one of both.
    """

    def __init__(self, steps: int | None, seconds: float | None):
        self.steps, self.seconds = steps, seconds
        self.before = 0.0
        self._started = time.monotonic()

    def start(self, before: float) -> None:
        """Start the clock; ``before`` seconds have been used by a run that this one goes on with."""
        self.before, self._started = before, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds used, on the clock of the first process: all have to stop at the same step."""
        value = self.before + time.monotonic() - self._started
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from accelerate.utils import broadcast_object_list

            value = float(broadcast_object_list([value])[0])
        return value

    def share(self, step: int) -> float:
        """What part of the budget is used up, 0 to 1."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(step / self.steps)
        if self.seconds is not None:
            parts.append(self.elapsed / self.seconds)
        return min(1.0, max(parts))
