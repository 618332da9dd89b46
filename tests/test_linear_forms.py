"""Linear attention: the chunked form, the recurrence and the ONNX statements against the quadratic definition."""

from __future__ import annotations

from functools import cache

import attention_cases
import numpy as np
import onnxruntime
import pytest
import torch
from attention_cases import expected, one_node_model, random_inputs, session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker, parser

from effc.errors import PreconditionError, UsageError
from effc.plugins.bodies import OPSET, body_text
from effc.plugins.bodies.linear_state import recurrent_text, step_text
from effc.plugins.forms.linear import CAUSAL_CHUNK, EMPTY_STABILISER, Hedgehog, Linear, Performer
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry
from effc.plugins.reference import attend, initial_parameters
from effc.plugins.reference.linear import attend_from_state, decode_step, initial_state, quadratic_attention
from effc.plugins.reference.performer import orthogonal_features

TEXTS = ["linear:elu", "linear:relu", "performer:48", "hedgehog"]
DIM = 8
CHUNK = CAUSAL_CHUNK
LENGTHS = st.one_of(
    st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 511, 512, 513, 4 * CHUNK + 1]), st.integers(1, 700)
)
PADDINGS = st.sampled_from(["none", "left", "right", "holes", "all"])
HEADS = st.sampled_from([(2, 2), (4, 2), (3, 1)])


def geometry(text, causal, heads, kv_heads):
    # A scale other than head_dim ** -0.5 shows where it is forgotten.
    return AttentionGeometry(parse_form(text), causal, heads, kv_heads, DIM, 0.6)


