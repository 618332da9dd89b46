"""The C interface that benchmarks/cuda_device.py calls, around the emulated kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import CudaCase, reference
from emulated_build import INTERFACE
from emulated_run import NUMBERS, check_close
from linear_cases import LinearCase, expected
from numpy.typing import NDArray

HALF = 1
WORKSPACE = 16 << 20


@pytest.fixture(scope="module")
def library(emulated_directory: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(emulated_directory / INTERFACE))
    for name in ("sparse_attention", "sparse_attention_e4m3", "linear_attention"):
        getattr(found, f"effc_cuda_{name}").restype = ctypes.c_char_p
    return found


def aligned(array: NDArray[np.generic] | int) -> NDArray[np.generic]:
    """A copy, or so many bytes, where device memory would begin."""
    count = array if isinstance(array, int) else array.nbytes
    memory = np.zeros(count + 256, np.uint8)
    begin = -memory.ctypes.data % 256
    part = memory[begin : begin + count]
    if isinstance(array, int):
        return part
    part[:] = np.frombuffer(array.tobytes(), np.uint8)
    return part.view(array.dtype).reshape(array.shape)


def pointers(*arrays: NDArray[np.generic] | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if array is None else array.ctypes.data) for array in arrays]


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def test_sparse_attention(library: ctypes.CDLL) -> None:
    case = CudaCase("local:20|sinks:2", True, 2, 70, 131, 4, 2, head_dim=64)
    query, key, value = (aligned(case.inputs()[name].astype(np.float16)) for name in ("query", "key", "value"))
    output, workspace = aligned(np.zeros(query.shape, np.float16)), aligned(WORKSPACE)

    def call(heads: int, room: int) -> bytes | None:
        said: bytes | None = library.effc_cuda_sparse_attention(
            *pointers(query, key, value, output, workspace),
            *sizes(room, 2, 70, 131, heads, 2, 64),
            ctypes.c_float(case.used_scale),
            HALF,
            case.pattern.encode(),
            1,
            None,
        )
        return said

    assert call(4, WORKSPACE) is None
    wanted = reference(case)[0]
    assert np.abs(output.astype(np.float64) - wanted).max() <= 1e-3 * np.abs(wanted).max()
    assert call(3, WORKSPACE) == b"num_heads must be a multiple of kv_num_heads, and both at least 1."
    assert call(4, 16) == b"the workspace is too small."


def test_sparse_attention_in_fp8(library: ctypes.CDLL) -> None:
    case = CudaCase("local:20|sinks:2", True, 2, 70, 131, 4, 2, head_dim=64, number="e4m3")
    given = case.given(case.inputs())
    query, key, value = (aligned(given[name].astype(NUMBERS["e4m3"])) for name in ("query", "key", "value"))
    output, workspace = aligned(np.zeros(query.shape, np.float16)), aligned(WORKSPACE)

    def call(number: int) -> bytes | None:
        said: bytes | None = library.effc_cuda_sparse_attention_e4m3(
            *pointers(query, key, value, output, workspace),
            *sizes(WORKSPACE, 2, 70, 131, 4, 2, 64),
            *map(ctypes.c_float, (case.used_scale, *case.scales)),
            number,
            case.pattern.encode(),
            1,
            None,
        )
        return said

    assert call(HALF) is None
    check_close(output.astype(np.float64), reference(case)[0], "e4m3", case)
    assert call(0) == b"FP8 attention gives fp16 or bf16."


def test_linear_attention(library: ctypes.CDLL) -> None:
    case = LinearCase("relu", True, 2, 70, num_heads=4, kv_num_heads=2, past=0, present=True)
    feeds = case.inputs()
    query, key, value = (aligned(feeds[name].astype(np.float16)) for name in ("query", "key", "value"))
    output, workspace = aligned(np.zeros(query.shape, np.float16)), aligned(WORKSPACE)
    present = aligned(np.zeros(2 * 2 * 32 * 33, np.float32))
    said = library.effc_cuda_linear_attention(
        *pointers(query, key, value, output, None, present, workspace),
        *sizes(WORKSPACE, 2, 70, 70, 4, 2, 32),
        HALF,
        1,
        1,
        None,
    )
    assert said is None
    wanted, state, normaliser = expected(case, feeds)
    assert np.abs(output.astype(np.float64) - wanted).max() <= 1e-3 * np.abs(wanted).max()
    found = np.concatenate([state.ravel(), normaliser.ravel()])
    assert np.abs(present - found).max() <= 1e-3 * np.abs(found).max()
