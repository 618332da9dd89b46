"""The tensor-core kernels multiply exactly the tiles that the pattern needs, without bank conflicts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import CudaCase, run

from effc.plugins.forms.registry import parse_pattern

HEAD_SIZES = [32, 64, 80, 96, 128, 256]
PATTERNS = [
    "dense",
    "local:20",
    "local:100:3",
    "block:48",
    "block:64:1",
    "random:2",
    "global:70",
    "sinks:4",
    "local:16|sinks:5",
    "block:10|sinks:70|random:1",
]


def shapes(count: Path) -> dict[tuple[int, str], dict[str, int]]:
    lines = subprocess.run([str(count), "tiles"], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    return {(row["head_dim"], row["variant"]): row for row in rows}


def work(count: Path, case: CudaCase, multiprocessors: int = 1) -> dict[str, int]:
    sizes = (case.batch, case.q_len, case.keys, case.num_heads, case.kv_heads, case.head_dim, multiprocessors)
    command = [str(count), "work", case.pattern, str(int(case.causal)), *map(str, sizes)]
    counted: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return counted


def needed_tiles(case: CudaCase, rows: int, keys: int) -> int:
    """Tiles with a visible pair, between multiples of the tile sizes, counted in the mask that defines the pattern."""
    mask = parse_pattern(case.pattern).mask(case.q_len, case.keys, case.causal, case.marks)
    if mask.ndim == 3:
        mask = mask[0]
    past = case.keys - case.q_len
    above, below = past % rows, -(past % rows + case.q_len) % rows
    padded = np.pad(mask, ((above, below), (0, -case.keys % keys)))
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // keys, keys)
    return int(tiles.any(axis=(1, 3)).sum())


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_tile_too_many(count: Path, pattern: str, causal: bool, head_dim: int) -> None:
    shape = shapes(count)[head_dim, "usual"]
    for q_len, kv_len in ((1000, 1000), (333, 1000), (130, 777)):
        case = CudaCase(pattern, causal, 1, q_len, kv_len, num_heads=1, head_dim=head_dim)
        assert work(count, case)["tiles"] == needed_tiles(case, shape["rows"], shape["keys"])


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("q_len", [1, 140])
def test_the_kernel_does_what_was_counted(emulated: Path, count: Path, head_dim: int, q_len: int) -> None:
    case = CudaCase("local:30|sinks:2", True, 1, q_len, 300, num_heads=2, kv_num_heads=1, head_dim=head_dim)
    counters, counted = run(emulated, case).counters, work(count, case)
    shape = shapes(count)[head_dim, "few" if q_len == 1 else "usual"]
    a_tile = shape["rows"] // 16 * (shape["keys"] // 8) * (head_dim // 16) * 2
    assert counters["matrix_products"] == counted["matrix_products"] == counted["tiles"] * a_tile
    assert counters["copies"] == counted["copies"]
    assert counters["blocks"] == counted["blocks"]


@pytest.mark.parametrize("head_dim", [size for size in HEAD_SIZES if size != 80])
@pytest.mark.parametrize("q_len", [1, 140])
def test_e4m3_takes_half_of_it(emulated: Path, count: Path, head_dim: int, q_len: int) -> None:
    """As many tiles, each with half as many products, of twice as many numbers, and half the bytes."""
    case = CudaCase("local:30|sinks:2", True, 1, q_len, 300, num_heads=2, kv_num_heads=1, head_dim=head_dim)
    counters, counted = run(emulated, dataclasses.replace(case, number="e4m3")).counters, work(count, case)
    assert 2 * counters["matrix_products"] == counted["matrix_products"] > 0
    assert 2 * counters["copies"] == counted["copies"]
    assert counters["blocks"] == counted["blocks"]
    own, other = (shapes(count)[head_dim, name + ("few" if q_len == 1 else "usual")] for name in ("e4m3 ", ""))
    assert (own["rows"], own["keys"]) == (other["rows"], other["keys"])
    assert own["shared_bytes"] < 0.6 * other["shared_bytes"]


@pytest.mark.parametrize("number", ["half", "e4m3"])
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_no_bank_conflicts(emulated: Path, head_dim: int, number: str) -> None:
    case = CudaCase("local:20", q_len=80, num_heads=1, head_dim=head_dim, number=number)
    counters = run(emulated, case).counters
    assert counters["matrix_load_passes"] == counters["matrix_loads"] > 0


@pytest.mark.parametrize("marked", [[], [100], [3, 70, 71, 299]])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_marked_tokens_need_no_more_than_their_tiles(
    emulated: Path, count: Path, head_dim: int, marked: list[int]
) -> None:
    marks = np.zeros((1, 300), dtype=bool)
    marks[0, marked] = True
    case = CudaCase("local:20|global:sep", q_len=300, num_heads=1, head_dim=head_dim, marks=marks)
    shape = shapes(count)[head_dim, "usual"]
    a_tile = shape["rows"] // 16 * (shape["keys"] // 8) * (head_dim // 16) * 2
    expected = needed_tiles(case, shape["rows"], shape["keys"]) * a_tile
    assert run(emulated, case).counters["matrix_products"] == expected


def test_padding_is_skipped(emulated: Path) -> None:
    mask = np.ones((1, 256), dtype=bool)
    mask[0, 100:] = False
    case = CudaCase("dense", q_len=256, num_heads=1, head_dim=64)
    padded = CudaCase("dense", q_len=256, num_heads=1, head_dim=64, key_mask=mask)
    full, skipped = (run(emulated, c).counters["matrix_products"] for c in (case, padded))
    assert skipped * 2 == full
