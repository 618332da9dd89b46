"""The smaller of the two tilings, which decode steps take, for problems of any length: what TensorRT may choose."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import CudaCase, check, run
from test_cuda_block_lists import check as check_chosen

PATTERNS = ["dense", "local:100", "block:64:1|random:2", "global:70|dilated:4:9", "local:10|strided:9"]


def small(case: CudaCase) -> CudaCase:
    return dataclasses.replace(case, small_tiles=True)


@pytest.mark.parametrize("number", ["half", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(emulated: Path, pattern: str, causal: bool, number: str) -> None:
    check(emulated, small(CudaCase(pattern, causal, 1, 131, num_heads=4, kv_num_heads=2, head_dim=32, number=number)))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_head_size_whole_and_split(emulated: Path, multiprocessors: int, head_dim: int) -> None:
    case = CudaCase("local:150|sinks:4", True, 1, 50, 331, num_heads=3, head_dim=head_dim)
    check(emulated, small(case), f"multiprocessors={multiprocessors}")


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_padding(emulated: Path, side: str) -> None:
    mask = np.ones((2, 150), dtype=bool)
    mask[0, slice(60) if side == "left" else slice(90, None)] = False
    check(emulated, small(CudaCase("local:40|sinks:2", True, 2, 150, num_heads=1, key_mask=mask)))


@pytest.mark.parametrize("q_len, kv_len", [(150, 150), pytest.param(70, 451, marks=pytest.mark.slow)])
def test_chosen_blocks(emulated: Path, q_len: int, kv_len: int) -> None:
    check_chosen(emulated, small(CudaCase("dense", True, 2, q_len, kv_len, 4, 2)), 2)


def test_a_tile_has_sixteen_queries(emulated: Path) -> None:
    """More blocks of threads; and where few queries are all there are, the same ones."""
    case = CudaCase("local:40", True, 1, 128, num_heads=2, head_dim=64)
    few = CudaCase("local:40", True, 1, 8, 128, num_heads=2, kv_num_heads=1, head_dim=64)
    blocks = [run(emulated, one).counters["blocks"] for one in (case, small(case), few, small(few))]
    assert blocks == [2 * 2, 8 * 2, 1, 1]
