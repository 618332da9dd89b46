"""effc's native kernels against the machine's peak, ONNX Runtime's own attention and compiled flex_attention.

    python benchmarks/cpu_kernels.py                       # local:256, 12 heads x 64, 1k to 8k tokens, and dense MHA
    python benchmarks/cpu_kernels.py --pattern "local:256|sinks:4" --causal --lengths 4096
    python benchmarks/cpu_kernels.py --pattern topk-blocks:8:64 --lengths 8192
    python benchmarks/cpu_kernels.py --flex                # compiled flex_attention too
    python benchmarks/cpu_kernels.py --bf16                # fp32 and bf16, with the error
    python benchmarks/cpu_kernels.py --linear              # linear:elu, both directions, and dense MHA
    python benchmarks/cpu_kernels.py --decode              # one new token, 8k tokens of context, and GQA
    python benchmarks/cpu_kernels.py --patterns            # time per visible pair of every pattern over that of local

Everything is measured side by side in one run, in turns (peak, ours, other, peak, ours, other, ...), because other load
changes the machine from minute to minute. Times are process CPU time, which waiting threads do not add to, divided by
the number of threads. The peak is what multiply-adds from registers reach per core with as many threads at it, right
before and right after the kernel in the same round; "useful" FLOPs are those of visible pairs, 2 multiply-adds each
per element of head_dim.

Two figures of each: the median over rounds, which is what the machine gives under its present load, and the quietest,
the shortest time against the highest peak of all rounds, which is what the kernel is capable of: other processes take
not only time, which CPU time leaves out, but cache and memory bandwidth, which it does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from kernel_contestants import (
    Run,
    Shape,
    exact_precision,
    flex_attention,
    grouped_query_attention,
    multi_head_attention,
    ours,
    peak_meter,
)

from effc.plugins import native

DECODE_PATTERN, PATTERN = "local:512|sinks:4", "local:256"
# About 256 visible keys for each of 4096 queries, cut where tiles end.
EQUAL_DENSITY = [
    "local:256",
    "block:256",
    "block:64:2",
    "dilated:256:4",
    "strided:16",
    "random:4",
    "local:192|global:32",
    "local:192|sinks:64",
]
SLOW_SECONDS = 0.25
"""A contestant that takes longer runs in a few rounds only."""


@dataclass(frozen=True)
class Measured:
    """Seconds of CPU time per thread of every round, and the peak, in operations per second of one core."""

    seconds: Mapping[str, list[float]]
    peaks: list[float]

    def milliseconds(self, name: str) -> tuple[float, float]:
        """Median and minimum."""
        return statistics.median(self.seconds[name]) * 1e3, min(self.seconds[name]) * 1e3

    def share(self, name: str, flops: float, threads: int) -> tuple[float, float]:
        """Of the peak: the median over rounds, and the shortest time against the highest peak."""
        times = [mine * threads for mine in self.seconds[name]]
        shares = [flops / mine / top for mine, top in zip(times, self.peaks, strict=False)]
        return statistics.median(shares), flops / min(times) / max(self.peaks)

    def times(self, slow: str, fast: str) -> tuple[float, float]:
        """How many times slower: the median over common rounds, and minimum over minimum."""
        ratios = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=False)]
        return statistics.median(ratios), min(self.seconds[slow]) / min(self.seconds[fast])


def cpu_seconds(run: Run, repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def measure(contestants: Mapping[str, Run], threads: int, rounds: int, slow_rounds: int = 3) -> Measured:
    """Run all of them in turns, each for at least 10 ms, because the clock ticks; the peak belongs to the first."""
    repeats, fewer = {}, {}
    for name, run in contestants.items():
        run()
        once = max(cpu_seconds(run), 1e-6)
        repeats[name] = max(1, round(0.01 / once))
        fewer[name] = once > SLOW_SECONDS
    peak = peak_meter(threads)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = []
    for number in range(rounds):
        before = peak()
        for name, run in contestants.items():
            if number < slow_rounds or not fewer[name]:
                seconds[name].append(cpu_seconds(run, repeats[name]) / threads)
            if name == next(iter(contestants)):
                peaks.append((before + peak()) / 2)
    return Measured(seconds, peaks)


def pair(figures: tuple[float, float], form: str) -> str:
    return f"{figures[0]:{form}} / {figures[1]:{form}}"


def report(label: str, measured: Measured, threads: int, flops: float) -> dict[str, Any]:
    """Print and return one line: ours against the peak, and every other contestant against ours."""
    share = measured.share("ours", flops, threads)
    line = f"{label:>22}  {pair(measured.milliseconds('ours'), '.3f'):>19} ms"
    line += f"  {pair(share, '.1%'):>15} of {max(measured.peaks) / 1e9:.0f} GFLOP/s"
    record: dict[str, Any] = {"label": label, "ms": measured.milliseconds("ours"), "share_of_peak": share}
    for name in measured.seconds:
        if name == "ours":
            continue
        times = measured.times(name, "ours")
        line += f"  {name} {pair(measured.milliseconds(name), '.2f')} ms, {pair(times, '.2f')}x"
        record[name] = {"ms": measured.milliseconds(name), "times_ours": times}
    print(line, flush=True)
    return record


def compare_lengths(arguments: argparse.Namespace, shapes: list[Shape]) -> list[dict[str, Any]]:
    dense = grouped_query_attention if arguments.decode else multi_head_attention
    name = "GQA" if arguments.decode else "MHA"
    records = []
    for shape in shapes:
        contestants = {"ours": ours(shape, arguments.threads), name: dense(shape, arguments.threads)}
        if arguments.flex:
            contestants["flex"] = flex_attention(shape, arguments.threads)
        measured = measure(contestants, arguments.threads, arguments.rounds)
        records.append(report(f"{shape.kv_len} keys", measured, arguments.threads, shape.flops()))
    return records


def compare_precisions(arguments: argparse.Namespace, shapes: list[Shape]) -> list[dict[str, Any]]:
    """bf16 is ``ours``, so that ratios say how much faster it is than fp32."""
    records = []
    for shape in shapes:
        bf16, fp32 = (ours(shape, arguments.threads, precision) for precision in ("bf16", "fp32"))
        measured = measure({"ours": bf16, "fp32": fp32}, arguments.threads, arguments.rounds)
        record = report(f"{shape.kv_len} keys, bf16", measured, arguments.threads, shape.flops())
        rounded, exact = bf16().numpy(), fp32().numpy()
        record["error"] = {
            "largest": float(np.abs(rounded - exact).max()),
            "relative_rms": float(np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))),
        }
        print(f"{'error':>22}  largest {record['error']['largest']:.4f}, ", end="")
        print(f"root mean square {record['error']['relative_rms']:.2%} of that of the outputs", flush=True)
        records.append(record)
    return records


def compare_linear(arguments: argparse.Namespace, shapes: list[Shape]) -> list[dict[str, Any]]:
    records = []
    for shape in shapes:
        dense = multi_head_attention(shape, arguments.threads)
        for causal in (False, True):
            linear = replace(shape, pattern="linear:elu", causal=causal)
            contestants = {"ours": ours(linear, arguments.threads), "MHA": dense}
            measured = measure(contestants, arguments.threads, arguments.rounds)
            # State in and state out; pairs within a causal chunk are not counted.
            flops = 4.0 * shape.kv_len * shape.head_dim**2 * shape.num_heads
            label = f"{shape.kv_len} keys, {'causal' if causal else 'both'}"
            records.append(report(label, measured, arguments.threads, flops))
    return records


def compare_patterns(arguments: argparse.Namespace, shapes: list[Shape]) -> list[dict[str, Any]]:
    """Time per visible pair over that of local:256, per length."""
    records = []
    for shape in shapes:
        all_shapes = {pattern: replace(shape, pattern=pattern) for pattern in EQUAL_DENSITY}
        contestants = {pattern: ours(own, arguments.threads) for pattern, own in all_shapes.items()}
        measured = measure(contestants, arguments.threads, arguments.rounds)
        print(f"{shape.kv_len} keys: nanoseconds per visible pair and head, and times local's (median / quietest)")
        local = all_shapes[EQUAL_DENSITY[0]].visible_pairs()
        for pattern, own in all_shapes.items():
            pairs = own.visible_pairs()
            times = measured.times(pattern, EQUAL_DENSITY[0])
            ratio = (times[0] * local / pairs, times[1] * local / pairs)
            cost = [ms * 1e6 * arguments.threads / pairs / shape.num_heads for ms in measured.milliseconds(pattern)]
            print(f"{pattern:>22}  {pairs / shape.q_len:6.1f} keys per query  {cost[0]:.2f} / {cost[1]:.2f} ns", end="")
            print(f"  {pair(ratio, '.2f')}x", flush=True)
            records.append({"keys": shape.kv_len, "pattern": pattern, "ns_per_pair": cost, "times_local": ratio})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default=None, help=f"default {PATTERN}, with --decode {DECODE_PATTERN}")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="default 1024 2048 4096 8192")
    parser.add_argument("--heads", type=int, default=None, help="default 12, with --decode 32")
    parser.add_argument("--kv-heads", type=int, default=None, help="default as --heads, with --decode 8")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--flex", action="store_true", help="also compiled flex_attention (compiles for a minute)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    section = parser.add_mutually_exclusive_group()
    section.add_argument("--decode", action="store_true", help="one query; the dense baseline is GroupQueryAttention")
    section.add_argument("--bf16", action="store_true", help="fp32 and bf16 products")
    section.add_argument("--linear", action="store_true", help="linear attention against dense MHA")
    section.add_argument("--patterns", action="store_true", help="every pattern at equal density")
    arguments = parser.parse_args()

    exact_precision()
    decode: bool = arguments.decode
    heads = arguments.heads or (32 if decode else 12)
    kv_heads = arguments.kv_heads or (8 if decode and arguments.heads is None else heads)
    pattern = arguments.pattern or (DECODE_PATTERN if decode else PATTERN)
    usual = [4096] if arguments.patterns else [8192] if decode or arguments.linear else [1024, 2048, 4096, 8192]
    shapes = [
        Shape(pattern, arguments.causal or decode, 1 if decode else length, length, heads, kv_heads, arguments.head_dim)
        for length in arguments.lengths or usual
    ]
    print(f"{pattern}, {heads}/{kv_heads} heads x {arguments.head_dim}, {arguments.threads} threads, {native.isa()};")
    print(f"median / quietest of {arguments.rounds} rounds; times are CPU time per thread")
    sections: dict[str, Callable[[argparse.Namespace, list[Shape]], list[dict[str, Any]]]] = {
        "bf16": compare_precisions,
        "linear": compare_linear,
        "patterns": compare_patterns,
    }
    chosen = next((run for name, run in sections.items() if getattr(arguments, name)), compare_lengths)
    records = chosen(arguments, shapes)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
