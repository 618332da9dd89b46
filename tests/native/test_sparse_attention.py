"""effc::SparseAttention in ONNX Runtime against a float64 reference, on every instruction set this machine has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from generated_cases import PROFILE, draw_key_mask, patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import Case, check, model, reference, run, session

WINDOW = 32
PATTERNS = [
    "local:32",
    "local:1",
    "local:5:9",
    "dense",
    "sinks:4",
    "global:3",
    "block:16",
    "block:16:1",
    "strided:7",
    "dilated:9:4",
    "local:16|sinks:4",
    "local:16|global:8|block:32",
    "dilated:5:16|strided:100|sinks:2",
    "dilated:5:16|local:9|global:2",
    "random:2:7",
    "random:40:123456789012345678901",
    "block:64:1|random:1:3|global:64",
    "block:16:1|dilated:16:4|global:1",
    "strided:7|global:3",
    "global:#101+cls",
]


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def available_isas() -> list[str]:
    flags = cpu_flags()
    isas = ["portable"]
    if {"avx2", "fma"} <= flags:
        isas.append("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        isas.append("avx512")
    return isas


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EFFC_ISA", request.param)
    name: str = request.param
    return name


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(library: Path, isa: str, pattern: str, causal: bool) -> None:
    check(library, Case(pattern=pattern, causal=causal, q_len=150, batch=2))
    check(library, Case(pattern=pattern, causal=causal, q_len=70, kv_len=200, batch=2, num_heads=4, kv_num_heads=2))


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("length", [1, 2, 7, WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 65, 129, 257])
def test_lengths(library: Path, isa: str, length: int, causal: bool) -> None:
    check(library, Case(pattern=f"local:{WINDOW}", causal=causal, q_len=length))


@pytest.mark.parametrize("head_dim", [1, 4, 7, 8, 16, 20, 24, 32, 40, 64, 72, 80, 96, 128, 200, 256, 512])
def test_head_dims(library: Path, isa: str, head_dim: int) -> None:
    check(library, Case(head_dim=head_dim, q_len=70))
    check(library, Case(head_dim=head_dim, q_len=1, kv_len=70, causal=True))


@pytest.mark.parametrize("q_len", [1, 2, 3, 4, 5, 17, 64, 65])
@pytest.mark.parametrize("kv_num_heads", [1, 2, 3, 6])
def test_decode_with_grouped_heads(library: Path, isa: str, q_len: int, kv_num_heads: int) -> None:
    case = Case("local:40|sinks:4", True, 2, q_len, 170, num_heads=6, kv_num_heads=kv_num_heads)
    check(library, case)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("kind", ["left", "right", "holes", "empty"])
def test_key_masks(library: Path, isa: str, kind: str, causal: bool) -> None:
    length = 130
    mask = np.ones((2, length), dtype=bool)
    if kind == "left":
        mask[0, :70], mask[1, :5] = False, False
    elif kind == "right":
        mask[0, 60:], mask[1, -1:] = False, False
    elif kind == "holes":
        mask = np.random.default_rng(1).random((2, length)) < 0.5
    else:
        mask[0] = False
    for q_len in (length, 3):
        check(library, Case(causal=causal, batch=2, q_len=q_len, kv_len=length, key_mask=mask))


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", ["strided:3", "strided:64", "strided:500", "dilated:9:5", "dilated:30:2"])
@pytest.mark.parametrize("q_len", [1, 4, 67, 200])
def test_every_step_th_key(library: Path, isa: str, pattern: str, causal: bool, q_len: int) -> None:
    """These run as independent subsequences; rows, masks and log-sum-exp must land where they belong."""
    mask = np.random.default_rng(2).random((2, 200)) < 0.7
    mask[0, :40] = False
    case = Case(pattern, causal, 2, q_len, 200, num_heads=4, kv_num_heads=2, key_mask=mask)
    output, log_sum_exp = run(library, case, log_sum_exp=True)
    expected_output, expected = reference(case)
    np.testing.assert_allclose(output, expected_output, atol=5e-6)
    np.testing.assert_allclose(log_sum_exp, expected, atol=5e-6)


def test_rows_that_see_nothing_are_zero(library: Path, isa: str) -> None:
    mask = np.ones((1, 100), dtype=bool)
    mask[0, :50] = False
    output, log_sum_exp = run(library, Case(pattern="local:8", causal=True, q_len=100, key_mask=mask), True)
    assert (output[0, :50] == 0).all()
    assert np.isneginf(log_sum_exp[0, :, :50]).all()
    assert np.isfinite(log_sum_exp[0, :, 50:]).all()


@pytest.mark.parametrize("q_len", [1, 90])
def test_log_sum_exp(library: Path, isa: str, q_len: int) -> None:
    case = Case("local:16|sinks:2", True, 2, q_len, 90, num_heads=4, kv_num_heads=2)
    output, log_sum_exp = run(library, case, log_sum_exp=True)
    expected_output, expected = reference(case)
    np.testing.assert_allclose(output, expected_output, atol=5e-6)
    np.testing.assert_allclose(log_sum_exp, expected, atol=5e-6)


@pytest.mark.parametrize("scale", [20.0, -3.0, 1e-4])
def test_large_and_odd_scales(library: Path, isa: str, scale: float) -> None:
    """Scores of some hundreds must not overflow; their rounding alone shows in the output."""
    case = Case(scale=scale, q_len=100)
    np.testing.assert_allclose(run(library, case)[0], reference(case)[0], atol=1e-3)


def test_masked_keys_may_hold_anything_finite(library: Path, isa: str) -> None:
    mask = np.ones((1, 64), dtype=bool)
    mask[0, 40:] = False
    case = Case(q_len=64, key_mask=mask)
    feeds = case.inputs()
    feeds["key"][0, 40:] = 1e30
    feeds["value"][0, 40:] = -1e30
    output = session(library, model(case.attributes(), ["key_mask"])).run(None, feeds)[0]
    np.testing.assert_allclose(output, reference(case)[0], atol=5e-6)


@pytest.mark.parametrize("q_len", [1, 64])
def test_not_a_number_is_not_hidden(library: Path, isa: str, q_len: int) -> None:
    case = Case(q_len=q_len, kv_len=64)
    feeds = case.inputs()
    feeds["query"][0, 0, 0] = np.nan
    output = session(library, model(case.attributes())).run(None, feeds)[0]
    assert np.isnan(output[0, 0, :32]).all(), "the row and head that hold it"
    assert np.isfinite(output[0, 0, 32:]).all() and np.isfinite(output[0, 1:]).all(), "and no other"


@pytest.mark.parametrize("pattern", ["local:16|global:40", "global:100"])
def test_whole_rows_of_many_heads(library: Path, isa: str, pattern: str) -> None:
    check(library, Case(pattern, q_len=130, num_heads=70, head_dim=64))


def test_scores_far_below_the_largest_weigh_nothing(library: Path, isa: str) -> None:
    """Their weights pass through every size down to zero, a whole block of keys after the other."""
    case = Case("dense", q_len=300, scale=0.125)
    feeds = case.inputs() | {"distance_slope": np.array([1.0, 1e30], np.float32)}
    output = session(library, model(case.attributes(), ["distance_slope"])).run(None, feeds)[0]
    assert np.isfinite(output).all()
    np.testing.assert_array_equal(output[0, :, 32:], np.broadcast_to(feeds["value"][0, -1, 32:], (300, 32)))


def test_denormal_numbers_survive_a_call(library: Path, isa: str) -> None:
    """The kernels treat them as zeros, and nobody else's."""
    session(library, model(Case().attributes()), threads=1).run(None, Case().inputs())
    assert (np.full(64, 1e-40, np.float32) * np.float32(1)).all()


