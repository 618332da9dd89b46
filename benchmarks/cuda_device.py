"""The CUDA kernels on a device against torch's scaled_dot_product_attention (FlashAttention), timed with CUDA events.

    python benchmarks/cuda_device.py                        # builds the kernels for this device first
    python benchmarks/cuda_device.py --pattern "local:512|sinks:4" --causal --heads 32 --kv-heads 8 --head-dim 128
    python benchmarks/cuda_device.py --decode --kv-len 8192
    python benchmarks/cuda_device.py --linear elu --causal  # linear attention, in place of a pattern
    python benchmarks/cuda_device.py --fp8                  # E4M3 in, on devices of compute capability 8.9 and newer

Every problem is checked first, against the float64 definition on small sizes and against SDPA with a mask on the sizes
that are timed; a wrong result ends the run. Then both take turns, so that clocks and temperature are the same for
both; printed are the median and the fastest of all rounds. Linear attention is checked against its own definition, and
dense SDPA stands beside it as what a user would replace. Dense SDPA does more work than a sparse kernel: the times
are what a user would see, and the share of visible pairs stands beside them. Without a device it says so and measures
nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from effc.plugins.forms.linear import Linear
from effc.plugins.forms.registry import parse_pattern
from effc.plugins.reference import attend

REPOSITORY = Path(__file__).resolve().parents[1]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
NUMBERS = {torch.float16: 1, torch.bfloat16: 2}
WARM_UP = 5


def no_device() -> str | None:
    """What stands against a measurement here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (no device, no driver, or a build of torch without CUDA)"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    for tool in ("nvcc", "cmake"):
        if shutil.which(tool) is None:
            return f"{tool} is not in PATH"
    return None


def build_library() -> ctypes.CDLL:
    """The kernels for this device, with the C function that this benchmark calls."""
    major, minor = torch.cuda.get_device_capability()
    folder = Path(tempfile.gettempdir()) / f"effc-cuda-device-{major}{minor}"
    configure = ["cmake", "-S", REPOSITORY, "-B", folder, "-DEFFC_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}"]
    for command in (configure, ["cmake", "--build", folder, "-j", "--target", "effc_cuda_c"]):
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    library = ctypes.CDLL(str(folder / "libeffc_cuda_c.so"))
    library.effc_cuda_sparse_attention.restype = ctypes.c_char_p
    library.effc_cuda_sparse_attention_e4m3.restype = ctypes.c_char_p
    library.effc_cuda_linear_attention.restype = ctypes.c_char_p
    return library


