"""FP8 attention under the emulator: E4M3 queries, keys and values, weights rounded to E4M3, 16-bit outputs.

The float64 reference computes with the rounded inputs, so what is measured is the rounding of weights: each is off by
up to 1/16, at random. Row sums and log-sum-exps take weights as they were before.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_cases import CudaCase, check, reference, run
from emulated_run import Refused
from generated_cases import PROFILE, draw_key_mask, patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import LinearCase
from linear_cases import run as run_linear
from test_cuda_sparse_attention import PATTERNS, WAYS, options, padding

HEAD_SIZES = [16, 32, 48, 64, 80, 96, 128, 192, 256]
# Of all numbers of a large output: a weight is off by 1/16 at most, and by 2.6 % in the mean of squares.
MEAN_ERROR = 0.026


def case(pattern: str = "local:20|sinks:4", causal: bool = False, *sizes: Any, **changes: Any) -> CudaCase:
    return CudaCase(pattern, causal, *sizes, number="e4m3", **changes)


@pytest.mark.parametrize("output", ["half", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_every_head_size(emulated: Path, head_dim: int, output: str) -> None:
    check(emulated, case(causal=True, q_len=70, kv_len=131, head_dim=head_dim, output=output))


@pytest.mark.parametrize("pattern", ["dense", "local:40"])
def test_mean_error(emulated: Path, pattern: str) -> None:
    sample = case(pattern, q_len=300, head_dim=64)
    difference = run(emulated, sample).output - (expected := reference(sample)[0])
    assert 0.001 < np.sqrt(np.square(difference).mean() / np.square(expected).mean()) < MEAN_ERROR


@pytest.mark.parametrize("head_dim", [32, 64])
def test_weights_are_what_is_rounded(emulated: Path, head_dim: int) -> None:
    """Where one tile holds all keys, the largest score is known, and the result is that of rounded weights."""
    sample = case("dense", q_len=70, kv_len=40, num_heads=1, head_dim=head_dim)
    query, key, value = (sample.inputs()[name][0].astype(np.float64) for name in ("query", "key", "value"))
    scores = query @ key.T * sample.used_scale
    weights = 256 * np.exp(scores - scores.max(axis=1, keepdims=True))
    rounded = weights.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = rounded @ value / weights.sum(axis=1, keepdims=True)
    found = run(emulated, sample).output[0]
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_small_weights_count(emulated: Path) -> None:
    """Weights of 2^-10 of the largest would be no E4M3 numbers if nothing were multiplied with them."""
    keys = 512
    sample = case("dense", q_len=1, kv_len=keys, num_heads=1, head_dim=32, scale=1.0, scales=(1.0, 1.0, 1.0))
    feeds = {name: np.zeros_like(tensor) for name, tensor in sample.inputs().items()}
    feeds["query"][0, 0, :2] = 1
    feeds["key"][0, 0, :2] = 6.5, 0.4375  # of which 2^-10 is 6.93 away
    feeds["value"][0, 1:] = 1
    small = (keys - 1) * np.exp(-6.9375)
    expected = small / (1 + small)
    np.testing.assert_allclose(run(emulated, sample, feeds=feeds).output, expected, rtol=0.05)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_every_way_of_running(emulated: Path, way: tuple[str, str]) -> None:
    sample = case("local:40|random:1", q_len=197, num_heads=1, head_dim=64)
    outcomes = [run(emulated, sample, *options(w)).output for w in (WAYS[0], way)]
    np.testing.assert_array_equal(*outcomes)
    check(emulated, sample, *options(way))


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(emulated: Path, pattern: str, causal: bool) -> None:
    check(emulated, case(pattern, causal, q_len=131, num_heads=1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_padding(emulated: Path, side: str, causal: bool) -> None:
    check(emulated, case("local:20|sinks:2", causal, 2, 150, num_heads=1, key_mask=padding(2, 150, side)))


def test_rows_that_see_nothing_are_zero(emulated: Path) -> None:
    mask = np.ones((1, 100), dtype=bool)
    mask[0, :50] = False
    outcome = check(emulated, case("local:8", True, q_len=100, key_mask=mask))
    assert (outcome.output[0, :50] == 0).all()
    assert np.isneginf(outcome.log_sum_exp[0, :, :50]).all()


@pytest.mark.parametrize("mask", [None, False, True])
def test_length_one(emulated: Path, mask: bool | None) -> None:
    """One key alone has the weight 1, which is not rounded."""
    key_mask = None if mask is None else np.full((2, 1), mask)
    sample = case("local:4", True, 2, 1, num_heads=4, kv_num_heads=2, key_mask=key_mask)
    np.testing.assert_allclose(check(emulated, sample).output, reference(sample)[0], rtol=5e-4)


@pytest.mark.parametrize("output", ["half", "bfloat16"])
@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
@pytest.mark.parametrize("pattern", ["dense", "local:200|sinks:4"])
def test_decode(emulated: Path, pattern: str, multiprocessors: int, output: str) -> None:
    sample = case(pattern, True, 2, 1, 700, num_heads=8, kv_num_heads=2, output=output)
    check(emulated, sample, f"multiprocessors={multiprocessors}")


@pytest.mark.parametrize("q_len, num_heads, kv_num_heads, batch", [(3, 6, 2, 1), (17, 3, 3, 1), (65, 5, 1, 1)])
def test_grouped_heads(emulated: Path, q_len: int, num_heads: int, kv_num_heads: int, batch: int) -> None:
    sample = case("local:30|block:16", True, batch, q_len, 140, num_heads, kv_num_heads)
    check(emulated, sample)
    check(emulated, sample, "multiprocessors=64", "reverse")


def test_splits_that_see_nothing(emulated: Path) -> None:
    mask = np.zeros((1, 600), dtype=bool)
    mask[0, 300:310] = True
    for key_mask in (mask, np.zeros_like(mask)):
        check(emulated, case("dense", True, 1, 1, 600, key_mask=key_mask), "multiprocessors=64")


@pytest.mark.parametrize("bias_reach, sloped", [(None, True), (30, True)])
@pytest.mark.parametrize("q_len", [1, 90])
def test_distance_biases(emulated: Path, bias_reach: int | None, sloped: bool, q_len: int) -> None:
    check(emulated, case("local:40", True, 1, q_len, 110, 4, 2, bias_reach=bias_reach, sloped=sloped))


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_marked_tokens(emulated: Path, share: float) -> None:
    marks = np.random.default_rng(1).random((2, 210)) < share
    check(emulated, case("local:9|global:sep", False, 2, 210, num_heads=1, marks=marks))


def test_lists_of_blocks(emulated: Path) -> None:
    blocks = np.array([[[[0, 2], [1, 2], [0, -1], [2, 3]]]], np.int32)
    listed = case("dense", q_len=256, num_heads=1, head_dim=64, key_blocks=blocks, block_size=64)
    seen = np.zeros((256, 256), dtype=bool)
    for place, numbers in enumerate(blocks[0, 0]):
        for number in numbers[numbers >= 0]:
            seen[64 * place : 64 * place + 64, 64 * number : 64 * number + 64] = True
    query, key, value = (listed.inputs()[name][0].astype(np.float64) for name in ("query", "key", "value"))
    scores = np.where(seen, query @ key.T * listed.used_scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights @ value / weights.sum(axis=1, keepdims=True)
    assert np.abs(run(emulated, listed).output[0] - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [20.0, -3.0, 1e-30])
def test_large_and_odd_scales(emulated: Path, scale: float) -> None:
    check(emulated, case(scale=scale, q_len=100))


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1e-3, 4.0, 300.0), (0.02, 1e-6, 1e-3)])
def test_scales_of_the_tensors(emulated: Path, scales: tuple[float, float, float]) -> None:
    check(emulated, case(q_len=100, scales=scales))


def test_masked_keys_may_hold_anything_finite(emulated: Path) -> None:
    mask = np.ones((1, 64), dtype=bool)
    mask[0, 40:] = False
    sample = case(q_len=64, key_mask=mask)
    feeds = sample.inputs()
    feeds["key"][0, 40:] = 448 * sample.scales[1]
    feeds["value"][0, 40:] = -448 * sample.scales[2]
    np.testing.assert_array_equal(run(emulated, sample, feeds=feeds).output, run(emulated, sample).output)


@pytest.mark.parametrize("q_len", [1, 64])
def test_not_a_number_is_not_hidden(emulated: Path, q_len: int) -> None:
    sample = case(q_len=q_len, kv_len=64)
    feeds = sample.inputs()
    feeds["query"][0, 0, 0] = np.nan
    for processors in (1, 16):
        output = run(emulated, sample, f"multiprocessors={processors}", feeds=feeds).output
        assert np.isnan(output[0, 0, :32]).all(), "the row and head that hold it"
        assert np.isfinite(output[0, 0, 32:]).all() and np.isfinite(output[0, 1:]).all(), "and no other"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"head_dim": 24}, "multiple of 16 numbers"),
        ({"head_dim": 272}, "up to 256"),
        ({"scales": (0.0, 1.0, 1.0)}, "must be positive"),
        ({"scales": (1.0, 1.0, float("nan"))}, "must be positive"),
        ({"output": "float"}, "gives fp16 or bf16"),
    ],
)
def test_refusals(emulated: Path, change: dict[str, Any], says: str) -> None:
    sample = dataclasses.replace(case(num_heads=1), **change)
    feeds = CudaCase(num_heads=1, head_dim=sample.head_dim).inputs()
    with pytest.raises(Refused, match=says), np.errstate(divide="ignore"):
        run(emulated, sample, feeds=feeds)


def test_devices_without_such_products_are_refused(emulated: Path) -> None:
    with pytest.raises(Refused, match=r"compute capability 8\.9 or newer"):
        run(emulated, case(), "capability=86")


def test_linear_attention_is_refused(emulated_linear: Path) -> None:
    with pytest.raises(Refused, match="linear attention takes fp32, fp16 and bf16"):
        run_linear(emulated_linear, LinearCase("elu", number="e4m3"))


@st.composite
def cases(draw: st.DrawFn) -> CudaCase:
    kv_num_heads = draw(st.integers(1, 2))
    batch, keys = draw(st.integers(1, 2)), draw(st.integers(1, 200))
    seed = draw(st.integers(0, 1000))
    return case(
        draw(patterns(widest=100, widest_side=60)),
        draw(st.booleans()),
        batch,
        draw(st.one_of(st.just(1), st.integers(1, keys))),
        keys,
        kv_num_heads * draw(st.integers(1, 3)),
        kv_num_heads,
        draw(st.sampled_from([32, 32, 64, 16, 80, 96])),
        key_mask=draw_key_mask(draw, batch, keys, np.random.default_rng(seed)),
        bias_reach=draw(st.sampled_from([None, None, 3])),
        sloped=draw(st.booleans()),
        seed=seed,
        output=draw(st.sampled_from(["half", "bfloat16"])),
    )


ways = st.tuples(st.sampled_from([*WAYS, ("shuffled=9", "eager")]), st.sampled_from([1, 3, 20, 132]))


@settings(max_examples=15, derandomize=True, **PROFILE)
@given(sample=cases(), way=ways)
def test_anything(emulated: Path, sample: CudaCase, way: tuple[tuple[str, str], int]) -> None:
    check(emulated, sample, *options(way[0]), f"multiprocessors={way[1]}")


@pytest.mark.slow
@settings(max_examples=400, **PROFILE)
@given(sample=cases(), way=ways)
def test_much_more(emulated: Path, sample: CudaCase, way: tuple[tuple[str, str], int]) -> None:
    check(emulated, sample, *options(way[0]), f"multiprocessors={way[1]}")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_whole_matrix(emulated: Path, head_dim: int, way: tuple[str, str]) -> None:
    output = "bfloat16" if "eager" in way else "half"
    shapes = [(1, 1), (1, 150), (70, 131), (131, 131)]
    for pattern, causal, (q_len, kv_len) in itertools.product(PATTERNS, (False, True), shapes):
        mask = np.random.default_rng(kv_len).random((2, kv_len)) < 0.8
        sample = case(pattern, causal, 2, q_len, kv_len, 2, 1, head_dim, key_mask=mask, output=output)
        check(emulated, sample, *options(way), "multiprocessors=16")
