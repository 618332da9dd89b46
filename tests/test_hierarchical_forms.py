"""Hierarchical, chunked and chunked dense attention: definitions, references and ONNX function bodies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from attention_cases import expected, one_node_model, random_inputs, session
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.errors import UsageError
from effc.plugins.forms.chunked import Chunked
from effc.plugins.forms.hierarchical import FANOUT, Hierarchical
from effc.plugins.forms.registry import parse_form, parse_pattern
from effc.plugins.operator import AttentionGeometry
from effc.plugins.reference import attend, initial_parameters

TEXTS = [
    "hierarchical:16:2",
    "hierarchical:4:4",
    "hierarchical:5:3",
    "hierarchical:96",
    "chunked:16",
    "chunked:15:concat:3",
    "chunked:256",
    "chunked:16:add",
    "chunked:200:add:5",
    "chunked:16:gate:5",
    "chunked:128:gate",
    "dense-chunked:16",
    "dense-chunked",
]
ALL_GEOMETRIES = [
    AttentionGeometry(parse_form(text), causal, heads, kv_heads, 8, 8**-0.5)
    for text, causal, (heads, kv_heads) in itertools.product(TEXTS, (False, True), ((2, 2), (4, 2)))
]
# Grouped and single queries in turns: one of both for each text and direction.
GEOMETRIES = [g for number, g in enumerate(ALL_GEOMETRIES) if number % 4 in ((0, 3) if number // 4 % 2 else (1, 2))]
EDGES = [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 255, 256, 257, 512, 513]
LENGTHS = st.one_of(st.sampled_from(EDGES), st.integers(1, 400))
PADDINGS = st.sampled_from(["none", "left", "right", "holes", "all"])
_sessions = {}


def body_session(geometry, masked=True, extras=None):
    key = (geometry, masked, tuple(extras or ()))
    if key not in _sessions:
        _sessions[key] = session(one_node_model(geometry, masked, extras))
    return _sessions[key]


def random_qkv(heads, kv_heads, queries, keys, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, queries, 4), (2, kv_heads, keys, 4), (2, kv_heads, keys, 4)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def random_mask(length, seed, padding):
    geometry = AttentionGeometry(parse_form("dense"), False, 1, 1, 1, 1.0)
    return torch.from_numpy(random_inputs(geometry, 2, 1, length, seed, padding)["key_mask"])


def dense(query, key, value, scale, causal=False, key_mask=None):
    return attend(parse_pattern("dense"), query, key, value, scale=scale, causal=causal, key_mask=key_mask)


@settings(max_examples=80, deadline=None)
@given(geometry=st.sampled_from(GEOMETRIES), length=LENGTHS, padding=PADDINGS, seed=st.integers(0, 99))
def test_body_equals_the_float64_reference(geometry, length, padding, seed):
    feed = random_inputs(geometry, 2, length, length, seed, padding)
    result = body_session(geometry).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ALL_GEOMETRIES, ids=lambda g: f"{g.overload(frozenset())}")
def test_body_at_every_edge(geometry):
    for length, padding in itertools.product([*EDGES, 130, 900], ("none", "left", "holes")):
        feed = random_inputs(geometry, 2, length, length, length, padding)
        result = body_session(geometry).run(None, feed)[0]
        np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    queries=st.one_of(st.sampled_from([1, 2, 16, 33]), st.integers(1, 120)),
    more=st.integers(0, 300),
    padding=PADDINGS,
    seed=st.integers(0, 99),
)
def test_queries_are_the_last_positions(geometry, queries, more, padding, seed):
    feed = random_inputs(geometry, 1, queries, queries + more, seed, padding)
    result = body_session(geometry).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@pytest.mark.parametrize("text", ["hierarchical:5:3", "chunked:200:add:5", "chunked:16:gate:5", "dense-chunked:16"])
@pytest.mark.parametrize("causal", [False, True])
def test_body_without_a_mask_input(text, causal):
    geometry = AttentionGeometry(parse_form(text), causal, 2, 2, 8, 8**-0.5)
    for length in (1, 40, 333):
        feed = random_inputs(geometry, 2, length, length, 0, "none")
        unmasked = {name: array for name, array in feed.items() if name != "key_mask"}
        result = body_session(geometry, False).run(None, unmasked)[0]
        np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "causal", "heads"),
    [("chunked:16:gate", False, 4), ("chunked:16:gate", True, 2), ("chunked:32:gate:5", False, 2)],
)
def test_body_with_a_learned_gate(text, causal, heads):
    geometry = AttentionGeometry(parse_form(text), causal, heads, 2, 8, 8**-0.5)
    extras = {"gate": np.linspace(-4, 3, heads, dtype=np.float32)}
    for (queries, keys), padding in itertools.product([(1, 1), (70, 70), (333, 333), (7, 90)], ("none", "holes")):
        feed = random_inputs(geometry, 2, queries, keys, 0, padding)
        result = body_session(geometry, True, extras).run(None, feed | extras)[0]
        np.testing.assert_allclose(result, expected(geometry, feed, extras), atol=1e-5)
        assert np.abs(result - expected(geometry, feed)).max() > 1e-3 or keys == 1


def hierarchical_row(form, query, keys, values, mask, position, scale, causal):
    """One row from the text of the definition: walk the tree of blocks from the top, open those that are near."""

    def near(a, b):
        return abs(a - b) <= 1

    scores, rows = [], []

    def visit(level, node):
        if level == 0:
            if mask[node] and not (causal and node > position):
                scores.append(query @ keys[node] * scale)
                rows.append(values[node])
            return
        size = form.size(level)
        inside = np.arange(node * size, min((node + 1) * size, len(keys)))
        if near(position // size, node):
            # Open it: single keys below level 1, smaller blocks above.
            children = inside if level == 1 else sorted({int(j) // form.size(level - 1) for j in inside})
            for child in children:
                visit(level - 1, int(child))
            return
        if causal and node > position // size:
            return
        members = inside[mask[inside]]
        if len(members):
            scores.append(query @ keys[members].mean(axis=0) * scale + np.log(len(members)))
            rows.append(values[members].mean(axis=0))

    top = form.levels - 1
    for node in range(-(-len(keys) // form.size(top))):
        visit(top, node)
    if not scores:
        return np.zeros(values.shape[1])
    weights = np.exp(np.array(scores) - max(scores))
    return weights @ np.array(rows) / weights.sum()


@settings(max_examples=60, deadline=None)
@given(
    block=st.integers(1, 9),
    levels=st.integers(2, 5),
    length=st.integers(1, 150),
    queries=st.integers(1, 150),
    causal=st.booleans(),
    padding=PADDINGS,
    seed=st.integers(0, 99),
)
def test_hierarchical_reference_is_the_tree_walk(block, levels, length, queries, causal, padding, seed):
    form, queries, scale = Hierarchical(block, levels), min(queries, length), 0.7
    query, key, value = random_qkv(2, 1, queries, length, seed)
    mask = random_mask(length, seed, padding)
    result = attend(form, query, key, value, scale=scale, causal=causal, key_mask=mask).numpy()
    rows = range(0, queries, max(1, queries // 12))
    for batch, row in itertools.product(range(2), rows):
        wanted = hierarchical_row(
            form,
            query[batch, 1, row].numpy(),
            key[batch, 0].numpy(),
            value[batch, 0].numpy(),
            mask[batch].numpy(),
            length - queries + row,
            scale,
            causal,
        )
        np.testing.assert_allclose(result[batch, 1, row], wanted, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_hierarchical_is_exact_where_the_keys_of_every_block_are_equal(causal, padding):
    form = Hierarchical(4, 3)
    query, key, value = random_qkv(2, 2, 130, 130, 3)
    size = form.size(2)
    key = key[:, :, torch.arange(130) // size * size]
    mask = random_mask(130, 5, padding)
    result = attend(form, query, key, value, scale=0.5, causal=causal, key_mask=mask)
    torch.testing.assert_close(result, dense(query, key, value, 0.5, causal, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_hierarchical_is_dense_within_two_blocks_and_not_beyond(causal):
    form = Hierarchical(16, 2)
    for length, equal in ((32, True), (49, False)):
        query, key, value = random_qkv(2, 2, length, length, 4)
        difference = attend(form, query, key, value, scale=0.5, causal=causal) - dense(query, key, value, 0.5, causal)
        assert (difference.abs().max() < 1e-12) == equal


@settings(max_examples=60, deadline=None)
@given(block=st.integers(1, 8), levels=st.integers(2, 5), length=st.integers(1, 200), causal=st.booleans())
def test_hierarchical_sees_every_key_once(block, levels, length, causal):
    form = Hierarchical(block, levels)
    levels_seen = form.level_of(length, causal)
    # With causality the rest of the query's own and the neighbouring block is hidden, and nothing else before it.
    assert ((levels_seen >= 0) == (np.tri(length, dtype=bool) if causal else True)).all()
    picture = form.picture(length, causal)
    # Every mean adds up to one score, so the picture's sum is the number of scores.
    assert picture.sum() == pytest.approx(form.scores(length, causal))
    assert form.cost(length, causal, 8).flops == 32 * (form.scores(length, causal) + length)


def test_hierarchical_grows_like_the_square_root_with_fitting_blocks():
    lengths = np.array([1024, 4096, 16384])
    flops = [Hierarchical(int((length / 3) ** 0.5), 2).cost(int(length), False, 64).flops for length in lengths]
    slope = np.polyfit(np.log(lengths), np.log(flops), 1)[0]
    assert 1.4 < slope < 1.55
    deep = [Hierarchical(64, levels).scores(65536, False) for levels in (2, 3, 4)]
    assert deep[0] > 2 * deep[1] > 2 * deep[2] * 1.2


def chunk_sets(form, position, length, causal):
    """Keys that each chunking shows to a query, from the text of the definition."""
    result = []
    for shift in (0,) if form.merge == "concat" else (0, form.size // 2):
        edges = range(-shift, length + form.size, form.size)
        start = max(edge for edge in edges if edge <= position)
        keys = set(range(max(start, 0), min(start + form.size, length))) | set(range(min(form.tokens, length)))
        if position < form.tokens:
            keys = set(range(length))
        result.append(sorted(key for key in keys if not causal or key <= position))
    return result


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12).map(lambda half: 2 * half),
    merge=st.sampled_from(["concat", "add", "gate"]),
    tokens=st.integers(0, 5),
    length=st.integers(1, 80),
    queries=st.integers(1, 80),
    causal=st.booleans(),
    padding=PADDINGS,
    gate=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_chunked_reference_is_its_definition(size, merge, tokens, length, queries, causal, padding, gate, seed):
    form, queries, scale = Chunked(size, merge, tokens), min(queries, length), 0.7
    query, key, value = random_qkv(2, 1, queries, length, seed)
    mask = random_mask(length, seed, padding)
    extras = {"gate": torch.tensor([0.0, gate], dtype=torch.float64)}
    result = attend(form, query, key, value, scale=scale, causal=causal, key_mask=mask, extras=extras)
    for batch, row in itertools.product(range(2), range(0, queries, max(1, queries // 12))):
        outputs, sums = [], []
        for keys in chunk_sets(form, length - queries + row, length, causal):
            kept = [k for k in keys if mask[batch, k]]
            scores = key[batch, 0, kept] @ query[batch, 1, row] * scale
            outputs.append(torch.softmax(scores, 0) @ value[batch, 0, kept])
            sums.append(float(scores.logsumexp(0)) if kept else -np.inf)
        if merge == "concat":
            wanted = outputs[0]
        elif merge == "add":
            wanted = (outputs[0] + outputs[1]) / 2
        else:
            weights = np.exp([sums[0] + gate, sums[1]] - np.float64(max(*sums, -1e9)))
            total = weights.sum()
            wanted = sum(w / total * y for w, y in zip(weights, outputs, strict=True)) if total else outputs[0] * 0
        torch.testing.assert_close(result[batch, 1, row], wanted, atol=1e-11, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 12).map(lambda half: 2 * half),
    merge=st.sampled_from(["concat", "add", "gate"]),
    tokens=st.integers(0, 30),
    length=st.integers(1, 80),
    causal=st.booleans(),
)
def test_chunked_cost_and_picture_count_what_is_seen(size, merge, tokens, length, causal):
    form = Chunked(size, merge, tokens)
    seen = np.zeros((length, length))
    for position in range(length):
        for keys in chunk_sets(form, position, length, causal):
            seen[position, keys] += 1
    assert form.scores(length, causal) == seen.sum()
    np.testing.assert_allclose(form.picture(length, causal), seen / len(form.shifts))


@pytest.mark.parametrize("causal", [False, True])
def test_chunked_concat_is_the_union_of_block_and_global(causal):
    query, key, value = random_qkv(2, 2, 75, 75, 6)
    mask = random_mask(75, 6, "holes")
    arguments = {"scale": 0.5, "causal": causal, "key_mask": mask}
    union = attend(parse_pattern("block:16|global:3"), query, key, value, **arguments)
    chunked = attend(parse_form("chunked:16:concat:3"), query, key, value, **arguments)
    torch.testing.assert_close(chunked, union, atol=1e-12, rtol=0)


def test_gate_starts_at_the_log_sum_exp_merge_and_can_be_learned():
    form = parse_form("chunked:16:gate")
    parameters = initial_parameters(form, 2, 2, 4, 0)
    assert set(parameters) == {"gate"} and not parameters["gate"].any()
    assert not initial_parameters(parse_form("chunked:16:add"), 2, 2, 4, 0)
    gate = torch.nn.Parameter(parameters["gate"].double())
    query, key, value = random_qkv(2, 2, 40, 40, 7)
    result = attend(form, query, key, value, scale=0.5, extras={"gate": gate})
    torch.testing.assert_close(result, attend(form, query, key, value, scale=0.5))
    result.square().sum().backward()
    assert gate.grad.abs().min() > 0
    preferred = attend(form, query, key, value, scale=0.5, extras={"gate": torch.full((2,), 60.0)})
    torch.testing.assert_close(preferred, attend(parse_form("chunked:16"), query, key, value, scale=0.5))


@pytest.mark.parametrize("text", ["hierarchical:8:3", "chunked:16:add:2", "chunked:16:gate", "dense-chunked:16"])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys_have_no_influence_and_gradients_are_finite(text, causal):
    form = parse_form(text)
    query, key, value = random_qkv(2, 2, 70, 70, 8)
    mask = random_mask(70, 8, "left")
    mask[1] = False
    hidden = ~mask[:, None, :, None]
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    result = attend(form, *inputs, scale=0.5, causal=causal, key_mask=mask)
    changed = attend(form, query, key + hidden * 7.0, value + hidden * 7.0, scale=0.5, causal=causal, key_mask=mask)
    torch.testing.assert_close(result, changed, atol=1e-12, rtol=0)
    assert not result[1].any()
    result.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)


@settings(max_examples=30, deadline=None)
@given(chunk=st.integers(1, 40), length=st.integers(1, 90), causal=st.booleans(), padding=PADDINGS)
def test_chunked_dense_is_dense(chunk, length, causal, padding):
    query, key, value = random_qkv(4, 2, max(1, length - 7), length, chunk)
    mask = random_mask(length, chunk, padding)
    form = parse_form(f"dense-chunked:{chunk}")
    result = attend(form, query, key, value, scale=0.5, causal=causal, key_mask=mask)
    torch.testing.assert_close(result, dense(query, key, value, 0.5, causal, mask), atol=1e-12, rtol=0)
    assert form.cost(length, causal, 8).flops == 32 * parse_pattern("dense").visible_pairs(length, causal)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("hierarchical", "hierarchical:64:2"),
        ("hierarchical:32", "hierarchical:32:2"),
        ("chunked", "chunked:512:concat"),
        ("chunked:64:gate:2", "chunked:64:gate:2"),
        ("chunked:64:add:0", "chunked:64:add"),
        ("dense-chunked", "dense-chunked:64"),
    ],
)
def test_text_forms(text, canonical):
    assert str(parse_form(text)) == canonical
    assert parse_form(canonical) == parse_form(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hierarchical:64:1", "two levels"),
        ("hierarchical:0", "at least 1"),
        ("hierarchical:64:2:3", "too many"),
        ("hierarchical:64:99", "more levels"),
        ("chunked:64:gat", "gat"),
        ("chunked:63:add", "odd"),
        ("chunked:64:add:x", "whole number"),
        ("chunked:64:add:1:2", "too many"),
        ("dense-chunked:0", "at least 1"),
        ("hierarchical|local:4", "joined"),
    ],
)
def test_refusals_name_what_is_wrong(text, named):
    with pytest.raises(UsageError, match=named) as raised:
        parse_form(text)
    assert raised.value.remedy
    assert FANOUT == 4
