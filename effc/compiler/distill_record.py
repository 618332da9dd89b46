"""What a distillation did, for ``distill.json`` and ``effc.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: ``attention-transfer`` or ``distillation``.
        steps: optimizer steps that it took.
        parameters: how many numbers it trained.
        before, after: its held-out loss at its start and at the end, where the best checkpoint counts.
        curve: ``[step, training loss]``, means since the row before.
        held_out: ``[step, held-out loss]``.
    """

    name: str
    steps: int
    parameters: int
    before: float
    after: float
    curve: list[list[float]]
    held_out: list[list[float]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        stages: in their order.
        before, after: held-out loss of the last stage's kind before all training and at the end.
        seconds, cpu_seconds: wall time, and CPU time of the process that finished the run; a killed one's do not count.
        trained_on, held_out: numbers of examples.
        data: where they come from.
    """

    stages: list[Stage]
    before: float
    after: float
    seconds: float
    cpu_seconds: float
    trained_on: int
    held_out: int
    data: str
    notes: list[str] = field(default_factory=list)


def describe(run: Run) -> dict[str, Any]:
    """A run as plain values, with curves short enough to keep."""
    stages = [
        vars(stage) | {"curve": thinned(stage.curve), "held_out": thinned(stage.held_out)} for stage in run.stages
    ]
    return vars(run) | {"stages": stages}


def thinned(curve: list[list[float]], most: int = 100) -> list[list[float]]:
    """At most about this many rows of a curve, the last one included."""
    every = max(1, len(curve) // most)
    return curve[-1::-every][::-1]
