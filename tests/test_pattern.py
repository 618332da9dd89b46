"""Patterns: their text, their masks and their counts."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import patterns

from effc.errors import UsageError
from effc.plugins.forms.registry import parse_form, parse_pattern
from effc.plugins.forms.terms import Random, Scope
from effc.plugins.pattern import Pattern


@settings(max_examples=300, deadline=None)
@given(pattern=patterns(), length=st.integers(1, 300), causal=st.booleans())
def test_counted_pairs_are_those_of_the_mask(pattern, length, causal):
    assert pattern.visible_pairs(length, causal) == pattern.mask(length, length, causal).sum()


@given(pattern=patterns(tokens=True))
def test_text_reads_back(pattern):
    assert parse_form(str(pattern)) == pattern


@settings(deadline=None)
@given(pattern=patterns(), length=st.integers(2, 200), queries=st.integers(1, 60), causal=st.booleans())
def test_queries_are_the_last_rows_of_the_mask(pattern, length, queries, causal):
    queries = min(queries, length)
    whole = pattern.mask(length, length, causal)
    assert (pattern.mask(queries, length, causal) == whole[-queries:]).all()


@settings(deadline=None)
@given(one=patterns(), other=patterns(), length=st.integers(1, 150), causal=st.booleans())
def test_a_union_sees_what_either_sees(one, other, length, causal):
    either = one.mask(length, length, causal) | other.mask(length, length, causal)
    assert ((one | other).mask(length, length, causal) == either).all()


@pytest.mark.parametrize(
    ("text", "causal", "rows"),
    [
        ("local:2", False, ["##..", "###.", ".###", "..##"]),
        ("local:2", True, ["#...", "##..", ".##.", "..##"]),
        ("local:1:2", False, ["###.", "####", ".###", "..##"]),
        ("dilated:2:2", False, ["#.#.", ".#.#", "#.#.", ".#.#"]),
        ("block:2", False, ["##..", "##..", "..##", "..##"]),
        ("block:1:1", True, ["#...", "##..", ".##.", "..##"]),
        ("strided:3", False, ["#..#", ".#..", "..#.", "#..#"]),
        ("global:1|local:1", False, ["####", "##..", "#.#.", "#..#"]),
        ("sinks:2", True, ["#...", "##..", "##..", "##.."]),
    ],
)
def test_small_masks(text, causal, rows):
    mask = parse_pattern(text).mask(4, 4, causal)
    assert ["".join("#" if seen else "." for seen in row) for row in mask] == rows


def test_marked_tokens_see_and_are_seen():
    marks = np.array([[False, True, False], [False, False, False]])
    mask = parse_pattern("global:#5").mask(3, 3, False, marks)
    assert mask[0].tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert not mask[1].any()


def test_random_blocks_depend_on_the_seed_and_stay_behind_the_query_in_causal_attention():
    blocks = np.arange(100)
    draws = {seed: Random(1, seed).draw(blocks, 0, Scope(6400, causal=True)) for seed in (0, 1)}
    assert (draws[0] <= blocks).all() and (draws[0] >= 0).all()
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize("text", ["bigbird", "lsg", "strided:64|dilated:64:48|local:128|sinks:4"])
def test_long_sequences_are_counted_quickly(text):
    start = time.process_time()
    pattern = parse_pattern(text)
    assert 0 < pattern.density(131_072) < 0.1
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "make", [lambda: Pattern(()), lambda: parse_form("local:0"), lambda: parse_form("bigbird|linear:elu")]
)
def test_what_is_no_pattern_is_refused(make):
    with pytest.raises(UsageError):
        make()
