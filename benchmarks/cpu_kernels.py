"""effc::SparseAttention on CPU against the machine's peak, ONNX Runtime's own attention and compiled flex_attention.

    python benchmarks/cpu_kernels.py                       # local:256, 12 heads x 64, 1k to 8k tokens
    python benchmarks/cpu_kernels.py --pattern "local:256|sinks:4" --causal --lengths 4096
    python benchmarks/cpu_kernels.py --decode              # one new token, 8k tokens of context
    python benchmarks/cpu_kernels.py --flex --json out.json

Everything is measured side by side in one run, in turns (peak, ours, other, peak, ours, other, ...), because other load
changes the machine from minute to minute. Times are process CPU time, which waiting threads do not add to, divided by
the number of threads. The peak is what one core does with multiply-adds from registers in the same round; "useful"
FLOPs are those of visible pairs, 2 multiply-adds each per element of head_dim. A share of peak is the median over
rounds of the share in each round.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effc.plugins import native

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Shape:
    """One attention call."""

    pattern: str
    causal: bool
    q_len: int
    kv_len: int
    num_heads: int
    kv_num_heads: int
    head_dim: int


@dataclass(frozen=True)
class Result:
    """What is printed and written as JSON. Times are milliseconds of CPU time per thread."""

    shape: Shape
    peak_gflops_per_core: float
    ours_ms: float
    share_of_peak: float
    mha_ms: float
    times_mha: float
    flex_ms: float | None = None
    times_flex: float | None = None


def visible_pairs(shape: Shape) -> int:
    """Visible (query, key) pairs, counted by the pattern's definition a query at a time."""
    key = np.arange(shape.kv_len)
    pairs = 0
    for i in range(shape.kv_len - shape.q_len, shape.kv_len):
        seen = np.zeros(shape.kv_len, dtype=bool)
        for term in shape.pattern.split("|"):
            name, *numbers = term.split(":")
            p = [int(number) for number in numbers]
            if name == "dense":
                seen[:] = True
            elif name == "local" and len(p) == 1:
                seen |= (key > i - p[0]) & (key <= i) if shape.causal else abs(key - i) <= p[0] // 2
            elif name == "sinks":
                seen |= key < p[0]
            elif name == "global":
                seen |= (key < p[0]) | (i < p[0])
            elif name == "block":
                seen |= abs(key // p[0] - i // p[0]) <= (p[1] if len(p) > 1 else 0)
            elif name == "strided":
                seen |= (key - i) % p[0] == 0
            elif name == "dilated":
                reach = (p[0] - 1 if shape.causal else p[0] // 2) * p[1]
                seen |= (abs(key - i) <= reach) & ((key - i) % p[1] == 0)
            else:
                raise SystemExit(f"cannot count the visible pairs of '{term}'")
        pairs += int((seen & (key <= i)).sum() if shape.causal else seen.sum())
    return pairs


def session(node: Any, inputs: Feeds, threads: int, library: str | None) -> onnxruntime.InferenceSession:
    """A session of one node with the given inputs; threads sleep while they wait."""
    kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    given = [helper.make_tensor_value_info(n, kinds[str(x.dtype)], x.shape) for n, x in inputs.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("effc", 1), ("com.microsoft", 1))]
    model = helper.make_model(
        helper.make_graph([node], "attention", given, outputs), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def tensors(shape: Shape) -> Feeds:
    rng = np.random.default_rng(0)

    def normal(length: int, heads: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((1, length, heads * shape.head_dim), dtype=np.float32)

    return {
        "query": normal(shape.q_len, shape.num_heads),
        "key": normal(shape.kv_len, shape.kv_num_heads),
        "value": normal(shape.kv_len, shape.kv_num_heads),
    }


def ours(shape: Shape, threads: int) -> Callable[[], Any]:
    feeds = tensors(shape)
    node = helper.make_node(
        "SparseAttention",
        list(feeds),
        ["output"],
        domain="effc",
        pattern=shape.pattern,
        causal=int(shape.causal),
        num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
        scale=shape.head_dim**-0.5,
    )
    run = session(node, feeds, threads, native.native_library()).run
    return lambda: run(None, feeds)


def multi_head_attention(shape: Shape, threads: int) -> Callable[[], Any]:
    """Contrib MultiHeadAttention without a mask, which takes its flash path: ONNX Runtime's strongest dense attention.

    It has no grouped heads, so it reads as many key heads as there are query heads.
    """
    every_head = Shape("dense", False, shape.q_len, shape.kv_len, shape.num_heads, shape.num_heads, shape.head_dim)
    feeds = tensors(every_head)
    node = helper.make_node(
        "MultiHeadAttention", list(feeds), ["output"], domain="com.microsoft", num_heads=shape.num_heads
    )
    run = session(node, feeds, threads, None).run
    return lambda: run(None, feeds)


def grouped_query_attention(shape: Shape, threads: int) -> Callable[[], Any]:
    """Contrib GroupQueryAttention for one new token. It appends to the cache, which is part of its time."""
    feeds = tensors(shape)
    past = shape.kv_len - shape.q_len
    rng = np.random.default_rng(1)
    cache = [rng.standard_normal((1, shape.kv_num_heads, past, shape.head_dim), dtype=np.float32) for _ in range(2)]
    feeds = {
        "query": feeds["query"],
        "key": np.ascontiguousarray(feeds["key"][:, -shape.q_len :]),
        "value": np.ascontiguousarray(feeds["value"][:, -shape.q_len :]),
        "past_key": cache[0],
        "past_value": cache[1],
        "seqlens_k": np.array([shape.kv_len - 1], np.int32),
        "total": np.array(shape.kv_len, np.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention",
        list(feeds),
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
    )
    run = session(node, feeds, threads, None).run
    return lambda: run(["output"], feeds)


def flex_attention(shape: Shape, threads: int) -> Callable[[], Any]:
    """PyTorch's flex_attention, compiled, with the local window as its block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    name, window = shape.pattern.split(":")
    if name != "local":
        raise SystemExit("--flex compares local:W only")
    reach = int(window) - 1 if shape.causal else int(window) // 2

    def mask(batch: Any, head: Any, i: Any, j: Any) -> Any:
        return ((i >= j) & (i - j <= reach)) if shape.causal else (abs(i - j) <= reach)

    torch.set_num_threads(threads)
    blocks = create_block_mask(mask, None, None, shape.q_len, shape.kv_len, device="cpu")
    q, k, v = (
        torch.randn(1, shape.num_heads, length, shape.head_dim) for length in (shape.q_len, shape.kv_len, shape.kv_len)
    )
    compiled = torch.compile(flex)

    def run() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=blocks)

    return run


def cpu_seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def peak_meter() -> Callable[[], float]:
    """Returns a function that measures floating point operations per second of one core, right now."""
    rounds = ctypes.CDLL(native.native_library()).effc_multiply_add_rounds
    rounds.restype, rounds.argtypes = ctypes.c_double, [ctypes.c_int64]

    def measure() -> float:
        start = time.process_time()
        operations: float = rounds(10_000_000)
        return operations / (time.process_time() - start)

    return measure


def compare(shape: Shape, threads: int, rounds: int, flex: bool, dense: Callable[[], Any]) -> Result:
    """Measure in turns and take medians; ratios are medians of the ratios within a round."""
    contestants = {"ours": ours(shape, threads), "mha": dense}
    if flex:
        contestants["flex"] = flex_attention(shape, threads)
    repeats = {}
    for name, run in contestants.items():
        run()
        # A round of at least 20 ms each: the clock ticks, and short calls are noisy.
        repeats[name] = max(1, round(0.02 / max(cpu_seconds(run), 1e-6)))
    peak = peak_meter()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: list[float] = []
    for _ in range(rounds):
        peaks.append(peak())
        for name, run in contestants.items():
            seconds[name].append(cpu_seconds(run, repeats[name]))
    flops = 4.0 * visible_pairs(shape) * shape.head_dim * shape.num_heads
    median = statistics.median

    def per_thread(name: str) -> float:
        return median(seconds[name]) / threads * 1e3

    def ratio(name: str) -> float:
        return median(other / mine for other, mine in zip(seconds[name], seconds["ours"], strict=True))

    return Result(
        shape=shape,
        peak_gflops_per_core=median(peaks) / 1e9,
        ours_ms=per_thread("ours"),
        share_of_peak=median(flops / mine / top for mine, top in zip(seconds["ours"], peaks, strict=True)),
        mha_ms=per_thread("mha"),
        times_mha=ratio("mha"),
        flex_ms=per_thread("flex") if flex else None,
        times_flex=ratio("flex") if flex else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default=None, help="default local:256, with --decode local:512|sinks:4")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="default 1024 2048 4096 8192")
    parser.add_argument("--heads", type=int, default=None, help="default 12, with --decode 32")
    parser.add_argument("--kv-heads", type=int, default=None, help="default as --heads, with --decode 8")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--decode", action="store_true", help="one query; the dense baseline is GroupQueryAttention")
    parser.add_argument("--flex", action="store_true", help="also compiled flex_attention (compiles for a minute)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    arguments = parser.parse_args()

    decode: bool = arguments.decode
    heads = arguments.heads or (32 if decode else 12)
    kv_heads = arguments.kv_heads or (8 if decode and arguments.heads is None else heads)
    pattern = arguments.pattern or ("local:512|sinks:4" if decode else "local:256")
    lengths = arguments.lengths or ([8192] if decode else [1024, 2048, 4096, 8192])
    baseline = grouped_query_attention if decode else multi_head_attention
    print(f"{pattern}, {heads}/{kv_heads} heads x {arguments.head_dim}, {arguments.threads} threads, {native.isa()}")
    print(f"{'keys':>6} {'ours ms':>9} {'of peak':>8} {'dense ms':>9} {'faster':>7} {'flex ms':>8} {'faster':>7}")
    results = []
    for length in lengths:
        q_len = 1 if decode else length
        shape = Shape(pattern, arguments.causal or decode, q_len, length, heads, kv_heads, arguments.head_dim)
        dense = baseline(shape, arguments.threads)
        result = compare(shape, arguments.threads, arguments.rounds, arguments.flex, dense)
        results.append(asdict(result))
        line = f"{length:>6} {result.ours_ms:>9.3f} {result.share_of_peak:>8.1%} {result.mha_ms:>9.3f}"
        line += f" {result.times_mha:>6.1f}x"
        if result.flex_ms is not None:
            line += f" {result.flex_ms:>8.2f} {result.times_flex:>6.2f}x"
        print(line, flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
