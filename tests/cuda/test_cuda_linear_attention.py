"""The CUDA kernels of linear attention under the emulator against the definition in float64."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_run import Refused, Stopped
from generated_cases import PROFILE, draw_key_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import LinearCase, check, expected, run
from test_cuda_sparse_attention import HEAD_SIZES, WAYS, options, padding

NUMBERS = ["float", "half", "bfloat16"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("head_dim", [*HEAD_SIZES, 1, 20, 72])
def test_every_head_size(emulated_linear: Path, head_dim: int, number: str) -> None:
    check(emulated_linear, LinearCase("elu", True, q_len=67, kv_len=300, head_dim=head_dim, number=number))
    check(emulated_linear, LinearCase("relu", False, q_len=35, kv_len=70, head_dim=head_dim, number=number))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_every_way_of_running(emulated_linear: Path, way: tuple[str, str]) -> None:
    case = LinearCase("elu", True, q_len=197, kv_len=420, head_dim=64, past=5, present=True)
    outcomes = [run(emulated_linear, case, *options(w)) for w in (WAYS[0], way)]
    np.testing.assert_array_equal(*(outcome.output for outcome in outcomes))
    np.testing.assert_array_equal(*(outcome.state for outcome in outcomes))
    check(emulated_linear, case, *options(way))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (64, 64), (65, 65), (256, 257), (3, 700)])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_lengths(emulated_linear: Path, causal: bool, q_len: int, kv_len: int, number: str) -> None:
    check(emulated_linear, LinearCase("elu", causal, q_len=q_len, kv_len=kv_len, number=number))


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("kv_len", [0, 20])
def test_more_queries_than_keys(emulated_linear: Path, kv_len: int, number: str) -> None:
    check(emulated_linear, LinearCase(q_len=70, kv_len=kv_len, number=number))


def test_many_segments(emulated_linear: Path) -> None:
    """Segments that are not causal grow once there are 32 of them."""
    check(emulated_linear, LinearCase(q_len=10, kv_len=9001))
    check(emulated_linear, LinearCase("relu", True, q_len=10, kv_len=3001))


@pytest.mark.parametrize("side, number", [("left", "float"), ("right", "bfloat16")])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_padding(emulated_linear: Path, side: str, causal: bool, number: str) -> None:
    check(emulated_linear, LinearCase("elu", causal, 2, 330, key_mask=padding(2, 330, side), number=number))


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_rows_that_see_nothing_are_zero(emulated_linear: Path, causal: bool, number: str) -> None:
    mask = np.zeros((2, 300), dtype=bool)
    mask[1, 280:] = True
    outcome = check(emulated_linear, LinearCase("elu", causal, 2, 300, key_mask=mask, number=number))
    assert (outcome.output[0] == 0).all()
    assert (outcome.output[1, :280] == 0).all() or not causal
    assert (outcome.output[1, 280:] != 0).any()


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("num_heads, kv_num_heads, batch", [(6, 2, 1), (3, 1, 2)])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_grouped_heads(
    emulated_linear: Path, causal: bool, num_heads: int, kv_num_heads: int, batch: int, number: str
) -> None:
    case = LinearCase("elu", causal, batch, 70, 270, num_heads, kv_num_heads, number=number)
    check(emulated_linear, case)


@pytest.mark.parametrize("new, number", [(1, "float"), (2, "bfloat16"), (64, "half"), (70, "float"), (300, "half")])
@pytest.mark.parametrize("past", [None, 0, 100])
def test_going_on_from_a_state(emulated_linear: Path, new: int, past: int | None, number: str) -> None:
    """Output, state and normaliser are those of one call over the joined tokens."""
    check(emulated_linear, LinearCase("elu", True, 2, new, past=past, present=True, head_dim=64, number=number))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("num_heads, kv_num_heads, head_dim", [(1, 1, 128), (9, 3, 64), (20, 2, 40)])
@pytest.mark.parametrize("seen", [None, False])
def test_decode_step(
    emulated_linear: Path, seen: bool | None, num_heads: int, kv_num_heads: int, head_dim: int, number: str
) -> None:
    mask = None if seen is None else np.array([[seen], [True]])
    sizes = {"num_heads": num_heads, "kv_num_heads": kv_num_heads, "head_dim": head_dim}
    case = LinearCase("elu", True, 2, 1, past=50, present=True, key_mask=mask, number=number, **sizes)
    assert check(emulated_linear, case).counters["matrix_products"] == 0


def test_steps_add_up_to_the_whole(emulated_linear: Path) -> None:
    """Token by token, each from the state that the one before left."""
    whole = LinearCase("elu", True, q_len=5, num_heads=2, kv_num_heads=1, number="float", present=True)
    feeds = whole.inputs()
    wanted = expected(whole, feeds)[0]
    for place in range(5):
        step = dataclasses.replace(whole, q_len=1, past=place)
        own = {name: feeds[name][:, place : place + 1] for name in ("query", "key", "value")}
        own |= {f"past_{name}": feeds[name][:, :place] for name in ("key", "value")}
        np.testing.assert_allclose(run(emulated_linear, step, feeds=own).output[:, 0], wanted[:, place], atol=1e-5)


@pytest.mark.parametrize("number, factor", [("half", 300.0), ("half", 0.01), ("bfloat16", 1e6)])
def test_large_and_small_numbers(emulated_linear: Path, number: str, factor: float) -> None:
    """Products and sums go far beyond what fp16 holds; outputs do not."""
    case = LinearCase("relu", True, q_len=300, head_dim=64, number=number)
    feeds = case.inputs()
    feeds["query"], feeds["key"] = feeds["query"] * factor, feeds["key"] * factor
    found, wanted = run(emulated_linear, case, feeds=feeds).output, expected(case, feeds)[0]
    assert np.abs(found - wanted).max() <= (1e-3 if number == "half" else 1e-2) * np.abs(wanted).max()


def test_small_features_of_a_query_are_not_lost(emulated_linear: Path) -> None:
    """elu(x) + 1 of numbers below -12 is less than fp16 tells from zero."""
    case = LinearCase("elu", False, q_len=64, head_dim=64)
    feeds = case.inputs()
    feeds["query"] = feeds["query"] - 20
    found, wanted = run(emulated_linear, case, feeds=feeds).output, expected(case, feeds)[0]
    assert np.abs(found - wanted).max() <= 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("number", ["float", "half"])
@pytest.mark.parametrize("q_len", [1, 64])
def test_not_a_number_is_not_hidden(emulated_linear: Path, q_len: int, number: str) -> None:
    case = LinearCase("elu", True, q_len=q_len, kv_len=64, num_heads=2, number=number)
    feeds = case.inputs()
    feeds["query"][0, 0, 0] = np.nan
    output = run(emulated_linear, case, feeds=feeds).output
    assert np.isnan(output[0, 0, :32]).all(), "the row and head that hold it"
    assert np.isfinite(output[0, 0, 32:]).all() and np.isfinite(output[0, 1:]).all(), "and no other"
    feeds = case.inputs()
    feeds["key"][0, 0, 0] = np.nan
    assert np.isnan(run(emulated_linear, case, feeds=feeds).output[0, :, :32]).all()


def test_masked_keys_may_hold_anything_finite(emulated_linear: Path) -> None:
    mask = np.ones((1, 64), dtype=bool)
    mask[0, 40:] = False
    case = LinearCase(q_len=64, key_mask=mask)
    feeds = case.inputs()
    feeds["key"][0, 40:], feeds["value"][0, 40:] = 6e4, -6e4
    np.testing.assert_allclose(run(emulated_linear, case, feeds=feeds).output, expected(case, feeds)[0], atol=3e-3)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"head_dim": 600}, "head_dim must be 1 to 512"),
        ({"causal": True, "q_len": 20, "kv_len": 10}, "more queries than keys"),
        ({"present": True}, "only causal attention has a state"),
        ({"num_heads": 3, "kv_num_heads": 2}, "multiple of kv_num_heads"),
    ],
)
def test_refusals(emulated_linear: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        run(emulated_linear, dataclasses.replace(LinearCase(), **change))


def test_no_rows(emulated_linear: Path) -> None:
    assert run(emulated_linear, LinearCase(batch=0)).output.size == 0
    outcome = run(emulated_linear, LinearCase("elu", True, q_len=0, past=9, present=True))
    assert outcome.state is not None and (outcome.state != 0).any(), "the state goes on without queries"


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("sizes", [(1, 131, 300, 1, 1, 128), (2, 70, 700, 4, 2, 64), (1, 1, 9, 1, 1, 80)])
def test_exact_work(emulated_linear: Path, count: Path, causal: bool, sizes: tuple[int, ...]) -> None:
    """Tensor cores multiply what the schedule says, and nothing collides in shared memory."""
    words = ["linear", str(int(causal)), *map(str, sizes)]
    counted = json.loads(subprocess.run([count, "work", *words], capture_output=True, text=True, check=True).stdout)
    batch, q_len, kv_len, heads, kv_heads, head_dim = sizes
    case = LinearCase("elu", causal, batch, q_len, kv_len, heads, kv_heads, head_dim)
    counters = check(emulated_linear, case).counters
    assert counters["matrix_products"] == counted["matrix_products"]
    assert counters["matrix_load_passes"] == counters["matrix_loads"]


def test_forgotten_synchronisation_shows(emulated_linear: Path) -> None:
    case = LinearCase("elu", True, q_len=200, kv_len=400, head_dim=64)
    right = run(emulated_linear, case).output
    assert not np.array_equal(run(emulated_linear, case, "forget_barriers").output, right)
    with pytest.raises(Stopped, match="before its copies were waited for"):
        run(emulated_linear, case, "forget_waits")
    with pytest.raises(Stopped, match="wrote behind its shared memory"):
        run(emulated_linear, case, "missing_shared_bytes=32")


@st.composite
def cases(draw: st.DrawFn) -> LinearCase:
    kv_num_heads, causal = draw(st.integers(1, 2)), draw(st.booleans())
    batch, keys, seed = draw(st.integers(1, 2)), draw(st.integers(1, 600)), draw(st.integers(0, 1000))
    return LinearCase(
        map=draw(st.sampled_from(["elu", "relu"])),
        causal=causal,
        batch=batch,
        q_len=draw(st.one_of(st.just(1), st.integers(1, keys))),
        kv_len=keys,
        num_heads=kv_num_heads * draw(st.integers(1, 3)),
        kv_num_heads=kv_num_heads,
        head_dim=draw(st.sampled_from([32, 64, 24, 80, 96, 33])),
        key_mask=draw_key_mask(draw, batch, keys, np.random.default_rng(seed)),
        past=draw(st.sampled_from([None, 0, 40])) if causal else None,
        present=causal and draw(st.booleans()),
        seed=seed,
        number=draw(st.sampled_from(["half", "bfloat16", "half", "float"])),
    )


ways = st.sampled_from([*WAYS, ("shuffled=9", "eager")])


@settings(max_examples=15, derandomize=True, **PROFILE)
@given(case=cases(), way=ways)
def test_anything(emulated_linear: Path, case: LinearCase, way: tuple[str, str]) -> None:
    check(emulated_linear, case, *options(way))


@pytest.mark.slow
@settings(max_examples=300, **PROFILE)
@given(case=cases(), way=ways)
def test_much_more(emulated_linear: Path, case: LinearCase, way: tuple[str, str]) -> None:
    check(emulated_linear, case, *options(way))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("number", ["half", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_whole_matrix(emulated_linear: Path, head_dim: int, number: str, way: tuple[str, str]) -> None:
    shapes = [(1, 1), (1, 300), (70, 331), (331, 331)]
    for feature_map, causal, (q_len, kv_len) in itertools.product(("elu", "relu"), (False, True), shapes):
        mask = np.random.default_rng(kv_len).random((2, kv_len)) < 0.8
        case = LinearCase(feature_map, causal, 2, q_len, kv_len, 2, 1, head_dim, mask, number=number)
        check(emulated_linear, case, *options(way))
