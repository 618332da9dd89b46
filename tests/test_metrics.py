"""Deviations against figures worked out by hand, and the hard cases: zeros, NaN, padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effc.compiler.manifest import OutputDeviation
from effc.compiler.metrics import DeviationSum, compare_outputs, deviation, pool, pooled_cosines


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_equal_outputs_have_no_deviation() -> None:
    values = random(2, 5, 8)
    assert deviation(values, values, logits=True) == OutputDeviation(relative_error=0, cosine=1, top1_agreement=1)


def test_relative_error_and_cosine_of_known_vectors() -> None:
    reference = np.array([[[3.0, 4.0], [1.0, 0.0]]])
    candidate = np.array([[[3.0, 4.0], [0.0, 1.0]]])
    result = deviation(reference, candidate, logits=True)
    assert result.relative_error == pytest.approx(math.sqrt(2 / 26))
    assert result.cosine == pytest.approx(0.5)
    assert result.top1_agreement == 0.5


def test_padding_is_not_compared() -> None:
    reference, mask = random(2, 4, 8), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    candidate = reference.copy()
    candidate[0, 2:] = np.nan
    assert deviation(reference, candidate, mask).relative_error == 0
    candidate[0, 1] += 1
    assert deviation(reference, candidate, mask).relative_error > 0


def test_mask_does_not_touch_outputs_of_one_vector_per_sample() -> None:
    # As many classes as tokens: the shape alone could be mistaken for tokens.
    reference, mask = random(2, 4), np.array([[1, 0, 0, 0], [1, 0, 0, 0]])
    assert deviation(reference, reference + 1, mask).relative_error > 0
    changed = reference.copy()
    changed[:, 1:] += 5
    assert deviation(reference, changed, mask).relative_error > 1


def test_nan_of_the_candidate_is_an_infinite_error() -> None:
    reference, candidate = random(1, 4, 8), random(1, 4, 8)
    candidate[0, 0, 0] = np.nan
    result = deviation(reference, candidate, logits=True)
    assert result.relative_error == math.inf
    assert result.cosine == pytest.approx(0.75)
    assert result.top1_agreement == 0.75


def test_infinite_errors_survive_json() -> None:
    record = OutputDeviation(relative_error=math.inf, cosine=0.0)
    assert OutputDeviation.model_validate_json(record.model_dump_json()) == record


def test_a_reference_of_nothing_but_nan_is_never_called_equal() -> None:
    values = np.full((1, 2, 3), np.nan)
    assert deviation(values, values).relative_error == math.inf


def test_zero_vectors() -> None:
    zeros, ones = np.zeros((1, 2, 3)), np.ones((1, 2, 3))
    assert deviation(zeros, zeros) == OutputDeviation(relative_error=0, cosine=1)
    assert deviation(zeros, ones) == OutputDeviation(relative_error=math.inf, cosine=0)
    assert deviation(ones, zeros) == OutputDeviation(relative_error=1, cosine=0)


def test_batches_add_up_to_the_whole() -> None:
    reference, candidate = random(6, 5, 8), random(6, 5, 8, seed=1)
    mask = (np.arange(5) < np.array([1, 2, 3, 4, 5, 5])[:, None]).astype(np.int64)
    total = DeviationSum(logits=True)
    for start in (0, 1, 4):
        end = {0: 1, 1: 4, 4: 6}[start]
        total.update(reference[start:end], candidate[start:end], mask[start:end])
    whole, parts = deviation(reference, candidate, mask, logits=True), total.result()
    assert parts.relative_error == pytest.approx(whole.relative_error)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.top1_agreement == whole.top1_agreement


def test_large_logits_are_compared_in_blocks() -> None:
    # More elements than one block, so that the block boundary is crossed.
    reference = random(1, 90, 50_000)
    candidate = reference * np.float32(1.5)
    result = deviation(reference, candidate, logits=True)
    assert result.relative_error == pytest.approx(0.5, rel=1e-6)
    assert result.top1_agreement == 1


@given(st.floats(1e-3, 1e3), st.floats(0.01, 100))
def test_scale_of_both_does_not_matter(scale: float, factor: float) -> None:
    reference = random(2, 3, 4).astype(np.float64)
    result = deviation(reference * scale, reference * scale * factor)
    assert result.relative_error == pytest.approx(abs(factor - 1), abs=1e-9)
    assert result.cosine == pytest.approx(1)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        deviation(random(2, 3, 4), random(2, 3, 5))
    with pytest.raises(ValueError, match="mask"):
        deviation(random(2, 3, 4), random(2, 3, 4), np.ones((2, 4)))


def test_compare_outputs_takes_what_both_have() -> None:
    hidden, logits = random(2, 3, 4), random(2, 7)
    reference = {"last_hidden_state": hidden, "logits": logits, "past_key_values": random(1)}
    result = compare_outputs(
        reference, {"logits": logits, "last_hidden_state": hidden, "other": hidden}, np.ones((2, 3))
    )
    assert set(result) == {"last_hidden_state", "logits"}
    assert result["logits"].top1_agreement == 1
    assert result["last_hidden_state"].top1_agreement is None
    with pytest.raises(ValueError, match="no output in common"):
        compare_outputs({"logits": logits}, {"last_hidden_state": hidden})


def test_pooling_means_over_real_tokens_only() -> None:
    hidden = np.array([[[1.0, 2.0], [3.0, 4.0], [np.nan, np.nan]]])
    assert pool(hidden, np.array([[1, 1, 0]])).tolist() == [[2.0, 3.0]]
    assert pool(hidden[:, :2]).tolist() == [[2.0, 3.0]]


def test_pooled_cosines() -> None:
    reference = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    candidate = np.array([[[2.0, 0.0]], [[0.0, 1.0]], [[np.nan, 1.0]]])
    assert pooled_cosines(reference, candidate).tolist() == [1.0, 0.0, 0.0]
