"""Nyström attention and Linformer: reference and ONNX body against their definitions and against dense attention."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from attention_cases import expected, one_node_model, random_inputs, session
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.nystromformer.configuration_nystromformer import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from effc.errors import PreconditionError, UsageError
from effc.plugins.bodies import body_text
from effc.plugins.forms.low_rank import RIDGE, Linformer, Nystrom
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import DENSE
from effc.plugins.reference import attend, initial_parameters
from effc.plugins.reference.nystrom import cholesky_solve, newton_solve, segment_means

DIM = 8
MAX_LENGTH = 640
TEXTS = ["nystrom:16", "nystrom:16:cholesky", "nystrom:64", f"linformer:40:{MAX_LENGTH}"]
LENGTHS = st.one_of(st.sampled_from([1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 640]), st.integers(1, 640))
PADDINGS = st.sampled_from(["none", "left", "right", "holes", "all"])
HEADS = st.sampled_from([(2, 2), (4, 2), (3, 1)])


def geometry(text, heads=2, kv_heads=2):
    return AttentionGeometry(parse_form(text), False, heads, kv_heads, DIM, 0.5)


def tolerance(g):
    """What fp32 may lose.

    Newton's iteration multiplies matrices whose entries reach 15 some twenty times. The normal equations square the
    condition of the landmark matrix: rounding errors of 6e-8 are amplified by at most 1 / RIDGE, seen up to 2e-5.
    """
    if not isinstance(g.form, Nystrom):
        return 1e-5
    return 3e-5 if g.form.method == "newton" else 6e-8 / RIDGE


def trained(form, heads, kv_heads):
    """Parameters of both signs that are not the ones to start from."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in initial_parameters(form, heads, kv_heads, DIM, seed=0).items()
    }


def arrays(g):
    return {name: tensor.numpy() for name, tensor in trained(g.form, g.num_heads, g.kv_heads).items()}


@cache
def body_session(g, masked):
    return session(one_node_model(g, masked, arrays(g)))


@settings(max_examples=100, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    heads=HEADS,
    batch=st.integers(1, 3),
    length=LENGTHS,
    padding=PADDINGS,
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_body_equals_the_float64_reference(text, heads, batch, length, padding, seed, data):
    g = geometry(text, *heads)
    queries = data.draw(st.one_of(st.just(length), st.integers(1, length), st.just(length + 30)), "queries")
    feed = random_inputs(g, batch, queries, length, seed, padding)
    result = body_session(g, True).run(None, feed | arrays(g))[0]
    wanted = expected(g, feed, arrays(g))
    np.testing.assert_allclose(result, wanted, atol=tolerance(g) * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("length", [1, 64, 333])
def test_body_without_a_mask_input(text, length):
    g = geometry(text, 4, 2)
    feed = random_inputs(g, 2, length, length, 0, "none")
    unmasked = {name: array for name, array in feed.items() if name != "key_mask"}
    result = body_session(g, False).run(None, unmasked | arrays(g))[0]
    np.testing.assert_allclose(result, expected(g, feed, arrays(g)), atol=2 * tolerance(g))


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["nystrom:64", "nystrom:64:cholesky"]),
    heads=HEADS,
    length=st.integers(1, 64),
    padding=PADDINGS,
    seed=st.integers(0, 99),
)
def test_nystrom_is_dense_attention_up_to_as_many_tokens_as_landmarks(text, heads, length, padding, seed):
    g = geometry(text, *heads)
    feed = random_inputs(g, 2, length, length, seed, padding)
    wanted = expected(AttentionGeometry(DENSE, False, *heads, DIM, g.scale), feed)
    np.testing.assert_allclose(expected(g, feed), wanted, atol=1e-12)
    np.testing.assert_allclose(body_session(g, True).run(None, feed)[0], wanted, atol=1e-5)


def test_few_visible_tokens_of_a_long_padded_row_are_dense_too_beside_a_full_row():
    g = geometry("nystrom:16")
    feed = random_inputs(g, 2, 300, 300, 0, "none")
    feed["key_mask"][0, :] = False
    feed["key_mask"][0, 50:250:20] = True
    wanted = expected(AttentionGeometry(DENSE, False, 2, 2, DIM, g.scale), feed)
    result = body_session(g, True).run(None, feed)[0]
    np.testing.assert_allclose(result[0], wanted[0], atol=1e-5)
    assert np.abs(result[1] - wanted[1]).max() > 1e-3