def test_empty_batch(library: Path) -> None:
    assert run(library, Case(batch=0))[0].shape == (0, 64, 64)


def test_every_thread_count_gives_the_same_numbers(library: Path) -> None:
    case = Case("local:32|global:4", q_len=1000, num_heads=4, head_dim=64)
    proto, feeds = model(case.attributes()), case.inputs()
    one, many = (session(library, proto, threads).run(None, feeds)[0] for threads in (1, 5))
    np.testing.assert_array_equal(one, many)


def test_output_shape_is_inferred(library: Path) -> None:
    outputs = session(library, model(Case().attributes())).get_outputs()
    assert len(outputs[0].shape) == 3


def marks_of(kind: str, batch: int, keys: int) -> np.ndarray:
    rng = np.random.default_rng(keys)
    marks = np.zeros((batch, keys), dtype=bool)
    if kind == "few":
        marks[np.arange(batch), rng.integers(0, keys, batch)] = True
        marks[0, keys // 2] = True
    elif kind == "many":
        marks = rng.random((batch, keys)) < 0.3
    elif kind == "every":
        marks[:] = True
    return marks


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("kind", ["none", "few", "many"])
@pytest.mark.parametrize(
    "pattern",
    ["global:sep", "global:cls+#7|local:16", "strided:7|global:cls|sinks:2", "block:8|dilated:9:3|global:sep"],
)
@pytest.mark.parametrize("q_len", [3, 180])
def test_marked_tokens(library: Path, isa: str, pattern: str, kind: str, q_len: int, causal: bool) -> None:
    mask = np.random.default_rng(3).random((2, 180)) < 0.8
    marks = marks_of(kind, 2, 180)
    case = Case(pattern, causal, 2, q_len, 180, num_heads=4, kv_num_heads=2, key_mask=mask, marks=marks)
    output, log_sum_exp = run(library, case, log_sum_exp=True)
    expected_output, expected = reference(case)
    np.testing.assert_allclose(output, expected_output, atol=5e-6)
    np.testing.assert_allclose(log_sum_exp, expected, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", ["dense", "local:40", "dilated:9:4", "local:16|global:2", "local:16|global:sep"])
@pytest.mark.parametrize("bias_reach", [None, 0, 40])
@pytest.mark.parametrize("q_len", [1, 150])
def test_distance_biases(
    library: Path, isa: str, pattern: str, bias_reach: int | None, q_len: int, causal: bool
) -> None:
    sloped = bias_reach is None or bias_reach == 40
    marks = marks_of("few", 2, 150) if "sep" in pattern else None
    case = Case(pattern, causal, 2, q_len, 150, 4, 2, marks=marks, bias_reach=bias_reach, sloped=sloped)
    check(library, case)


@pytest.mark.parametrize("pattern", ["dense", "local:9", "local:8|sinks:2"])
def test_more_queries_than_keys(library: Path, isa: str, pattern: str) -> None:
    for keys in (1, 30, 100):
        check(library, Case(pattern, False, 2, 170, keys))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_num_heads = draw(st.integers(1, 3))
    num_heads = kv_num_heads * draw(st.integers(1, 5))
    batch, keys = draw(st.integers(1, 2)), draw(st.integers(1, 400))
    seed = draw(st.integers(0, 1000))
    mask = draw_key_mask(draw, batch, keys, np.random.default_rng(seed))
    return Case(
        pattern=draw(patterns(widest=200, widest_side=90)),
        causal=draw(st.booleans()),
        batch=batch,
        q_len=draw(st.integers(1, keys)),
        kv_len=keys,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        head_dim=draw(st.integers(1, 96)),
        key_mask=mask,
        marks=marks_of(draw(st.sampled_from(["none", "few", "many", "every"])), batch, keys),
        bias_reach=draw(st.sampled_from([None, None, 0, 3, 200])),
        sloped=draw(st.booleans()),
        seed=seed,
    )


@settings(max_examples=40, derandomize=True, **PROFILE)
@given(case=cases())
def test_anything(library: Path, isa: str, case: Case) -> None:
    check(library, case)


def test_registering_twice_is_fine(library: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    case = Case()
    for _ in range(2):
        check(library, case)
