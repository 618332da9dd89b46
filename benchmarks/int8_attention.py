"""What INT8 products would do to the outputs of local attention, beside bf16 ones.

    python benchmarks/int8_attention.py

The arithmetic of VNNI instructions is imitated exactly: integer products of rounded numbers, summed without error.
Queries and keys are rounded to signed 8 bits with a scale per row, softmax weights to unsigned 8 bits, values with a
scale per column. Softmax and sums stay in fp32. Errors are root mean squares, relative to that of the outputs. With
outliers, one channel in sixteen of the keys is 8 times as large as the others, as trained models have them.
"""

from __future__ import annotations

import argparse
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]


def rounded_rows(x: Array) -> Array:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def rounded_to_bf16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def weights(query: Array, key: Array, window: int) -> Array:
    """Softmax weights, the largest of each row 1."""
    place = np.arange(len(query))
    scores = query @ key.T * query.shape[1] ** -0.5
    scores = np.where(np.abs(place[:, None] - place) <= window // 2, scores, -np.inf)
    result: Array = np.exp(scores - scores.max(axis=1, keepdims=True))
    return result


def attended(pairs: Array, value: Array) -> Array:
    return pairs @ value / pairs.sum(axis=1, keepdims=True)


def errors(length: int, head_dim: int, window: int, outliers: bool) -> dict[str, float]:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((length, head_dim), dtype=np.float32) for _ in range(3))
    if outliers:
        key[:, : head_dim // 16] *= 8
    exact = attended(weights(query, key, window), value)
    by_int8 = weights(rounded_rows(query), rounded_rows(key), window)
    value_scale = np.abs(value).max(axis=0, keepdims=True) / 127
    by_bf16 = weights(rounded_to_bf16(query), rounded_to_bf16(key), window)
    outputs = {
        "bf16": attended(rounded_to_bf16(by_bf16), rounded_to_bf16(value)),
        "int8 scores": attended(by_int8, value),
        "int8 scores and values": attended(np.rint(by_int8 * 255) / 255, np.rint(value / value_scale) * value_scale),
    }
    return {name: float(np.sqrt(np.mean((x - exact) ** 2) / np.mean(exact**2))) for name, x in outputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    for outliers in (False, True):
        print("keys with outliers" if outliers else "normal keys")
        for name, error in errors(arguments.length, arguments.head_dim, arguments.window, outliers).items():
            print(f"  {name:<24} {error:.2%}")


if __name__ == "__main__":
    main()
