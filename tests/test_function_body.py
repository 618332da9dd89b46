"""The ONNX function bodies against the float64 reference, in plain ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import expected, one_node_model, random_inputs, session
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.plugins.forms.registry import parse_pattern
from effc.plugins.operator import AttentionGeometry

GEOMETRIES = [
    AttentionGeometry(parse_pattern(text), causal, heads, kv_heads, dim, dim**-0.5)
    for text, causal, heads, kv_heads, dim in [
        ("local:16", False, 2, 2, 8),
        ("local:17", True, 4, 2, 8),
        ("local:1", True, 2, 2, 8),
        ("local:1", False, 2, 1, 8),
        ("local:600", True, 2, 1, 8),
        ("dense", False, 2, 2, 8),
        ("dense", True, 4, 2, 8),
    ]
]
_sessions = {}


def body_session(geometry, masked):
    key = (geometry, masked)
    if key not in _sessions:
        _sessions[key] = session(one_node_model(geometry, masked))
    return _sessions[key]


@settings(max_examples=120, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    batch=st.integers(1, 3),
    length=st.one_of(st.sampled_from([1, 15, 16, 17, 63, 64, 65, 80, 81]), st.integers(1, 900)),
    padding=st.sampled_from(["none", "left", "right", "holes", "all"]),
    seed=st.integers(0, 99),
)
def test_body_equals_the_float64_reference(geometry, batch, length, padding, seed):
    feed = random_inputs(geometry, batch, length, length, seed, padding)
    result = body_session(geometry, True).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.overload(frozenset()))
@pytest.mark.parametrize("length", [1, 40, 333])
def test_body_without_a_mask_input(geometry, length):
    feed = random_inputs(geometry, 2, length, length, 0, "none")
    unmasked = {name: array for name, array in feed.items() if name != "key_mask"}
    result = body_session(geometry, False).run(None, unmasked)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@pytest.mark.parametrize(
    "geometry", [g for g in GEOMETRIES if not g.form.is_dense], ids=lambda g: g.overload(frozenset())
)
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (7, 300), (130, 700)])
def test_queries_are_the_last_positions(geometry, queries, keys):
    feed = random_inputs(geometry, 2, queries, keys, 1, "left")
    result = body_session(geometry, True).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)
