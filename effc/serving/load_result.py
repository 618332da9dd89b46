"""What a load test measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Latencies:
    """Of the answered requests, in milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latencies:
        """Percentiles of measured times; at least one."""
        values = 1000 * np.array(seconds)
        p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
        return cls(float(values.mean()), p50, p95, p99, float(values.max()))


@dataclass(frozen=True)
class LoadResult:
    """What was measured.

    Attributes:
        mode: ``closed`` or ``open``.
        seconds: from the first request to the last answer.
        throughput: answers per second.
        latency: of whole answers; None if there was none.
        first_token: until a written text began; None for models that write none.
        tokens_per_s: that all texts together got; 0 for models that write none.
        errors: how often each error was met.
        samples: words of the text (tokens, where tensors were sent) and seconds of each answered request.
        tool: what sent the requests.
    """

    model: str
    mode: str
    requests: int
    failed: int
    seconds: float
    throughput: float
    latency: Latencies | None
    first_token: Latencies | None
    tokens_per_s: float
    errors: dict[str, int]
    samples: tuple[tuple[int, float], ...] = ()
    tool: str = "effc"

    def to_json(self) -> dict[str, Any]:
        """Without the samples."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}
