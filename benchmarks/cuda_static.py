"""What can be said about the CUDA kernels without a device: nothing here is measured on one.

    python benchmarks/cuda_static.py                       # all architectures: minutes, the first time
    python benchmarks/cuda_static.py --architectures 86 --head-sizes 64
    python benchmarks/cuda_static.py --work                # counts and floors only

The first table is what nvcc makes of every kernel: registers, bytes spilled, instructions for tensor cores, and how
many blocks fit on a multiprocessor by NVIDIA's occupancy calculator. The second counts the work of a problem exactly,
with the kernel's own walk over the pattern, against dense attention with the same kernel. The third divides that work
by the peaks of datasheets: a floor, which says what no kernel that does this work can be faster than, and not how fast
this one is.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import cuda_build

FLOPS_PER_PRODUCT = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Peak:
    """From NVIDIA's datasheets: dense fp16 products with fp32 sums, and memory."""

    device: str
    teraflops: float
    gigabytes_per_second: float


PEAKS = [
    Peak("A100 80GB SXM (sm_80)", 312.0, 2039.0),
    Peak("RTX 3090 (sm_86)", 71.0, 936.0),
    Peak("RTX 4090 (sm_89)", 165.2, 1008.0),
    Peak("H100 SXM (sm_90)", 989.4, 3350.0),
    Peak("RTX 5090 (sm_120)", 209.5, 1792.0),
]

# Name, pattern, causal, (batch, q_len, kv_len, num_heads, kv_num_heads, head_dim).
PROBLEMS = [
    ("encoder, 4k", "local:256", False, (1, 4096, 4096, 12, 12, 64)),
    ("encoder, 16k", "local:256", False, (1, 16384, 16384, 12, 12, 64)),
    ("encoder, 4k, blocks", "block:64:1|random:2|global:64", False, (1, 4096, 4096, 12, 12, 64)),
    ("prefill, 8k", "local:512|sinks:4", True, (1, 8192, 8192, 32, 8, 128)),
    ("decode, 8k", "local:512|sinks:4", True, (1, 1, 8192, 32, 8, 128)),
]
# Name, causal, sizes as above.
LINEAR_PROBLEMS = [
    ("encoder, 512", False, (8, 512, 512, 12, 12, 64)),
    ("encoder, 16k", False, (1, 16384, 16384, 12, 12, 64)),
    ("prefill, 8k", True, (1, 8192, 8192, 32, 8, 128)),
]


def compiled_table(architectures: list[int], head_sizes: tuple[int, ...]) -> None:
    header = ("kernel", "numbers", "arch", "registers", "spilled", "HMMA", "LDL+STL", "shared KiB", "blocks", "warps")
    print("".join(f"{word:>12}" if n else f"{word:22}" for n, word in enumerate(header)))
    for architecture in architectures:
        for kernel in cuda_build.kernels(architecture, head_sizes):
            threads, shared = 128, 0
            if kernel.tile is not None:
                tile = cuda_build.tile_shapes()[kernel.tile]
                threads, shared = tile["threads"], tile["shared_bytes"]
            blocks = cuda_build.blocks_per_multiprocessor(architecture, kernel.registers, threads, shared)
            row = (
                kernel.number,
                f"sm_{architecture}",
                kernel.registers,
                kernel.spill_bytes,
                kernel.tensor_core,
                kernel.local_memory,
                f"{shared / 1024:.1f}",
                blocks,
                blocks * threads // 32,
            )
            print(f"{kernel.name:22}" + "".join(f"{word!s:>12}" for word in row), flush=True)


def linear_table() -> None:
    columns = ("sum tiles", "state tiles", "pair tiles", "mma", "of dense", "workspace")
    print(f"{'linear attention':22}" + "".join(f"{word:>14}" for word in columns))
    for name, causal, sizes in LINEAR_PROBLEMS:
        ours = cuda_build.work("linear", causal, sizes)
        dense = cuda_build.work("dense", causal, sizes)
        row = [ours[key] for key in ("sum_tiles", "state_tiles", "pair_tiles", "matrix_products")]
        share = f"{ours['matrix_products'] / dense['matrix_products']:.1%}"
        print(f"{name:22}" + "".join(f"{word!s:>14}" for word in (*row, share, ours["workspace_bytes"])))


def work_table() -> None:
    columns = f"{'tiles':>12}{'of dense':>10}{'partial':>10}{'mma':>14}{'of dense':>10}{'key bytes read':>16}"
    print(f"{'problem':22}{columns}")
    for name, pattern, causal, sizes in PROBLEMS:
        ours = cuda_build.work(pattern, causal, sizes)
        dense = cuda_build.work("dense", causal, sizes)
        print(
            f"{name:22}{ours['tiles']:12}{ours['tiles'] / dense['tiles']:10.1%}{ours['partial_tiles']:10}"
            f"{ours['matrix_products']:14}{ours['matrix_products'] / dense['matrix_products']:10.1%}"
            f"{ours['key_bytes_read']:16}"
        )


def floor_table() -> None:
    print(
        "Floors: this work cannot be done faster than in so many microseconds, by the datasheets' peaks of arithmetic"
    )
    print("and of memory (every number moved once). No kernel reaches them, and nothing here was measured.")
    print(f"{'problem':22}" + "".join(f"{peak.device:>26}" for peak in PEAKS))
    for name, pattern, causal, sizes in PROBLEMS:
        counted = cuda_build.work(pattern, causal, sizes)
        moved = counted["query_bytes"] + min(counted["key_bytes"], counted["key_bytes_read"])
        row = ""
        for peak in PEAKS:
            arithmetic = counted["matrix_products"] * FLOPS_PER_PRODUCT / (peak.teraflops * 1e6)
            memory = moved / (peak.gigabytes_per_second * 1e3)
            row += f"{max(arithmetic, memory):17.1f} {'(memory)' if memory > arithmetic else '(tensor)'}"
        print(f"{name:22}{row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(cuda_build.ARCHITECTURES))
    parser.add_argument("--head-sizes", type=int, nargs="+", default=list(cuda_build.HEAD_SIZES))
    parser.add_argument("--work", action="store_true", help="counts and floors only")
    arguments = parser.parse_args()
    if not arguments.work:
        missing = cuda_build.missing_tools()
        if missing is not None:
            raise SystemExit(f"Cannot compile the kernels: {missing}.")
        compiled_table(arguments.architectures, tuple(arguments.head_sizes))
        print()
    work_table()
    print()
    linear_table()
    print()
    floor_table()


if __name__ == "__main__":
    main()