def test_nystrom_equals_transformers_where_segments_are_equal():
    config = NystromformerConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_landmarks=16,
        segment_means_seq_len=96,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    layer = NystromformerSelfAttention(config).double().eval()
    # Otherwise it normalises all heads by the largest one; the convolution is not part of the form.
    layer.init_option, layer.conv_kernel_size = "exact", None
    hidden = 3 * torch.randn(2, 96, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(hidden)[0]
        query, key, value = (
            projection(hidden).view(2, 96, 2, 8).transpose(1, 2) for projection in (layer.query, layer.key, layer.value)
        )
        result = attend(Nystrom(16), query, key, value, scale=8**-0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["nystrom:16", "nystrom:16:cholesky"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(text, side):
    """The result of the visible tokens is that of the same tokens without padding."""
    g = geometry(text)
    bare = random_inputs(g, 1, 90, 90, 0, "none")
    places = {
        "left": np.arange(110, 200),
        "right": np.arange(90),
        "holes": np.sort(np.random.default_rng(0).permutation(200)[:90]),
    }[side]
    padded = random_inputs(g, 1, 200, 200, 1, "none")
    padded["key_mask"][:] = False
    padded["key_mask"][:, places] = True
    for name in ("query", "key", "value"):
        padded[name][:, places] = bare[name]
    np.testing.assert_allclose(expected(g, padded)[:, places], expected(g, bare), atol=1e-12)
    result = body_session(g, True).run(None, padded)[0]
    np.testing.assert_allclose(result[:, places], body_session(g, True).run(None, bare)[0], atol=2 * tolerance(g))


@pytest.mark.parametrize("text", TEXTS)
def test_hidden_keys_have_no_influence(text):
    g = geometry(text)
    feed = random_inputs(g, 2, 200, 200, 3, "holes")
    before, reference = body_session(g, True).run(None, feed | arrays(g))[0], expected(g, feed, arrays(g))
    for name in ("key", "value"):
        feed[name][~feed["key_mask"]] = 50.0
    np.testing.assert_array_equal(before, body_session(g, True).run(None, feed | arrays(g))[0])
    np.testing.assert_array_equal(reference, expected(g, feed, arrays(g)))


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_visible_gives_zeros(text):
    g = geometry(text)
    feed = random_inputs(g, 2, 100, 100, 3, "none")
    feed["key_mask"][0] = False
    result = body_session(g, True).run(None, feed | arrays(g))[0]
    assert not result[0].any()
    assert result[1].any()


def test_segments_differ_by_one_token_at_most():
    visible = torch.tensor([[True] * 10 + [False] * 7, [False, True] * 8 + [True]])
    means = segment_means(visible, 4)
    torch.testing.assert_close(means.sum(-1), torch.ones(2, 4))
    sizes = (means > 0).sum(-1)
    assert sizes.max() - sizes.min() == 1
    assert not means[~visible[:, None, :].expand(means.shape)].any()
    # In order: the last token of one segment comes before the first of the next.
    assert means[0].argmax(-1).tolist() == sorted(means[0].argmax(-1).tolist())


def test_more_landmarks_come_closer_to_the_softmax():
    generator = torch.Generator().manual_seed(0)
    # Smooth in position, as neighbouring tokens of a text are alike; means of white noise would tell nothing.
    noise = torch.randn(3, 1, 2, 512, DIM, generator=generator, dtype=torch.float64)
    query, key, value = torch.cumsum(noise, dim=-2) / 8
    softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = [
        float((attend(Nystrom(m), query, key, value, scale=DIM**-0.5) - softmax).square().mean()) for m in (2, 8, 32)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_both_solvers_against_the_pseudo_inverse():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.softmax(5 * torch.eye(24) + torch.randn(3, 24, 24, generator=generator) / 2, -1).double()
    right = torch.randn(3, 24, 5, generator=generator, dtype=torch.float64)
    wanted = torch.linalg.pinv(matrix) @ right
    assert (newton_solve(matrix, right) - wanted).norm() < 1e-9 * wanted.norm()
    assert (cholesky_solve(matrix, right) - wanted).norm() < 0.02 * wanted.norm()
    ridged = torch.linalg.solve(matrix.mT @ matrix + RIDGE * torch.eye(24), matrix.mT @ right)
    torch.testing.assert_close(cholesky_solve(matrix, right), ridged)


def test_linformer_of_whole_length_is_the_papers_formula():
    form, generator = Linformer(10, 40), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 40, DIM, generator=generator, dtype=torch.float64)
    extras = {name: torch.randn(10, 40, generator=generator, dtype=torch.float64) for name in form.extra_inputs}
    keys, values = extras["key_projection"] @ key, extras["value_projection"] @ value
    wanted = torch.softmax(query @ keys.transpose(-1, -2) * 0.4, -1) @ values
    torch.testing.assert_close(attend(form, query, key, value, scale=0.4, extras=extras), wanted)


def test_linformer_starts_as_attention_to_segment_means_of_what_is_visible():
    form, generator = Linformer(16, 64), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 50, DIM, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 50, dtype=torch.bool)
    mask[:, 47:] = False
    extras = initial_parameters(form, 2, 2, DIM, 0)
    # Segments of four: eleven whole ones and one of three tokens.
    keys, values = (
        torch.stack([part.mean(dim=2) for part in states[:, :, :47].split(4, dim=2)], dim=2) for states in (key, value)
    )
    wanted = torch.softmax(query @ keys.transpose(-1, -2) * 0.4, -1) @ values
    result = attend(form, query, key, value, scale=0.4, key_mask=mask, extras=extras)
    torch.testing.assert_close(result, wanted, atol=1e-6, rtol=0)


def test_linformer_refuses_longer_inputs():
    form = Linformer(4, 20)
    extras = initial_parameters(form, 2, 2, DIM, 0)
    with pytest.raises(PreconditionError, match="20 positions; this input has 21"):
        attend(form, *torch.randn(3, 1, 2, 21, DIM), scale=1.0, extras=extras)
    g = AttentionGeometry(form, False, 2, 2, DIM, 1.0)
    feed = random_inputs(g, 1, 21, 21, 0, "none")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="20 by 21"):
        session(one_node_model(g, True, arrays(g))).run(None, feed | arrays(g))
    assert form.max_length == 20


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_are_finite_and_reach_everything(text):
    g = geometry(text, 4, 2)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 100, DIM, generator=generator, requires_grad=True)
    key, value = (torch.randn(2, 2, 100, DIM, generator=generator, requires_grad=True) for _ in range(2))
    extras = {name: t.requires_grad_() for name, t in trained(g.form, 4, 2).items()}
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, 95:] = False
    mask[1, 5:] = False
    output = attend(g.form, query, key, value, scale=0.5, key_mask=mask, extras=extras)
    for gradient in torch.autograd.grad(output.square().sum(), [query, key, value, *extras.values()]):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("text", TEXTS)
