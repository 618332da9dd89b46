"""Draw what a load test measured: latency over the length of the text, and its distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from effc.errors import OutputError, UsageError
from effc.serving.load_result import LoadResult

FORMATS = (".png", ".svg", ".pdf")


def save_plot(result: LoadResult, path: Path) -> None:
    """Write the picture.

    Raises:
        UsageError: if the file name has another ending.
        OutputError: if nothing was answered, or the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"'{path}' is no picture that effc writes.", f"Give a name that ends in {', '.join(FORMATS)}.")
    if not result.samples or result.latency is None:
        raise OutputError("No request was answered, so there is nothing to draw.", "See the errors.")
    try:
        load_figure(result).savefig(path)
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error}.", "Give another path.") from None


def load_figure(result: LoadResult) -> Figure:
    """Two axes: a point per request, and the share of requests that were answered within a time."""
    assert result.latency is not None
    words, seconds = np.array(result.samples).T
    milliseconds = 1000 * seconds
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(words, milliseconds, s=8, alpha=0.5)
    left.set(
        xlabel="words of the text" if result.tool == "effc" else "tokens or words", ylabel="latency, ms", ylim=(0, None)
    )
    right.plot(np.sort(milliseconds), np.arange(1, len(milliseconds) + 1) / len(milliseconds))
    for name, value in (("p50", result.latency.p50), ("p95", result.latency.p95), ("p99", result.latency.p99)):
        right.axvline(value, color="0.6", linewidth=0.8)
        right.annotate(f"{name} {value:.1f}", (value, 0.02), rotation=90, fontsize=8, ha="right")
    right.set(xlabel="latency, ms", ylabel="share of requests", ylim=(0, 1))
    figure.suptitle(f"{result.model}, {result.mode} loop: {result.throughput:.1f} answers/s, {result.failed} errors")
    return figure