def trained(form, heads, kv_heads):
    """Parameters that are not the ones to start from."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in initial_parameters(form, heads, kv_heads, DIM, seed=4).items()
    }


def arrays(g):
    return {name: tensor.numpy() for name, tensor in trained(g.form, g.num_heads, g.kv_heads).items()}


def doubles(feed, g):
    def split(name, heads):
        tensor = torch.from_numpy(feed[name]).double()
        return tensor.view(*tensor.shape[:2], heads, DIM).transpose(1, 2)

    return split("query", g.num_heads), split("key", g.kv_heads), split("value", g.kv_heads)


def definition(g, feed):
    extras = {name: tensor.double() for name, tensor in trained(g.form, g.num_heads, g.kv_heads).items()}
    mask = torch.from_numpy(feed["key_mask"])
    return quadratic_attention(
        g.form, *doubles(feed, g), scale=g.scale, causal=g.causal, key_mask=mask, extras=extras
    ).transpose(1, 2)


@cache
def body_session(g, masked):
    return session(one_node_model(g, masked, arrays(g)))


@settings(max_examples=100, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    causal=st.booleans(),
    heads=HEADS,
    batch=st.integers(1, 3),
    length=LENGTHS,
    padding=PADDINGS,
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_reference_and_body_equal_the_definition(text, causal, heads, batch, length, padding, seed, data):
    g = geometry(text, causal, *heads)
    queries = data.draw(st.one_of(st.just(length), st.integers(1, length)), "queries")
    feed = random_inputs(g, batch, queries, length, seed, padding)
    wanted = definition(g, feed).flatten(2).numpy()
    np.testing.assert_allclose(expected(g, feed, arrays(g)), wanted, atol=1e-10)
    result = body_session(g, True).run(None, feed | arrays(g))[0]
    np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (333, 333), (140, 600)])
def test_body_without_a_mask_input(text, causal, queries, keys):
    g = geometry(text, causal, 4, 2)
    feed = random_inputs(g, 2, queries, keys, 0, "none")
    mask = feed.pop("key_mask")
    result = body_session(g, False).run(None, feed | arrays(g))[0]
    np.testing.assert_allclose(result, definition(g, feed | {"key_mask": mask}).flatten(2), atol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_the_first_query_of_a_bidirectional_layer_may_come_from_a_longer_text(text):
    g = geometry(text, False, 2, 2)
    feed = random_inputs(g, 2, 90, 30, 0, "right")
    result = body_session(g, True).run(None, feed | arrays(g))[0]
    np.testing.assert_allclose(result, definition(g, feed).flatten(2), atol=1e-5)


def test_definition_of_elu_spelled_out():
    form, generator = Linear("elu"), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 5, DIM, generator=generator, dtype=torch.float64)
    weights = (torch.nn.functional.elu(query) + 1) @ (torch.nn.functional.elu(key) + 1).transpose(-1, -2)
    wanted = (weights / weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(quadratic_attention(form, query, key, value, scale=0.3), wanted)


def test_definition_of_hedgehog_at_the_start_spelled_out():
    form, generator = Hedgehog(), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, DIM, generator=generator, dtype=torch.float64)
    maps = [torch.softmax(torch.cat([x, -x], -1), -1) for x in (query, key)]
    weights = maps[0] @ maps[1].transpose(-1, -2)
    wanted = (weights / weights.sum(-1, keepdim=True)) @ value
    extras = initial_parameters(form, 2, 2, DIM, 0)
    torch.testing.assert_close(quadratic_attention(form, query, key, value, scale=0.3, extras=extras), wanted)


def test_definition_of_performer_spelled_out():
    form, generator = Performer(16), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, DIM, generator=generator, dtype=torch.float64)
    extras = initial_parameters(form, 2, 2, DIM, 0)
    features = extras["features"].double()
    maps = [
        torch.exp(x @ features.T - x.square().sum(-1, keepdim=True) / 2) / 4 for x in (query * 0.3**0.5, key * 0.3**0.5)
    ]
    weights = maps[0] @ maps[1].transpose(-1, -2)
    wanted = (weights / weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(quadratic_attention(form, query, key, value, scale=0.3, extras=extras), wanted)


def test_more_random_features_come_closer_to_the_softmax():
    generator = torch.Generator().manual_seed(0)
    # Small scores: the variance of the estimate grows with their exponential.
    query, key, value = 0.5 * torch.randn(3, 1, 2, 60, DIM, generator=generator, dtype=torch.float64)
    softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = []
    for count in (16, 256, 4096):
        form = Performer(count)
        extras = initial_parameters(form, 2, 2, DIM, 0)
        errors.append(
            float((attend(form, query, key, value, scale=DIM**-0.5, extras=extras) - softmax).square().mean())
        )
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_random_features_are_orthogonal_and_as_long_as_gaussian_vectors():
    features = orthogonal_features(100, 64, seed=7)
    assert features.shape == (100, 64)
    torch.testing.assert_close(features, orthogonal_features(100, 64, seed=7))
    assert not torch.equal(features, orthogonal_features(100, 64, seed=8))
    products = features[:64].double() @ features[:64].double().T
    assert float((products - products.diag().diag()).abs().max()) < 1e-4
    squares = orthogonal_features(6400, 64, seed=0).square().sum(-1)
    assert abs(float(squares.mean()) - 64) < 1.0  # chi-squared of 64 degrees: standard error 0.14
    assert abs(float(squares.var()) - 128) < 12.0


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("causal", [False, True])
def test_large_and_distant_queries_and_keys_stay_finite_and_right(text, causal):
    """Exponents of hundreds, and keys whose features lie far below zero."""
    g = geometry(text, causal, 2, 2)
    feed = random_inputs(g, 1, 300, 300, 0, "holes")
    feed["query"] = feed["query"] * 6 - 4
    feed["key"][:, 150:] *= 8
    feed["key"] -= 3
    wanted = definition(g, feed).flatten(2)
    assert torch.isfinite(wanted).all()
    result = body_session(g, True).run(None, feed | arrays(g))[0]
    # Exponents are rounded at their own size: 6e-8 of some hundreds.
    np.testing.assert_allclose(result, wanted, atol=2e-4 if text.startswith("performer") else 1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_hidden_keys_have_no_influence(text, causal):
    g = geometry(text, causal, 2, 2)
    feed = random_inputs(g, 2, 200, 200, 3, "left")
    before = body_session(g, True).run(None, feed | arrays(g))[0]
    reference = expected(g, feed, arrays(g))
    for name in ("key", "value"):
        feed[name][~feed["key_mask"]] = 50.0
    np.testing.assert_array_equal(before, body_session(g, True).run(None, feed | arrays(g))[0])
    np.testing.assert_array_equal(reference, expected(g, feed, arrays(g)))


@pytest.mark.parametrize("text", TEXTS)
def test_what_lies_behind_a_causal_query_has_no_influence(text):
    """Not even through a stabiliser that is shared: a later key of huge exponent must not blur the earlier rows."""
    g = geometry(text, True, 2, 2)
    feed = random_inputs(g, 1, 200, 200, 3, "none")
    before = body_session(g, True).run(None, feed | arrays(g))[0]
    feed["key"][:, 100:] *= 30.0
    after = body_session(g, True).run(None, feed | arrays(g))[0]
    np.testing.assert_allclose(before[:, :100], after[:, :100], atol=1e-6)
    assert np.isfinite(after).all()


def test_a_row_without_common_features_gives_zeros():
    g = geometry("linear:relu", False, 1, 1)
    feed = random_inputs(g, 1, 20, 20, 0, "none")
    feed["query"][:, 3] = -1.0
    result = body_session(g, True).run(None, feed)[0]
    assert not result[:, 3].any()
    assert result[:, 4].any()


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_reach_everything_and_are_those_of_the_definition(text):
    g = geometry(text, True, 4, 2)
    feed = random_inputs(g, 2, 150, 170, 0, "left")
    mask = torch.from_numpy(feed["key_mask"])
    gradients = []
    for function in (attend, quadratic_attention):
        inputs = [tensor.clone().requires_grad_() for tensor in doubles(feed, g)]
        extras = {name: t.double().requires_grad_() for name, t in trained(g.form, 4, 2).items()}
        result = function(g.form, *inputs, scale=g.scale, causal=True, key_mask=mask, extras=extras)
        gradients.append(torch.autograd.grad(result.square().sum(), [*inputs, *extras.values()]))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def test_gradients_are_finite_where_a_row_has_no_features():
    query = torch.full((1, 1, 3, DIM), -1.0, requires_grad=True)
    key, value = torch.randn(2, 1, 1, 3, DIM, generator=torch.Generator().manual_seed(0))
    attend(Linear("relu"), query, key, value, scale=1.0, causal=True).sum().backward()
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_decoding_step_by_step_equals_the_causal_form(text, heads, kv_heads):
    g = geometry(text, True, heads, kv_heads)
    feed = random_inputs(g, 2, 150, 150, 5, "left")
    query, key, value = doubles(feed, g)
    mask = torch.from_numpy(feed["key_mask"])
    extras = {name: tensor.double() for name, tensor in trained(g.form, heads, kv_heads).items()}
    wanted = definition(g, feed).transpose(1, 2)
    prompt = 140
    state = initial_state(g.form, 2, kv_heads, DIM, torch.float64)
    first, state = attend_from_state(
        g.form,
        query[:, :, :prompt],
        key[:, :, :prompt],
        value[:, :, :prompt],
        state,
        scale=g.scale,
        key_mask=mask[:, :prompt],
        extras=extras,
    )
    torch.testing.assert_close(first, wanted[:, :, :prompt], atol=1e-10, rtol=0)
    for place in range(prompt, 150):
        step = slice(place, place + 1)
        output, state = decode_step(
            g.form, query[:, :, step], key[:, :, step], value[:, :, step], state, scale=g.scale, extras=extras
        )
        torch.testing.assert_close(output, wanted[:, :, step], atol=1e-10, rtol=0)
    shapes = g.form.state_shapes(kv_heads, DIM)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in state.items()} == shapes


def stateful_session(text, g, masked):
    """The statements of ``text`` as a graph of their own."""
    kv_width = g.kv_heads * DIM
    shapes = g.form.state_shapes(g.kv_heads, DIM)
    inputs = [f"float[batch, length, {g.num_heads * DIM}] query"]
    inputs += [f"float[batch, length, {kv_width}] {name}" for name in ("key", "value")]
    inputs += ["bool[batch, length] key_mask"] if masked else []
    inputs += [f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in arrays(g).items()]
    states = {name: f"float[batch, {', '.join(map(str, shape))}]" for name, shape in shapes.items()}
    inputs += [f"{kind} past_{name}" for name, kind in states.items()]
    outputs = [f"float[batch, length, {g.num_heads * DIM}] output"]
    outputs += [f"{kind} present_{name}" for name, kind in states.items()]
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {OPSET}]>\n'
        f"stateful ({', '.join(inputs)}) => ({', '.join(outputs)}) {{{text}}}"
    )
    checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_onnx_prefill_and_steps_equal_the_causal_form(text, heads, kv_heads, masked):
    g = geometry(text, True, heads, kv_heads)
    present = frozenset(arrays(g)) | ({"key_mask"} if masked else frozenset())
    prefill = stateful_session(recurrent_text(g, present), g, masked)
    step = stateful_session(step_text(g, present), g, masked)
    feed = random_inputs(g, 2, 150, 150, 5, "left" if masked else "none")
    wanted = definition(g, feed).flatten(2).numpy()
    if not masked:
        feed.pop("key_mask")
    names = list(g.form.state_shapes(kv_heads, DIM))
    state = {f"past_{name}": tensor.numpy() for name, tensor in initial_state(g.form, 2, kv_heads, DIM).items()}
    start = 0
    for count in (131, 9, *[1] * 10):
        part = {name: array[:, start : start + count] for name, array in feed.items()}
        runner = step if count == 1 else prefill
        output, *after = runner.run(None, part | arrays(g) | state)
        np.testing.assert_allclose(output, wanted[:, start : start + count], atol=1e-5)
        state = {f"past_{name}": array for name, array in zip(names, after, strict=True)}
        start += count


def test_the_state_before_the_first_token():
    state = initial_state(Performer(16), 2, 3, DIM)
    assert state["stabiliser"].eq(EMPTY_STABILISER).all()
    assert not state["state"].any()
    assert "stabiliser" not in initial_state(Linear(), 2, 3, DIM)


def test_text_forms():
    assert str(parse_form("linear")) == "linear:elu"
    assert str(parse_form("linear:relu")) == "linear:relu"
    assert str(parse_form("performer")) == "performer:256"
    assert str(parse_form("hedgehog")) == "hedgehog"
    for text in TEXTS:
        assert parse_form(str(parse_form(text))) == parse_form(text)


@pytest.mark.parametrize("text", ["linear:gelu", "linear:elu:3", "performer:0", "performer:x", "hedgehog:3"])
def test_wrong_text_is_refused(text):
    with pytest.raises(UsageError):
        parse_form(text)


def test_what_needs_recovery():
    assert [parse_form(text).needs_recovery for text in TEXTS] == [True, True, False, True]


@pytest.mark.parametrize("text", ["performer", "hedgehog"])
def test_missing_parameters_are_named(text):
    g = geometry(text, False, 2, 2)
    with pytest.raises(PreconditionError, match=g.form.extra_inputs[0]):
        body_text(g.form, g, frozenset())
    with pytest.raises(PreconditionError, match=g.form.extra_inputs[0]):
        attend(g.form, *torch.randn(3, 1, 2, 4, DIM), scale=1.0)


@pytest.mark.parametrize("text", TEXTS)
def test_cost_and_scratch_do_not_grow_with_the_square(text):
    form = parse_form(text)
    for causal in (False, True):
        short, long = form.cost(4096, causal, 64), form.cost(16384, causal, 64)
        assert long.flops == 4 * short.flops
        assert long.scratch == short.scratch


def test_cost_of_elu_counted_by_hand():
    # State and its use: two products of 64 x 65 per token; causally also 128 x 128 pairs of each chunk, twice 64 wide.
    assert Linear().cost(256, False, 64).flops == 256 * 4 * 64 * 65
    assert Linear().cost(256, True, 64).flops == 256 * 4 * 64 * 65 + 2 * 2 * 128 * 128 * 128


def test_pictures_are_one_shade():
    assert np.unique(Linear().picture(5, False)).tolist() == [0.3]
    np.testing.assert_array_equal(Linear().picture(5, True) > 0, np.tri(5, dtype=bool))


def test_the_model_of_the_cases_is_the_one_that_was_asked_for():
    """Each test above runs a body that was built for its form."""
    model = attention_cases.one_node_model(
        geometry("hedgehog", True, 2, 2), True, arrays(geometry("hedgehog", True, 2, 2))
    )
    assert model.graph.node[0].op_type == "LinearAttention"
    assert list(model.graph.node[0].input) == ["query", "key", "value", "key_mask", "query_map", "key_map"]
