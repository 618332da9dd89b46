"""What nvcc makes of the kernels, on every architecture: nothing spills, and everything fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cuda_build

REPOSITORY = Path(__file__).resolve().parents[2]
# Of the smallest device of an architecture, in bytes per block; what a block may ask for.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
# Blocks per multiprocessor that a kernel must at least reach, by head size, on devices with 100 KiB and with more.
FEWEST_BLOCKS = {32: (3, 3), 64: (2, 2), 80: (2, 3), 96: (2, 3), 128: (2, 3), 256: (1, 1)}
MOST_REGISTERS = {
    (90, 64): 168,
    (120, 80): 168,
    (120, 96): 208,
    **{(architecture, 256): 255 for architecture in SHARED_BYTES},
}
# Of E4M3 kernels for long inputs, by head size: registers, and blocks per multiprocessor.
MOST_E4M3_REGISTERS = {32: (128, 3), 64: (128, 2), 96: (160, 2), 128: (188, 2), 256: (232, 1)}


def needs_tools() -> None:
    missing = cuda_build.missing_tools()
    if missing is not None:
        pytest.skip(missing)


def check_fits(kernel: cuda_build.Kernel) -> None:
    assert kernel.spill_bytes == kernel.local_memory == 0, kernel
    if kernel.tile is not None:
        assert cuda_build.tile_shapes()[kernel.tile]["shared_bytes"] <= SHARED_BYTES[kernel.architecture], kernel


def check_tile_kernel(kernel: cuda_build.Kernel, tensor_core: int, fewest_blocks: int) -> None:
    """``tensor_core`` instructions of one tile and no more; so many blocks on a multiprocessor."""
    check_fits(kernel)
    assert kernel.stack_bytes == 0, kernel
    assert kernel.tensor_core == tensor_core, kernel
    assert blocks_of(kernel) >= fewest_blocks, kernel


def blocks_of(kernel: cuda_build.Kernel) -> int:
    assert kernel.tile is not None
    tile = cuda_build.tile_shapes()[kernel.tile]
    return cuda_build.blocks_per_multiprocessor(
        kernel.architecture, kernel.registers, tile["threads"], tile["shared_bytes"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", cuda_build.HEAD_SIZES)
@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_tensor_core_kernels(architecture: int, head_dim: int) -> None:
    needs_tools()
    kernels = cuda_build.kernels_of(f"attention_{head_dim}.cu", architecture)
    assert {(kernel.number, kernel.name) for kernel in kernels} == {
        (number, f"attend_tile {head_dim} {variant}") for number in ("Half", "BFloat16") for variant in ("usual", "few")
    }
    usual = 1 if (architecture, head_dim) == (120, 96) else FEWEST_BLOCKS[head_dim][architecture in (80, 90)]
    for kernel in kernels:
        assert kernel.shape is not None
        _, warps, row_blocks, keys, _, _ = kernel.shape
        assert kernel.tile == (head_dim, "few" if warps == 1 else "usual")
        # Both matrix products, unrolled once.
        check_tile_kernel(kernel, row_blocks * (keys // 8) * (head_dim // 16) * 2, usual if warps > 1 else 1)
        if warps > 1:
            assert kernel.registers <= MOST_REGISTERS.get((architecture, head_dim), 128), kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda_build.E4M3_ARCHITECTURES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_e4m3_kernels(architecture: int, size: str) -> None:
    needs_tools()
    kernels = cuda_build.kernels_of(f"attention_e4m3_{size}.cu", architecture)
    head_sizes = [head_dim for head_dim, source in cuda_build.E4M3_SOURCES.items() if source == size]
    assert {(kernel.number, kernel.tile) for kernel in kernels} == {
        ("E4M3", (head_dim, f"e4m3 {variant}")) for head_dim in head_sizes for variant in ("usual", "few")
    }
    for kernel in kernels:
        assert kernel.shape is not None
        head_dim, warps, row_blocks, keys, _, _ = kernel.shape
        products = row_blocks * (keys // 8) * (head_dim // 32) * 2
        # Tensor cores of sm_90 know E4M3 only in instructions of another kind: nvcc makes two fp16 products of one.
        products *= 2 if architecture == 90 else 1
        alone = warps == 1 or (architecture, head_dim) == (120, 128)
        check_tile_kernel(kernel, products, 1 if alone else MOST_E4M3_REGISTERS[head_dim][1])
        if warps > 1:
            limit = {(90, 64): 168, (90, 256): 255}.get((architecture, head_dim), MOST_E4M3_REGISTERS[head_dim][0])
            assert kernel.registers <= limit, kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", set(cuda_build.ARCHITECTURES) - set(cuda_build.E4M3_ARCHITECTURES))
def test_architectures_without_e4m3_have_empty_kernels(architecture: int) -> None:
    needs_tools()
    for kernel in cuda_build.kernels_of("attention_e4m3_small.cu", architecture):
        assert kernel.tensor_core == 0 and kernel.instructions < 64, kernel


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", cuda_build.HEAD_SIZES)
@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_linear_kernels(architecture: int, head_dim: int) -> None:
    needs_tools()
    found = cuda_build.kernels_of(f"linear_{cuda_build.LINEAR_SOURCES[head_dim]}.cu", architecture)
    kernels = [kernel for kernel in found if kernel.tile == (head_dim, "linear")]
    assert {kernel.number for kernel in kernels} == {"Half", "BFloat16"}
    keys = cuda_build.tile_shapes()[head_dim, "linear"]["keys"]
    for kernel in kernels:
        # The products with keys, and those with values, which states share.
        check_tile_kernel(kernel, (keys // 8) * (head_dim // 16) * 2, {32: 3, 256: 1}.get(head_dim, 2))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_other_kernels(architecture: int) -> None:
    needs_tools()
    kernels = cuda_build.kernels(architecture, ())
    assert {kernel.name for kernel in kernels} == {
        "attend_rows",
        "merge_splits",
        "sum_keys",
        "add_segments",
        "sum_keys_plainly",
        "attend_linear_rows",
        "step_linear",
    }
    assert {kernel.number for kernel in kernels} == {"float", "Half", "BFloat16"}
    for kernel in kernels:
        check_fits(kernel)
        if kernel.tile is not None:
            assert kernel.tensor_core == 4 * (8 + 1), "a tile's products, and the sums of its features"
            assert blocks_of(kernel) >= 3, kernel


@pytest.mark.slow
def test_counts_and_floors_need_no_nvcc() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "cuda_static.py"), "--work"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot be done faster than" in printed
    assert "nothing here was measured" in printed


def test_device_benchmark_measures_nothing_without_a_device() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "cuda_device.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("No device: ")
    assert " ms" not in printed


@pytest.mark.slow
def test_library_for_callers_without_cpp(tmp_path: Path) -> None:
    """What benchmarks/cuda_device.py loads builds, and refuses before it touches a device."""
    import ctypes

    from native_build import cmake_build

    needs_tools()
    folder = cmake_build("cuda-c", "-DEFFC_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86", target="effc_cuda_c")
    library = ctypes.CDLL(str(folder / "libeffc_cuda_c.so"))
    attend = library.effc_cuda_sparse_attention
    attend.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64(size) for size in (0, 1, 8, 8, 4, 3, 64)]
    pattern = (ctypes.c_float(1.0), ctypes.c_int(1), b"local:4", ctypes.c_int(0), ctypes.c_void_p())
    message = attend(*[ctypes.c_void_p()] * 5, *sizes, *pattern)
    assert b"multiple of kv_num_heads" in message
