"""The ONNX function bodies of position-based patterns against the float64 reference, in plain ONNX Runtime."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_cases import expected, one_node_model, random_inputs, session
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import patterns

from effc.errors import PreconditionError
from effc.plugins.forms.registry import parse_pattern
from effc.plugins.function_body import function_body
from effc.plugins.operator import AttentionGeometry

PADDINGS = ["none", "left", "right", "holes", "all"]
EXTRAS = [(), ("distance_bias",), ("distance_slope",), ("distance_bias", "distance_slope")]
# Every term, and every way of cutting a union into parts.
FORMS = [
    "dense",
    "local:1",
    "local:16",
    "local:17",
    "local:5:9",
    "local:0:3",
    "local:600",
    "dilated:16:4",
    "dilated:9:40",
    "block:64",
    "block:16:2",
    "block:100:1",
    "block:97",
    "block:256:1",
    "block:48:1|block:64",
    "strided:1",
    "strided:8",
    "strided:64",
    "random:2",
    "random:2|block:48",
    "random:3:5|local:32",
    "global:3",
    "sinks:5",
    "global:16|local:32",
    "bigbird",
    "bigbird:16:2:8",
    "longformer:64:3",
    "lsg:32:4",
    "lsg:32:16:2",
    "streaming:64:4",
    "a-shape:32:100",
    "strided:16|local:32",
    "strided:7|global:5",
    "strided:16|dilated:16:24|random:2|sinks:3",
    "global:#5",
    "global:#5|local:16",
    "global:#5|strided:16|random:2|global:3",
]


def geometry(pattern, causal, grouped, dim=8):
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    return AttentionGeometry(pattern, causal, 4 if grouped else 2, 2, dim, dim**-0.5)


def extra_inputs(layer, names, batch, keys, seed):
    """``marks`` where the pattern names tokens, and the inputs ``names``."""
    rng = np.random.default_rng(seed)
    extras = {"marks": rng.random((batch, keys)) < rng.choice([0, 0.01, 0.1])} if layer.form.tokens else {}
    if "distance_bias" in names:
        extras["distance_bias"] = rng.standard_normal((layer.num_heads, 2 * 20 + 1), dtype=np.float32)
    if "distance_slope" in names:
        # Small: distances of hundreds times large slopes leave float32 no digits for the scores.
        extras["distance_slope"] = rng.uniform(0, 0.02, layer.num_heads).astype(np.float32)
    return extras


def check(layer, batch, queries, keys, padding, names=(), seed=0, runner=None):
    """Run the body; ``padding`` None leaves the mask input out of the graph."""
    extras = extra_inputs(layer, names, batch, keys, seed)
    feed = random_inputs(layer, batch, queries, keys, seed, padding or "none")
    runner = runner or session(one_node_model(layer, padding is not None, extras))
    given = {name: array for name, array in feed.items() if padding is not None or name != "key_mask"}
    result = runner.run(None, given | extras)[0]
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result, expected(layer, feed, extras), atol=1e-5)


@cache
def known_session(form, causal, grouped, names, masked=True):
    layer = geometry(form, causal, grouped)
    return session(one_node_model(layer, masked, extra_inputs(layer, names, 1, 1, 0)))


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    causal=st.booleans(),
    grouped=st.booleans(),
    names=st.sampled_from(EXTRAS),
    batch=st.integers(1, 3),
    keys=st.one_of(st.sampled_from([1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256]), st.integers(1, 500)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 99),
)
def test_body_equals_the_float64_reference(form, causal, grouped, names, batch, keys, share, padding, seed):
    runner = known_session(form, causal, grouped, names)
    check(geometry(form, causal, grouped), batch, max(1, round(share * keys)), keys, padding, names, seed, runner)


@settings(max_examples=20, deadline=None)
@given(
    pattern=patterns(tokens=True),
    causal=st.booleans(),
    grouped=st.booleans(),
    names=st.sampled_from(EXTRAS),
    keys=st.integers(129, 700),
    share=st.sampled_from([0.3, 1.0]),
    padding=st.sampled_from([None, *PADDINGS]),
    seed=st.integers(0, 99),
)
def test_body_of_any_union(pattern, causal, grouped, names, keys, share, padding, seed):
    check(geometry(pattern, causal, grouped), 2, max(1, round(share * keys)), keys, padding, names, seed)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    pattern=patterns(tokens=True),
    causal=st.booleans(),
    grouped=st.booleans(),
    names=st.sampled_from(EXTRAS),
    batch=st.integers(1, 3),
    keys=st.integers(1, 1500),
    queries=st.integers(1, 1500),
    padding=st.sampled_from([None, *PADDINGS]),
    seed=st.integers(0, 9999),
)
def test_body_of_any_union_at_length(pattern, causal, grouped, names, batch, keys, queries, padding, seed):
    check(geometry(pattern, causal, grouped), batch, min(queries, keys), keys, padding, names, seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_body_without_a_mask_input(form, causal):
    check(geometry(form, causal, grouped=False), 1, 200, 200, None)


@pytest.mark.parametrize(
    ("form", "causal"),
    [("local:600", True), ("bigbird", False), ("strided:16|local:100", True), ("block:256:1", False)],
)
def test_long_sequences(form, causal):
    check(geometry(form, causal, grouped=True), 1, 1300, 1300, "holes", ("distance_bias",))


@pytest.mark.parametrize(
    "form", ["local:64|sinks:4", "block:64:1", "bigbird", "strided:16", "global:#5|local:16", "dense"]
)
def test_a_query_at_a_time_gives_the_rows_of_all_at_once(form):
    """Decoding: each step sees the keys so far, the last of them its own."""
    layer = geometry(form, True, grouped=True)
    extras = extra_inputs(layer, (), 1, 400, 3)
    feed = random_inputs(layer, 1, 400, 400, 3, "holes") | extras
    runner = session(one_node_model(layer, True, extras))
    whole = runner.run(None, feed)[0]
    for end in (1, 2, 64, 65, 300, 400):
        step = {name: array[:, :end] for name, array in feed.items()}
        step["query"] = step["query"][:, -1:]
        np.testing.assert_allclose(runner.run(None, step)[0], whole[:, end - 1 : end], atol=1e-5)


def test_scores_far_apart_keep_hidden_keys_hidden():
    """A hidden key with by far the largest score must not count, nor may the floor under hidden scores."""
    layer = geometry("local:16", False, grouped=False)
    feed = random_inputs(layer, 1, 300, 300, 0, "holes")
    feed["query"] *= 8
    feed["key"] *= 8
    runner = session(one_node_model(layer, True))
    result = runner.run(None, feed)[0]
    feed["key"][~feed["key_mask"]] *= 30
    feed["value"][~feed["key_mask"]] = 1e3
    np.testing.assert_allclose(runner.run(None, feed)[0], result, atol=1e-5)
    np.testing.assert_allclose(result, expected(layer, feed), atol=1e-4)


def test_tokens_without_marks_are_refused():
    with pytest.raises(PreconditionError, match="marks"):
        function_body(geometry("global:#5|local:16", False, grouped=False))


@pytest.mark.parametrize(
    "form", ["local:64", "bigbird:16:2:8", "global:#5|local:16", "strided:128|local:32", "block:64:1"]
)
def test_nothing_in_the_graph_grows_with_the_square_of_the_length(form, tmp_path):
    """The largest value that any node writes, by ONNX Runtime's own record, at two lengths."""
    layer = geometry(form, False, grouped=False, dim=4)
    sizes = [largest_value(layer, length, tmp_path) for length in (1536, 4608)]
    assert sizes[1] <= 3.1 * sizes[0]


def largest_value(layer, length, folder):
    extras = {"marks": np.arange(length)[None] % length == 7} if layer.form.tokens else {}
    model = one_node_model(layer, True, extras)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / f"profile_{length}")
    runner = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    runner.run(None, random_inputs(layer, 1, length, length, 0, "none") | extras)
    events = json.loads(Path(runner.end_profiling()).read_text(encoding="utf-8"))
    return max(int(event["args"]["output_size"]) for event in events if "output_size" in event.get("args", {}))


def test_bodies_pass_the_checker():
    for form in FORMS:
        layer = geometry(form, False, grouped=True)
        extras = extra_inputs(layer, EXTRAS[-1], 1, 1, 0)
        onnx.checker.check_model(one_node_model(layer, True, extras))
