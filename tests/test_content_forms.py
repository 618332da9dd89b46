"""Content-based forms: their definitions, and their function bodies against the float64 reference.

A choice by scores is not continuous: where two scores are closer than fp32 can tell, fp32 and fp64 may choose
differently and both be right. The property tests therefore draw queries and keys of small whole numbers, whose products
and sums are exact in both, so that the choices must agree, ties included.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import expected, one_node_model, random_inputs, session
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.errors import UsageError
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import DENSE
from effc.plugins.reference import attend, initial_parameters
from effc.plugins.reference.dynamic import importance

# A scale that is a power of two keeps scaled scores exact.
GEOMETRIES = [
    AttentionGeometry(parse_form(text), causal, heads, kv_heads, dim, dim**-0.5)
    for text, causal, heads, kv_heads, dim in [
        ("topk:1", False, 2, 2, 4),
        ("topk:7", True, 4, 2, 16),
        ("topk:64", False, 4, 1, 16),
        ("topk-blocks:2:8", True, 4, 2, 16),
        ("topk-blocks:3:16", False, 2, 2, 16),
        ("topk-blocks:4:5", True, 2, 1, 4),
        ("topk-blocks", False, 4, 2, 16),
        ("topk-blocks", True, 2, 2, 4),
        ("dynamic:1:0", True, 2, 2, 4),
        ("dynamic:20:0", False, 4, 2, 16),
        ("dynamic:33:64", True, 4, 2, 16),
        ("dynamic", False, 2, 1, 4),
        ("dynamic:100:128", True, 2, 2, 16),
    ]
]
DYNAMIC = [geometry for geometry in GEOMETRIES if str(geometry.form).startswith("dynamic")]
PADDINGS = ["none", "left", "right", "holes", "all"]
LENGTHS = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193]), st.integers(1, 700))
_sessions = {}


def body_session(geometry, masked, extras=None):
    key = (geometry, masked, tuple(extras or ()))
    if key not in _sessions:
        _sessions[key] = session(one_node_model(geometry, masked, extras))
    return _sessions[key]


def whole_numbers(geometry, batch, queries, keys, seed, padding, largest=2):
    feed = random_inputs(geometry, batch, queries, keys, seed, padding)
    for name in ("query", "key"):
        feed[name] = np.clip(np.round(feed[name]), -largest, largest).astype(np.float32)
    return feed


@settings(max_examples=70, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    batch=st.integers(1, 3),
    length=LENGTHS,
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 99),
)
def test_body_equals_the_float64_reference(geometry, batch, length, padding, seed):
    feed = whole_numbers(geometry, batch, length, length, seed, padding)
    result = body_session(geometry, True).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    keys=LENGTHS,
    share=st.floats(0, 1),
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 99),
)
def test_queries_are_the_last_positions(geometry, keys, share, padding, seed):
    queries = 1 + int(share * (keys - 1))
    feed = whole_numbers(geometry, 2, queries, keys, seed, padding)
    result = body_session(geometry, True).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(geometry=st.sampled_from(DYNAMIC), length=LENGTHS, padding=st.sampled_from(PADDINGS), seed=st.integers(0, 99))
def test_body_with_a_scorer(geometry, length, padding, seed):
    feed = whole_numbers(geometry, 2, length, length, seed, padding)
    numbers = np.random.default_rng(seed).integers(-2, 3, (geometry.kv_heads, geometry.head_dim + 1))
    extras = {"scorer": numbers.astype(np.float32)}
    result = body_session(geometry, True, extras).run(None, feed | extras)[0]
    np.testing.assert_allclose(result, expected(geometry, feed, extras), atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.overload(frozenset()))
@pytest.mark.parametrize("length", [1, 40, 333])
def test_body_without_a_mask_input(geometry, length):
    feed = whole_numbers(geometry, 2, length, length, 0, "none")
    unmasked = {name: array for name, array in feed.items() if name != "key_mask"}
    result = body_session(geometry, False).run(None, unmasked)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.overload(frozenset()))
def test_body_of_real_numbers(geometry):
    """Of these inputs no two scores at the edge of a choice are close enough for fp32 to confuse them."""
    feed = random_inputs(geometry, 1, 300, 300, 3, "right")
    result = body_session(geometry, True).run(None, feed)[0]
    np.testing.assert_allclose(result, expected(geometry, feed), atol=1e-5)


def states(heads, kv_heads, queries, keys, dim=16, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def weights_of(form, query, key, **options):
    """Attention weights ``[batch, heads, queries, keys]``: what comes out where value j is the j-th unit vector."""
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return attend(form, query, key, identity, scale=options.pop("scale", 0.25), **options)


@pytest.mark.parametrize("text", ["topk:200", "topk-blocks:4:64", "topk-blocks:25:8", "dynamic:200:0", "dynamic:1:192"])
@pytest.mark.parametrize("causal", [False, True])
def test_large_enough_is_dense(text, causal):
    inputs = states(4, 2, 150, 200)
    mask = torch.arange(200) >= torch.tensor([[0], [30]])
    options = {"scale": 0.25, "causal": causal, "key_mask": mask}
    result = attend(parse_form(text), *inputs, **options)
    torch.testing.assert_close(result, attend(DENSE, *inputs, **options), atol=1e-12, rtol=0)


@pytest.mark.parametrize("text", ["topk:9", "topk-blocks:3:16", "topk-blocks:4:64", "dynamic:20:0", "dynamic:9:64"])
def test_no_output_depends_on_what_comes_behind(text):
    query, key, value = states(4, 2, 400, 400)
    form = parse_form(text)
    result = attend(form, query, key, value, scale=0.25, causal=True)
    for kept in (1, 17, 64, 65, 250):
        other = [
            torch.cat([x[:, :, :kept], y[:, :, kept:]], 2)
            for x, y in zip((query, key, value), states(4, 2, 400, 400, seed=1), strict=True)
        ]
        changed = attend(form, *other, scale=0.25, causal=True)
        torch.testing.assert_close(changed[:, :, :kept], result[:, :, :kept], atol=1e-12, rtol=0)


@pytest.mark.parametrize("text", ["topk:9", "topk-blocks:3:16", "dynamic:20:0"])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys_have_no_influence(text, causal):
    query, key, value = states(4, 2, 200, 200)
    visible = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.6
    options = {"scale": 0.25, "causal": causal, "key_mask": visible}
    result = attend(parse_form(text), query, key, value, **options)
    hidden = ~visible[:, None, :, None]
    # Queries of padding stand for nothing either: they must not sway a block's choice.
    other = [x.masked_fill(hidden, 5.0) for x in (query, key, value)]
    changed = attend(parse_form(text), *other, **options)
    torch.testing.assert_close(changed * ~hidden, result * ~hidden, atol=1e-12, rtol=0)


def test_topk_keeps_exactly_the_strongest():
    query, key, _ = states(2, 1, 50, 90)
    weights = weights_of(parse_form("topk:7"), query, key)
    assert torch.equal((weights > 0).sum(-1), torch.full(weights.shape[:3], 7))
    scores = query @ key.transpose(-1, -2)
    weakest_kept = scores.masked_fill(weights == 0, torch.inf).amin(-1)
    assert (weakest_kept >= scores.masked_fill(weights > 0, -torch.inf).amax(-1)).all()
    early = weights_of(parse_form("topk:7"), query, key[:, :, :50], causal=True)
    assert torch.equal((early > 0).sum(-1)[0, 0], torch.arange(1, 51).clamp_max(7))


def test_topk_breaks_ties_by_position():
    query, key, _ = states(1, 1, 30, 30)
    weights = weights_of(parse_form("topk:4"), query, torch.zeros_like(key))
    assert torch.equal(weights, torch.full_like(weights, 0.25) * (torch.arange(30) < 4))


@pytest.mark.parametrize("causal", [False, True])
def test_block_choice_holds_the_own_and_the_first_block(causal):
    query, key, _ = states(2, 2, 160, 160)
    padded = torch.arange(160).expand(2, -1) >= 20
    seen = weights_of(parse_form("topk-blocks:3:16"), query, key, causal=causal, key_mask=padded) > 0
    blocks = seen[..., 20:, :].unflatten(-1, (10, 16)).any(-1)
    own = torch.arange(20, 160) // 16
    assert blocks[:, :, torch.arange(140), own].all()
    # Positions 0 to 19 are padding, so that the second block is the first that holds anything.
    assert blocks[..., 1].all() and not blocks[..., 0].any()
    assert int(blocks.sum(-1).max()) == 3


def test_block_choice_is_the_best_by_means_and_shared_in_a_group():
    query, key, _ = states(4, 2, 96, 96)
    seen = weights_of(parse_form("topk-blocks:3:16"), query, key) > 0
    blocks = seen.unflatten(-1, (6, 16)).any(-1).unflatten(2, (6, 16)).any(3)
    assert torch.equal(blocks[:, 0::2], blocks[:, 1::2])
    pooled = query.unflatten(1, (2, 2)).unflatten(3, (6, 16)).mean(dim=(2, 4))
    scores = pooled @ key.unflatten(2, (6, 16)).mean(dim=3).transpose(-1, -2)
    for block in range(1, 6):
        others = [number for number in range(1, 6) if number != block]
        best = torch.tensor(others)[scores[:, :, block, others].argmax(-1)]
        assert blocks[:, 0::2, block].gather(-1, best[..., None]).all()


def test_dynamic_is_exact_where_the_keys_of_a_block_are_equal():
    query, key, value = states(4, 2, 330, 330)
    key = key[:, :, torch.arange(330) // 64 * 64]
    mask = torch.arange(330) >= torch.tensor([[0], [70]])
    for causal in (False, True):
        options = {"scale": 0.25, "causal": causal, "key_mask": mask}
        result = attend(parse_form("dynamic:3:0"), query, key, value, **options)
        torch.testing.assert_close(result, attend(DENSE, query, key, value, **options), atol=1e-12, rtol=0)


def test_dynamic_decodes_what_the_whole_gives():
    query, key, value = states(4, 2, 300, 300)
    form = parse_form("dynamic:12:64")
    whole = attend(form, query, key, value, scale=0.25, causal=True)
    for last in (0, 63, 64, 128, 200, 299):
        step = [query[:, :, last : last + 1], key[:, :, : last + 1], value[:, :, : last + 1]]
        one = attend(form, *step, scale=0.25, causal=True)
        torch.testing.assert_close(one, whole[:, :, last : last + 1], atol=1e-12, rtol=0)


def test_scorer_decides_which_keys_are_exact():
    query, key, _ = states(1, 1, 320, 320)
    form = parse_form("dynamic:5:0")
    scorer = torch.zeros(1, 17)
    scorer[0, 3] = 1.0
    strongest = torch.topk(key[0, 0, :, 3], 5).indices
    weights = weights_of(form, query[:, :, :64], key, extras={"scorer": scorer})[0, 0]
    scores = (query[0, 0, :64] @ key[0, 0].T) * 0.25
    # Exact weights are in the ratio of their exponentials; all others of a block are alike.
    far = strongest[strongest < 256]
    ratio = weights[:, far] / weights[:, 256:257]
    torch.testing.assert_close(ratio, torch.exp(scores[:, far] - scores[:, 256:257]))
    others = [number for number in range(64) if number not in strongest.tolist()]
    assert torch.equal(weights[:, others], weights[:, others[:1]].expand(-1, len(others)))


def test_scorer_starts_from_small_norms():
    form = parse_form("dynamic")
    start = initial_parameters(form, 4, 2, 16, 0)["scorer"]
    key = states(4, 2, 50, 50)[1]
    torch.testing.assert_close(importance(key, start), -key.square().sum(-1))
    torch.testing.assert_close(importance(key, None), importance(key, start))


@pytest.mark.parametrize("text", ["topk:9", "topk-blocks:3:16", "dynamic:20:0"])
def test_reference_is_differentiable(text):
    inputs = [tensor.requires_grad_() for tensor in states(2, 1, 130, 130, dim=4, batch=1)]
    attend(parse_form(text), *inputs, scale=0.5, causal=True).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("topk", "topk:64"),
        ("topk-blocks", "topk-blocks:8:64"),
        ("topk-blocks:4", "topk-blocks:4:64"),
        ("dynamic", "dynamic:256:64"),
        ("dynamic:9:65", "dynamic:9:128"),
        ("dynamic:9:0", "dynamic:9:0"),
    ],
)
def test_text_form(text, canonical):
    assert str(parse_form(text)) == canonical
    assert parse_form(canonical) == parse_form(text)


@pytest.mark.parametrize(
    "text",
    [
        "topk:0",
        "topk:x",
        "topk:1:2",
        "topk-blocks:1",
        "topk-blocks:4:0",
        "topk-blocks:1:2:3",
        "dynamic:0",
        "dynamic:4:-1",
        "topk|local:4",
    ],
)
def test_bad_text(text):
    with pytest.raises(UsageError):
        parse_form(text)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 50, 64, 200, 333])
def test_cost_counts_the_pairs(length, causal):
    query, key, _ = states(1, 1, length, length, dim=8)
    pairs = length * (length + 1) // 2 if causal else length * length
    kept = int((weights_of(parse_form("topk:9"), query, key, causal=causal)[0] > 0).sum())
    assert parse_form("topk:9").cost(length, causal, 8).flops == 2 * 8 * (pairs + kept)

    form = parse_form("topk-blocks:3:16")
    chosen = int((weights_of(form, query, key, causal=causal)[0] > 0).sum())
    blocks = -(-length // 16)
    pooled = 2 * 8 * (2 * length + (blocks * (blocks + 1) // 2 if causal else blocks * blocks))
    counted = form.cost(length, causal, 8).flops - pooled
    # Bidirectional queries compute the empty end of the last block too, where it is chosen.
    assert 4 * 8 * chosen <= counted <= 4 * 8 * (chosen + (0 if causal else 15 * length))


@pytest.mark.parametrize("text", ["topk-blocks", "dynamic"])
@pytest.mark.parametrize("causal", [False, True])
def test_cost_grows_linearly(text, causal):
    short, long = (parse_form(text).cost(length, causal, 64).flops for length in (8192, 16384))
    assert long < 2.6 * short
    assert short < 0.15 * DENSE.cost(8192, causal, 64).flops
