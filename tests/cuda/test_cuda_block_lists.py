"""Keys that content-based selection chose: lists of blocks in place of the pattern's own tiles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_cases import CudaCase, run
from emulated_run import Refused, check_close
from numpy.typing import NDArray

from effc.plugins.forms.content import BlockTopK
from effc.plugins.reference import attend
from effc.plugins.reference.topk_blocks import chosen_blocks

BLOCK = 64


def chosen_by_content(case: CudaCase, form: BlockTopK) -> tuple[CudaCase, NDArray[np.float64]]:
    """The case with the lists that ``form`` chooses, and the form's own output in float64."""
    feeds = case.inputs()

    def heads(name: str, count: int) -> torch.Tensor:
        return torch.from_numpy(feeds[name]).double().unflatten(-1, (count, case.head_dim)).transpose(1, 2)

    query, key, value = heads("query", case.num_heads), heads("key", case.kv_heads), heads("value", case.kv_heads)
    mask = None if case.key_mask is None else torch.from_numpy(case.key_mask)
    visible = torch.ones(case.batch, case.keys, dtype=torch.bool) if mask is None else mask
    grouped = query.unflatten(1, (case.kv_heads, -1))
    blocks = range((case.keys - case.q_len) // form.block, -(-case.keys // form.block))
    chosen = torch.stack(
        [chosen_blocks(form, grouped, key, visible, case.causal, block) for block in blocks], dim=2
    ).numpy()
    lists = np.full((*chosen.shape[:3], max(int(chosen.sum(axis=-1).max()), 1)), -1, np.int32)
    for place in np.ndindex(chosen.shape[:3]):
        numbers = np.flatnonzero(chosen[place])
        lists[place][: len(numbers)] = numbers
    output = attend(form, query, key, value, scale=case.used_scale, causal=case.causal, key_mask=mask)
    full = dataclasses.replace(case, key_blocks=lists, block_size=form.block)
    return full, output.transpose(1, 2).flatten(2).numpy()


def check(program: Path, case: CudaCase, count: int, *options: str, block: int = BLOCK) -> dict[str, int]:
    case, wanted = chosen_by_content(case, BlockTopK(count, block))
    outcome = run(program, case, *options)
    check_close(outcome.output, wanted, case.number, case)
    return outcome.counters


@pytest.mark.parametrize("number", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("q_len, kv_len, block", [(300, 300, 64), (70, 451, 64), (200, 500, 128)])
def test_what_topk_blocks_chooses(
    emulated: Path, q_len: int, kv_len: int, block: int, causal: bool, number: str
) -> None:
    case = CudaCase("dense", causal, 2, q_len, kv_len, 2, 1, number=number)
    check(emulated, case, 2, block=block)


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("q_len, kv_len", [(1, 600), (8, 580), (8, 640), (16, 700), (40, 600), (64, 639)])
@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_few_queries(emulated: Path, multiprocessors: int, q_len: int, kv_len: int, number: str) -> None:
    """Within a block of queries heads share a tile; across its end they do not; and keys may be split."""
    case = CudaCase("dense", True, 2, q_len, kv_len, 4, 2, number=number)
    check(emulated, case, 3, f"multiprocessors={multiprocessors}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(emulated: Path, side: str) -> None:
    mask = np.ones((2, 300), dtype=bool)
    mask[0, slice(130) if side == "left" else slice(170, None)] = False
    check(emulated, CudaCase("dense", True, 2, 300, num_heads=2, key_mask=mask), 2)


@pytest.mark.parametrize("way", [["reverse"], ["eager"], ["shuffled=3"]], ids="-".join)
def test_every_way_of_running(emulated: Path, way: list[str]) -> None:
    check(emulated, CudaCase("dense", True, 1, 150, 300, 2, 1, head_dim=80), 2, *way)


def test_only_chosen_tiles_are_computed(emulated: Path, tmp_path: Path) -> None:
    lists = np.array([[[[0, 3, -1], [2, -1, -1], [1, 2, 4], [-1, -1, -1], [4, -1, -1]]]], np.int32)
    case = CudaCase("dense", q_len=320, num_heads=1, head_dim=64, key_blocks=lists, block_size=64)
    outcome = run(emulated, case)
    per_tile = 4 * (64 // 8) * (64 // 16) * 2
    assert outcome.counters["matrix_products"] == 7 * per_tile, json.dumps(outcome.counters)
    assert (outcome.output[0, 192:256] == 0).all() and np.isneginf(outcome.log_sum_exp[0, 0, 192:256]).all()


def test_the_pattern_hides_among_what_was_chosen(emulated: Path) -> None:
    """Lists that name everything leave the pattern alone."""
    everything = np.tile(np.arange(5, dtype=np.int32), (1, 2, 5, 1))
    case = CudaCase("local:40", True, q_len=300, num_heads=2)
    listed = dataclasses.replace(case, key_blocks=everything, block_size=64)
    np.testing.assert_allclose(run(emulated, listed).output, run(emulated, case).output, atol=2e-3)


def test_refusals(emulated: Path) -> None:
    lists = np.zeros((1, 1, 3, 1), np.int32)
    case = CudaCase("dense", q_len=70, num_heads=1, key_blocks=lists, block_size=48)
    with pytest.raises(Refused, match="multiple of 64 keys"):
        run(emulated, case)
    with pytest.raises(Refused, match="more queries than keys"):
        run(emulated, dataclasses.replace(case, kv_len=60, block_size=64))
