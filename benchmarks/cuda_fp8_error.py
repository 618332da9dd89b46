"""What rounding costs FP8 attention: the CUDA kernels under the emulator against attention in float64.

    python benchmarks/cuda_fp8_error.py

Queries, keys and values are normally distributed, with a scale each that maps the largest of them to 448; the wider
the queries, the fewer keys share a row's weight. ``weights``: against attention to the rounded inputs, which is the
error that the kernels add by rounding weights to E4M3. ``all``: against attention to the inputs as they were.
``mean``: root of the mean square over that of the output; ``largest``: the largest difference over the largest number
of the output.
Needs cmake and g++, no device, and measures no time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effc.plugins.forms.registry import parse_pattern

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "native"))

from cuda_cases import TENSORS, CudaCase, run
from emulated_build import PROGRAM, emulated_build

Tensors = dict[str, NDArray[np.float32]]
# Pattern, causal, q_len, kv_len, heads, heads of keys, head_dim.
PROBLEMS = [
    ("dense", False, 512, 512, 1, 1, 64),
    ("local:64", False, 512, 512, 1, 1, 64),
    ("local:128|sinks:4", True, 512, 512, 2, 1, 128),
    ("dense", True, 1, 2048, 4, 1, 128),
]
WIDTHS = (1.0, 4.0)


def drawn(case: CudaCase, width: float) -> Tensors:
    """Queries, keys and values ``[1, length, heads * head_dim]``."""
    rng = np.random.default_rng(0)
    lengths = (case.q_len, case.keys, case.keys)
    heads = (case.num_heads, case.kv_heads, case.kv_heads)
    tensors = {
        name: rng.standard_normal((1, length, count * case.head_dim)).astype(np.float32)
        for name, length, count in zip(TENSORS, lengths, heads, strict=True)
    }
    return {**tensors, "query": tensors["query"] * np.float32(width)}


def attended(case: CudaCase, tensors: Tensors) -> NDArray[np.float64]:
    """``[1, q_len, num_heads * head_dim]``."""

    def heads(name: str) -> NDArray[np.float64]:
        split = tensors[name][0].astype(np.float64).reshape(len(tensors[name][0]), -1, case.head_dim).transpose(1, 0, 2)
        return split.repeat(case.num_heads // len(split), axis=0)

    seen = parse_pattern(case.pattern).mask(case.q_len, case.keys, case.causal, None)
    scores = np.where(seen, heads("query") @ heads("key").transpose(0, 2, 1) * case.head_dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    output = weights @ heads("value") / weights.sum(axis=-1, keepdims=True)
    return output.transpose(1, 0, 2).reshape(1, case.q_len, -1)


def errors(found: NDArray[np.float32], wanted: NDArray[np.float64]) -> str:
    difference = found - wanted
    mean = np.sqrt(np.square(difference).mean() / np.square(wanted).mean())
    return f"{mean:10.2%}{np.abs(difference).max() / np.abs(wanted).max():10.2%}"


def main() -> None:
    program = emulated_build("cuda-emulated") / PROGRAM
    columns = "".join(f"{name:>10}" for name in ("mean", "largest", "mean", "largest"))
    print(f"{'':52}{'weights':>20}{'all':>20}\n{'problem':44}{'queries':>8}{columns}")
    for pattern, causal, q_len, kv_len, heads, kv_heads, head_dim in PROBLEMS:
        for width in WIDTHS:
            sizes = (pattern, causal, 1, q_len, kv_len, heads, kv_heads, head_dim)
            exact = drawn(CudaCase(*sizes), width)
            scales = tuple(float(np.abs(exact[name]).max()) / 448 for name in TENSORS)
            case = CudaCase(*sizes, number="e4m3", scales=scales)
            rounded = {name: case.meant(exact, name) for name in TENSORS}
            found = run(program, case, feeds=rounded).output
            row = errors(found, attended(case, rounded)) + errors(found, attended(case, exact))
            name = f"{pattern}{' causal' if causal else ''}, {q_len} x {kv_len}, {head_dim}"
            print(f"{name:44}{width:8.0f}{row}", flush=True)


if __name__ == "__main__":
    main()
