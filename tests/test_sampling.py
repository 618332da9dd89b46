"""Choosing tokens: the same distribution as transformers' processors, the same draw for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from effc.compiler.sampling import Sampler, SamplingSettings
from effc.errors import UsageError

VOCABULARY = 12


def logits_of(seed: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, VOCABULARY)).astype(np.float32) * 3


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.none() | st.floats(0.2, 4.0),
    st.none() | st.integers(1, 15),
    st.none() | st.floats(0.05, 1.0),
    st.sampled_from([1.0, 1.3, 0.7]),
)
def test_distribution_is_that_of_transformers(seed, temperature, top_k, top_p, penalty) -> None:
    logits = logits_of(seed)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (2, 5))
    scores = torch.from_numpy(logits)
    ids = torch.from_numpy(tokens)
    if penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    for value, warper in ((temperature, TemperatureLogitsWarper), (top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper)):
        if value is not None:
            scores = warper(value)(ids, scores)
    wanted = torch.softmax(scores.double(), dim=-1).numpy()
    chosen = SamplingSettings(True, temperature, top_k, top_p, penalty, seed)
    found = Sampler(chosen).probabilities(logits, tokens, np.ones_like(tokens, dtype=bool))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(3, batch=1)
    many = np.repeat(logits, 20_000, axis=0)
    tokens, mask = np.zeros((20_000, 1), np.int64), np.ones((20_000, 1), dtype=bool)
    drawn = Sampler(SamplingSettings(do_sample=True, seed=0)).choose(many, tokens, mask)
    wanted = np.exp(logits[0] - logits[0].max())
    wanted /= wanted.sum()
    # Five standard deviations of a share of 20,000 draws.
    assert (np.abs(np.bincount(drawn, minlength=VOCABULARY) / 20_000 - wanted) < 5 * np.sqrt(wanted / 20_000)).all()


def test_padding_is_not_penalised() -> None:
    logits = np.array([[1.0, 2.0]], dtype=np.float32)
    tokens, mask = np.array([[1, 0]]), np.array([[False, True]])
    chosen = Sampler(SamplingSettings(repetition_penalty=9.0)).choose(logits, tokens, mask)
    assert chosen.tolist() == [1]
    assert Sampler(SamplingSettings(repetition_penalty=9.0)).choose(logits, tokens, ~mask).tolist() == [0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"do_sample": False, "temperature": 1.0},
    ],
)
def test_values_out_of_range_are_refused(options) -> None:
    with pytest.raises(UsageError):
        SamplingSettings(**options)