def test_causal_is_refused(text):
    form = parse_form(text)
    assert not form.supports_causal
    causal = AttentionGeometry(form, True, 2, 2, DIM, 1.0)
    with pytest.raises(PreconditionError, match="no causal form"):
        body_text(form, causal, frozenset(form.extra_inputs))
    with pytest.raises(PreconditionError, match="no causal form"):
        attend(form, *torch.randn(3, 1, 2, 4, DIM), scale=1.0, causal=True)


def test_text_forms():
    assert str(parse_form("nystrom")) == "nystrom:64"
    assert str(parse_form("nystrom:32:newton")) == "nystrom:32"
    assert str(parse_form("linformer")) == "linformer:256:512"
    assert str(parse_form("linformer:64")) == "linformer:64:512"
    for text in TEXTS:
        assert str(parse_form(text)) == text
    assert not parse_form("nystrom").needs_recovery
    assert parse_form("linformer").needs_recovery


@pytest.mark.parametrize(
    "text",
    [
        "nystrom:0",
        "nystrom:8:qr",
        "nystrom:8:newton:1",
        "linformer:0",
        "linformer:600:512",
        "linformer:1:1",
        "linformer:1:2:3",
    ],
)
def test_wrong_text_is_refused(text):
    with pytest.raises(UsageError):
        parse_form(text)


def test_missing_parameters_are_named():
    g = geometry("linformer")
    with pytest.raises(PreconditionError, match="key_projection"):
        body_text(g.form, g, frozenset())
    with pytest.raises(PreconditionError, match="key_projection"):
        attend(g.form, *torch.randn(3, 1, 2, 4, DIM), scale=1.0)


def test_cost_counted_by_hand():
    assert Nystrom(64).cost(64, False, 32).flops == 4 * 64 * 64 * 32
    # Two poolings and two thin attentions of two products each; the pseudo-inverse; its product with 64 values.
    assert Nystrom(64).cost(1000, False, 32).flops == (6 * 2 * 1000 * 64 * 32 + 24 * 2 * 64**3 + 2 * 64 * 64 * 32)
    # Keys and values projected, then two products.
    assert Linformer(32, 512).cost(500, False, 64).flops == 4 * 2 * 500 * 32 * 64


def test_pictures_are_one_shade():
    assert np.unique(Nystrom(4).picture(5, False)).tolist() == [0.3]
