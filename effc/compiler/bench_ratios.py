"""What follows from the times of two models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from effc.compiler.manifest import BenchRecord, Timing


def compared(dense: Mapping[str, Timing], compiled: Mapping[str, Timing]) -> dict[str, Any]:
    """The fields of a ``SpeedRecord`` that hold times and ratios; both arguments are keyed by a length as text."""
    speedup = {key: dense[key].cpu_ms / compiled[key].cpu_ms for key in compiled}
    return {
        "lengths": sorted(map(int, compiled)),
        "dense": dict(dense),
        "compiled": dict(compiled),
        "speedup": speedup,
        "speedup_wall": {key: dense[key].wall_ms / compiled[key].wall_ms for key in compiled},
        "memory_ratio": {key: compiled[key].peak_rss_mib / dense[key].peak_rss_mib for key in compiled},
        "break_even_length": break_even({int(key): value for key, value in speedup.items()}),
    }


def break_even(speedup: Mapping[int, float]) -> int | None:
    """The shortest length from which on the compiled model is faster, interpolated between measured lengths.

    The shortest measured length if it is faster there already; None if it is not faster at any.
    """
    previous: tuple[int, float] | None = None
    for length, ratio in sorted(speedup.items()):
        if ratio > 1:
            if previous is None:
                return length
            shorter, below = previous
            return math.ceil(shorter + (length - shorter) * (1 - below) / (ratio - below))
        previous = length, ratio
    return None


def unmet_speed(record: BenchRecord, speedup: float | None, decode_speedup: float | None) -> Iterator[str]:
    """Sentences on the required speed-ups, of the forward pass and per token, that are missed at the longest length."""
    longest = str(max(record.lengths))
    if speedup is not None and record.speedup[longest] < speedup:
        yield f"The speed-up at {longest} tokens is {record.speedup[longest]:.2f}x, below {speedup:g}x."
    if decode_speedup is None:
        return
    if record.decode is None:
        yield f"The speed-up per token is unknown: {record.not_written or 'the model does not write.'}"
    elif (reached := record.decode.speedup[longest]) < decode_speedup:
        yield f"The speed-up per token at place {longest} is {reached:.2f}x, below {decode_speedup:g}x."
