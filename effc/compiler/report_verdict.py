"""Whether a compile paid off, and met what was required of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effc.compiler.manifest import Manifest, SpeedRecord, Timing
from effc.compiler.report_page import milliseconds, number, times
from effc.compiler.report_plots import timing_pairs

State = Literal["win", "even", "loss", "missed", "unknown"]

# Within 3 % of 1, repeated measurements on a shared machine do not agree which model is faster.
EVEN_BAND = 0.03
UNMEASURED = "Not measured: run `effc bench OUT`."
ENGINES_UNMEASURED = "Engines are timed on the GPU that they are for, and a compile does not run them."


@dataclass(frozen=True)
class Verdict:
    """The first thing a reader sees. ``figure`` is the speed-up in large type."""

    state: State
    figure: str
    headline: str
    detail: str


@dataclass(frozen=True)
class Requirement:
    """What the recipe demanded and what was reached; ``met`` is None where it was not measured."""

    label: str
    wanted: str
    reached: str
    met: bool | None


def judge(manifest: Manifest) -> Verdict:
    """Speed at the longest measured length against the dense twin, in words that do not flatter."""
    bench = manifest.benchmark
    if bench is None or not (measured := longest(bench)):
        reason = ENGINES_UNMEASURED if manifest.engines else UNMEASURED
        return Verdict("unknown", "–", "Speed has not been measured", reason)
    length, dense, compiled = measured
    speedup = bench.speedup[str(length)]
    change = f"{milliseconds(dense.cpu_ms)} → {milliseconds(compiled.cpu_ms)} CPU time per run, median."
    if speedup < 1 - EVEN_BAND:
        headline = f"Slower than dense at {length:,} tokens: every run takes {(1 / speedup - 1):.0%} more CPU time"
        return Verdict("loss", times(speedup), headline, change)
    if speedup <= 1 + EVEN_BAND:
        headline = f"No speed-up at {length:,} tokens: the difference is within the noise of the measurement"
        return Verdict("loss" if speedup < 1 else "even", times(speedup), headline, change)
    headline = f"Faster than dense at {length:,} tokens"
    if any(requirement.met is False for requirement in check_requirements(manifest)):
        return Verdict("missed", times(speedup), f"{headline}, but a requirement is missed", change)
    return Verdict("win", times(speedup), headline, change)


def check_requirements(manifest: Manifest) -> list[Requirement]:
    """``--require-speedup`` and ``--max-quality-drop`` against the measurements; empty where none was set."""
    wanted = manifest.recipe.get("require") or {}
    bench = manifest.benchmark
    result = [
        _speed_requirement(what, speed, speedup)
        for what, speed, speedup in (
            ("speed-up", bench, wanted.get("min_speedup")),
            ("speed-up per token", bench.decode if bench else None, wanted.get("min_decode_speedup")),
        )
        if speedup is not None
    ]
    if (drop := wanted.get("max_quality_drop")) is not None:
        verification = manifest.verification
        label = f"quality drop ({verification.quality_metric})" if verification else "quality drop"
        reached = number(verification.quality_drop) if verification else "not measured"
        met = None if verification is None else verification.quality_drop <= drop
        result.append(Requirement(label, f"≤ {drop:g}", reached, met))
    return result


def _speed_requirement(what: str, speed: SpeedRecord | None, wanted: float) -> Requirement:
    measured = longest(speed) if speed else None
    got = speed.speedup[str(measured[0])] if speed and measured else None
    where = f"{what} at {measured[0]:,} tokens" if measured else what
    reached = times(got) if got is not None else "not measured"
    return Requirement(where, f"≥ {wanted:g}×", reached, None if got is None else got >= wanted)


def longest(bench: SpeedRecord) -> tuple[int, Timing, Timing] | None:
    """``(length, dense, compiled)`` at the longest length at which both were measured."""
    pairs = timing_pairs(bench)
    return pairs[-1] if pairs else None
