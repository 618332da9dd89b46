"""The CUDA kernels under the emulator against a float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import CudaCase, check, reference, run
from emulated_run import Refused
from generated_cases import PROFILE, draw_key_mask, patterns
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.plugins.forms.registry import parse_pattern
from effc.plugins.reference import attend

HEAD_SIZES = [32, 64, 80, 96, 128, 256]
PATTERNS = [
    "dense",
    "local:20",
    "local:5:40",
    "dilated:4:9",
    "block:16",
    "block:50:1",
    "strided:7",
    "random:1",
    "global:3",
    "sinks:4",
    "local:16|global:3|sinks:70",
    "local:10|random:1|strided:9",
]
# Threads and blocks in both orders; copies that land late and at once.
WAYS = [("forward", "late"), ("forward", "eager"), ("reverse", "late"), ("reverse", "eager"), ("shuffled=3", "late")]


def options(way: tuple[str, str]) -> list[str]:
    return [word for word in way if word not in ("forward", "late")]


def padding(batch: int, keys: int, side: str) -> np.ndarray:
    mask = np.ones((batch, keys), dtype=bool)
    for entry, length in enumerate(range(keys // 3, keys // 3 + batch)):
        mask[entry, slice(length) if side == "left" else slice(length, None)] = False
    return mask


@pytest.mark.parametrize("number", ["half", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_every_head_size(emulated: Path, head_dim: int, number: str) -> None:
    check(emulated, CudaCase("local:20|sinks:4", True, q_len=70, kv_len=131, head_dim=head_dim, number=number))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_every_way_of_running(emulated: Path, way: tuple[str, str]) -> None:
    case = CudaCase("local:40|random:1", q_len=197, num_heads=1, head_dim=64)
    outcomes = [run(emulated, case, *options(w)).output for w in (WAYS[0], way)]
    np.testing.assert_array_equal(*outcomes)
    check(emulated, case, *options(way))


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(emulated: Path, pattern: str, causal: bool) -> None:
    check(emulated, CudaCase(pattern, causal, q_len=131, num_heads=1, head_dim=32))


@pytest.mark.parametrize("head_dim", [1, 8, 20, 40, 72, 100])
@pytest.mark.parametrize("number", ["float", "half"])
def test_odd_head_sizes(emulated: Path, head_dim: int, number: str) -> None:
    check(emulated, CudaCase("local:9", q_len=41, head_dim=head_dim, number=number))


@pytest.mark.parametrize("number", ["float", "bfloat16"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_padding(emulated: Path, side: str, causal: bool, number: str) -> None:
    mask = padding(2, 150, side)
    check(emulated, CudaCase("local:20|sinks:2", causal, 2, 150, num_heads=1, key_mask=mask, number=number))


@pytest.mark.parametrize("number", ["float", "half"])
def test_rows_that_see_nothing_are_zero(emulated: Path, number: str) -> None:
    mask = np.ones((1, 100), dtype=bool)
    mask[0, :50] = False
    case = CudaCase("local:8", True, q_len=100, key_mask=mask, number=number)
    outcome = check(emulated, case)
    assert (outcome.output[0, :50] == 0).all()
    assert np.isneginf(outcome.log_sum_exp[0, :, :50]).all()
    assert np.isfinite(outcome.log_sum_exp[0, :, 50:]).all()


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("mask", [None, False, True])
def test_length_one(emulated: Path, mask: bool | None, number: str) -> None:
    key_mask = None if mask is None else np.full((2, 1), mask)
    check(emulated, CudaCase("local:4", True, 2, 1, num_heads=4, kv_num_heads=2, key_mask=key_mask, number=number))


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
@pytest.mark.parametrize("pattern", ["dense", "local:200|sinks:4", "strided:31"])
def test_decode(emulated: Path, pattern: str, multiprocessors: int, number: str) -> None:
    """One query, many keys: heads share a tile, keys are split."""
    case = CudaCase(pattern, True, 2, 1, 700, num_heads=8, kv_num_heads=2, number=number)
    check(emulated, case, f"multiprocessors={multiprocessors}")


@pytest.mark.parametrize(
    "q_len, num_heads, kv_num_heads, batch", [(3, 6, 2, 1), (16, 2, 2, 2), (17, 3, 3, 1), (30, 4, 2, 1), (65, 5, 1, 1)]
)
def test_grouped_heads(emulated: Path, q_len: int, num_heads: int, kv_num_heads: int, batch: int) -> None:
    case = CudaCase("local:30|block:16", True, batch, q_len, 140, num_heads, kv_num_heads)
    check(emulated, case)
    check(emulated, case, "multiprocessors=64", "reverse")


def test_splits_that_see_nothing(emulated: Path) -> None:
    mask = np.zeros((1, 600), dtype=bool)
    mask[0, 300:310] = True
    for key_mask in (mask, np.zeros_like(mask)):
        check(emulated, CudaCase("dense", True, 1, 1, 600, key_mask=key_mask), "multiprocessors=64")


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("bias_reach, sloped", [(None, True), (0, False), (30, True)])
@pytest.mark.parametrize("q_len", [1, 90])
def test_distance_biases(emulated: Path, bias_reach: int | None, sloped: bool, q_len: int, number: str) -> None:
    case = CudaCase("local:40", True, 1, q_len, 110, 4, 2, bias_reach=bias_reach, sloped=sloped, number=number)
    check(emulated, case)


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_marked_tokens(emulated: Path, causal: bool, share: float, number: str) -> None:
    marks = np.random.default_rng(1).random((2, 210)) < share
    check(emulated, CudaCase("local:9|global:sep", causal, 2, 210, num_heads=1, marks=marks, number=number))


@pytest.mark.parametrize("number", ["float", "half"])
def test_more_queries_than_keys(emulated: Path, number: str) -> None:
    for keys in (1, 30, 100):
        check(emulated, CudaCase("local:9|sinks:2", q_len=130, kv_len=keys, num_heads=1, number=number))


@pytest.mark.parametrize("scale", [20.0, -3.0, 1e-4, 0.0])
def test_large_and_odd_scales(emulated: Path, scale: float) -> None:
    case = CudaCase(scale=scale or 1e-30, q_len=100, head_dim=32)
    check(emulated, case)


def test_masked_keys_may_hold_anything_finite(emulated: Path) -> None:
    mask = np.ones((1, 64), dtype=bool)
    mask[0, 40:] = False
    case = CudaCase(q_len=64, key_mask=mask)
    feeds = case.inputs()
    feeds["key"][0, 40:] = 6e4
    feeds["value"][0, 40:] = -6e4
    np.testing.assert_allclose(run(emulated, case, feeds=feeds).output, reference(case)[0], atol=3e-3)


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("q_len", [1, 64])
def test_not_a_number_is_not_hidden(emulated: Path, q_len: int, number: str) -> None:
    case = CudaCase(q_len=q_len, kv_len=64, number=number)
    feeds = case.inputs()
    feeds["query"][0, 0, 0] = np.nan
    for processors in (1, 16):
        output = run(emulated, case, f"multiprocessors={processors}", feeds=feeds).output
        assert np.isnan(output[0, 0, :32]).all(), "the row and head that hold it"
        assert np.isfinite(output[0, 0, 32:]).all() and np.isfinite(output[0, 1:]).all(), "and no other"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"head_dim": 600}, "head_dim must be 1 to 512"),
        ({"pattern": "block:8", "q_len": 20, "kv_len": 10}, "more queries than keys"),
    ],
)
def test_refusals(emulated: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        run(emulated, dataclasses.replace(CudaCase(num_heads=1), **change))


def test_no_rows(emulated: Path) -> None:
    assert run(emulated, CudaCase(batch=0)).output.size == 0


def test_agrees_with_the_reference_of_the_package(emulated: Path) -> None:
    """The reference of these tests takes biases; here it is held to the one that all lowerings share."""
    case = CudaCase("local:20|global:2", True, 2, 90, num_heads=4, kv_num_heads=2)
    feeds = case.inputs()

    def heads(name: str, count: int) -> torch.Tensor:
        return torch.from_numpy(feeds[name]).double().unflatten(-1, (count, case.head_dim)).transpose(1, 2)

    expected = attend(
        parse_pattern(case.pattern),
        heads("query", 4),
        heads("key", 2),
        heads("value", 2),
        scale=case.used_scale,
        causal=True,
    )
    flat = expected.transpose(1, 2).flatten(2).numpy()
    np.testing.assert_allclose(flat, reference(case)[0], atol=1e-12)
    check(emulated, case)


@st.composite
def cases(draw: st.DrawFn) -> CudaCase:
    kv_num_heads = draw(st.integers(1, 2))
    batch, keys = draw(st.integers(1, 2)), draw(st.integers(1, 200))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    mask = draw_key_mask(draw, batch, keys, rng)
    marks = None
    if draw(st.booleans()):
        marks = rng.random((batch, keys)) < draw(st.sampled_from([0.0, 0.01, 0.3]))
    return CudaCase(
        pattern=draw(patterns(widest=100, widest_side=60)),
        causal=draw(st.booleans()),
        batch=batch,
        q_len=draw(st.one_of(st.just(1), st.integers(1, keys))),
        kv_len=keys,
        num_heads=kv_num_heads * draw(st.integers(1, 3)),
        kv_num_heads=kv_num_heads,
        head_dim=draw(st.sampled_from([32, 32, 64, 24, 80, 96, 33])),
        key_mask=mask,
        marks=marks,
        bias_reach=draw(st.sampled_from([None, None, 0, 3, 200])),
        sloped=draw(st.booleans()),
        seed=seed,
        number=draw(st.sampled_from(["half", "bfloat16", "float"])),
    )


ways = st.tuples(st.sampled_from([*WAYS, ("shuffled=9", "eager")]), st.sampled_from([1, 3, 20, 132]))


@settings(max_examples=30, derandomize=True, **PROFILE)
@given(case=cases(), way=ways)
def test_anything(emulated: Path, case: CudaCase, way: tuple[tuple[str, str], int]) -> None:
    check(emulated, case, *options(way[0]), f"multiprocessors={way[1]}")


@pytest.mark.slow
@settings(max_examples=600, **PROFILE)
@given(case=cases(), way=ways)
def test_much_more(emulated: Path, case: CudaCase, way: tuple[tuple[str, str], int]) -> None:
    check(emulated, case, *options(way[0]), f"multiprocessors={way[1]}")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("number", ["half", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_whole_matrix(emulated: Path, head_dim: int, number: str, way: tuple[str, str]) -> None:
    shapes = [(1, 1), (1, 150), (70, 131), (131, 131)]
    for pattern, causal, (q_len, kv_len) in itertools.product(PATTERNS, (False, True), shapes):
        mask = np.random.default_rng(kv_len).random((2, kv_len)) < 0.8
        case = CudaCase(pattern, causal, 2, q_len, kv_len, 2, 1, head_dim, key_mask=mask, number=number)
        check(emulated, case, *options(way), "multiprocessors=16")