class Attention:
    """One problem: its tensors, our kernel and SDPA."""

    allowed_error = 2.0  # times TOLERANCE

    def __init__(
        self, library: ctypes.CDLL, arguments: argparse.Namespace, q_len: int, kv_len: int, dtype: torch.dtype
    ):
        self.library, self.pattern, self.causal = library, arguments.pattern, arguments.causal
        self.map = None if arguments.linear is None else Linear(arguments.linear)
        self.batch, self.heads, self.kv_heads = arguments.batch, arguments.heads, arguments.kv_heads
        self.head_dim, self.q_len, self.kv_len, self.dtype = arguments.head_dim, q_len, kv_len, dtype
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(length: int, heads: int) -> torch.Tensor:
            shape = (self.batch, length, heads * self.head_dim)
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

        self.query, self.key, self.value = (
            normal(q_len, self.heads),
            normal(kv_len, self.kv_heads),
            normal(kv_len, self.kv_heads),
        )
        self.output = torch.empty_like(self.query)
        # A causal state of 256 keys at a time, kept twice: sums and means.
        states = self.batch * self.kv_heads * (kv_len // 256 + 2) * self.head_dim * (self.head_dim + 1)
        room = (64 << 20) + (0 if self.map is None else 8 * states)
        self.workspace = torch.empty(room, dtype=torch.uint8, device="cuda")

    def split(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        return tensor.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def ours(self) -> torch.Tensor:
        return self.sparse() if self.map is None else self.linear()

    def linear(self) -> torch.Tensor:
        assert self.map is not None
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (self.query, self.key, self.value, self.output)]
        sizes = (self.workspace.numel(), self.batch, self.q_len, self.kv_len)
        problem = self.library.effc_cuda_linear_attention(
            *pointers,
            ctypes.c_void_p(),
            ctypes.c_void_p(),
            ctypes.c_void_p(self.workspace.data_ptr()),
            *(ctypes.c_int64(size) for size in (*sizes, self.heads, self.kv_heads, self.head_dim)),
            ctypes.c_int(NUMBERS[self.dtype]),
            ctypes.c_int(self.map.map == "relu"),
            ctypes.c_int(self.causal),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if problem is not None:
            raise SystemExit(f"The kernel refuses: {problem.decode()}")
        return self.output

    def sparse(self) -> torch.Tensor:
        pointers = (self.query, self.key, self.value, self.output, self.workspace)
        problem = self.library.effc_cuda_sparse_attention(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers),
            ctypes.c_int64(self.workspace.numel()),
            *(ctypes.c_int64(size) for size in (self.batch, self.q_len, self.kv_len)),
            *(ctypes.c_int64(size) for size in (self.heads, self.kv_heads, self.head_dim)),
            ctypes.c_float(self.head_dim**-0.5),
            ctypes.c_int(NUMBERS[self.dtype]),
            self.pattern.encode(),
            ctypes.c_int(self.causal),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if problem is not None:
            raise SystemExit(f"The kernel refuses: {problem.decode()}")
        return self.output

    def dense(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        causal = self.causal and mask is None and self.q_len == self.kv_len
        found = torch.nn.functional.scaled_dot_product_attention(
            self.split(self.query, self.heads),
            self.split(self.key, self.kv_heads),
            self.split(self.value, self.kv_heads),
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=self.heads != self.kv_heads,
        )
        return found.transpose(1, 2).flatten(2)

    def mask(self) -> torch.Tensor:
        return torch.from_numpy(parse_pattern(self.pattern).mask(self.q_len, self.kv_len, self.causal, None)).cuda()

    def definition(self) -> torch.Tensor:
        """In float64 on the CPU."""
        found = attend(
            self.map or parse_pattern(self.pattern),
            self.split(self.query, self.heads).double().cpu(),
            self.split(self.key, self.kv_heads).double().cpu(),
            self.split(self.value, self.kv_heads).double().cpu(),
            scale=self.head_dim**-0.5,
            causal=self.causal,
        )
        return found.transpose(1, 2).flatten(2)

    def check(self, expected: torch.Tensor) -> float:
        expected = expected.double().cpu()
        actual = self.ours().double().cpu()
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not error <= self.allowed_error * TOLERANCE[self.dtype]:
            raise SystemExit(f"WRONG: relative error {error:.2e} with {self.q_len} queries of {self.kv_len} keys.")
        return error


class Fp8Attention(Attention):
    """The same of the E4M3 numbers nearest to the inputs; SDPA gets what they stand for, in 16 bits."""

    allowed_error = 50.0

    def __init__(
        self, library: ctypes.CDLL, arguments: argparse.Namespace, q_len: int, kv_len: int, dtype: torch.dtype
    ):
        super().__init__(library, arguments, q_len, kv_len, dtype)
        tensors = (self.query, self.key, self.value)
        self.scales = [tensor.abs().max().item() / 448 for tensor in tensors]
        self.codes = [
            (tensor.float() / scale).to(torch.float8_e4m3fn) for tensor, scale in zip(tensors, self.scales, strict=True)
        ]
        self.query, self.key, self.value = (
            (codes.float() * scale).to(dtype) for codes, scale in zip(self.codes, self.scales, strict=True)
        )

    def sparse(self) -> torch.Tensor:
        problem = self.library.effc_cuda_sparse_attention_e4m3(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (*self.codes, self.output, self.workspace)),
            ctypes.c_int64(self.workspace.numel()),
            *(ctypes.c_int64(size) for size in (self.batch, self.q_len, self.kv_len)),
            *(ctypes.c_int64(size) for size in (self.heads, self.kv_heads, self.head_dim)),
            *(ctypes.c_float(scale) for scale in (self.head_dim**-0.5, *self.scales)),
            ctypes.c_int(NUMBERS[self.dtype]),
            self.pattern.encode(),
            ctypes.c_int(self.causal),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if problem is not None:
            raise SystemExit(f"The kernel refuses: {problem.decode()}")
        return self.output


def milliseconds(run: object) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()  # type: ignore[operator]
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def measure(library: ctypes.CDLL, arguments: argparse.Namespace, q_len: int, kv_len: int) -> None:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    kind = Fp8Attention if arguments.fp8 else Attention
    small = kind(library, arguments, min(q_len, 300), min(kv_len, 300), dtype)
    definition_error = small.check(small.definition())
    problem = kind(library, arguments, q_len, kv_len, dtype)
    if problem.map is not None:
        error, share = problem.check(problem.definition()), 1.0
    else:
        mask = problem.mask()
        error, share = problem.check(problem.dense(mask)), mask.float().mean().item()
        del mask
    for _ in range(WARM_UP):
        problem.ours(), problem.dense()
    times: dict[str, list[float]] = {"effc": [], "sdpa": []}
    for _ in range(arguments.rounds):
        times["effc"].append(milliseconds(problem.ours))
        times["sdpa"].append(milliseconds(problem.dense))
    ours, dense = times["effc"], times["sdpa"]
    print(
        f"{q_len:7} x {kv_len:7}  visible {share:6.1%}  error {max(error, definition_error):.1e}  "
        f"effc {statistics.median(ours):8.3f} / {min(ours):8.3f} ms  "
        f"dense SDPA {statistics.median(dense):8.3f} / {min(dense):8.3f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="local:256")
    parser.add_argument("--linear", choices=["elu", "relu"], help="linear attention with this feature map")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="E4M3 queries, keys and values, with 16-bit outputs")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--decode", action="store_true", help="one query, --kv-len keys")
    parser.add_argument("--kv-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.fp8 and arguments.linear is not None:
        parser.error("linear attention takes no FP8")
    reason = no_device()
    if reason is not None:
        print(f"No device: {reason}. Nothing was measured.")
        return
    if arguments.fp8 and torch.cuda.get_device_capability() < (8, 9):
        print("FP8 needs a device of compute capability 8.9 or newer. Nothing was measured.")
        return
    library = build_library()
    form = arguments.pattern if arguments.linear is None else f"linear:{arguments.linear}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {form}")
    if arguments.decode:
        arguments.causal = True
        measure(library, arguments, 1, arguments.kv_len)
        return
    for length in arguments.lengths:
        measure(library, arguments, length, length)


if __name__ == "__main__":
    main()
