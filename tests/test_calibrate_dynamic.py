"""Fitting the scorers of dynamic attention."""

from __future__ import annotations

import onnxruntime
import pytest
import tiny_checkpoints
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effc.compiler.inputs import dynamic_axes
from effc.errors import DataError
from effc.exporters.onnx_graph import export_onnx, save_onnx
from effc.passes import calibrate_dynamic
from effc.passes.calibrate_dynamic import calibrate
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.registry import parse_form
from effc.plugins.hook import IMPLEMENTATION
from effc.plugins.reference import initial_parameters

FORM = parse_form("dynamic:24:0")
# A random token's key is then large enough for attention to differ between tokens.
WIDE = {"initializer_range": 0.5, "max_position_embeddings": 512}


def text_batch(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 28, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


BATCHES = [text_batch(300, 250), text_batch(300, 280, seed=1)]


def observed_model(kind, form=FORM):
    model = tiny_checkpoints.model(kind, **WIDE)
    observed = ObservedAttention(model, text_batch(40, 23))
    observed.use({layer.name: form for layer in observed.layers})
    return model, observed


def one_query_for_all(model, projection):
    """Give every token the same query, so that the logarithm of its weight is linear in its key."""
    generator = torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        if name.endswith(projection):
            module.weight.data.zero_()
            module.bias.data = torch.randn(module.bias.shape, generator=generator)


def run(model):
    def on_batch(batch):
        return model(**batch)

    return on_batch


def test_an_attention_that_is_linear_in_the_keys_is_found():
    model, observed = observed_model("BertModel")
    one_query_for_all(model, "self.query")
    fits = calibrate(observed, BATCHES, run(model), ridge=1e-9)
    assert list(fits) == [layer.name for layer in observed.layers]
    for layer in observed.layers:
        scorer = layer.module.effc_attention["scorer"].detach()
        query = layer.module.query.bias.detach().view(layer.kv_heads, layer.head_dim)
        torch.testing.assert_close(scorer[:, :-1], query * layer.scale, atol=2e-3, rtol=2e-2)
        torch.testing.assert_close(scorer[:, -1], torch.zeros(layer.kv_heads), atol=2e-3, rtol=0)
        assert fits[layer.name].explained > 0.999
        assert fits[layer.name].caught > fits[layer.name].caught_before


@pytest.mark.parametrize("kind", ["BertModel", "LlamaForCausalLM"])
def test_scorers_are_set_and_used(kind):
    model, observed = observed_model(kind)
    attention, forms = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION], dict(observed.forms)
    with torch.no_grad():
        before = model(**BATCHES[1])[0]
        fits = calibrate(observed, BATCHES, run(model))
        after = model(**BATCHES[1])[0]
    assert not torch.equal(before, after)
    assert observed.forms == forms
    assert ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] is attention
    for layer in observed.layers:
        fit = fits[layer.name]
        assert 0 < fit.caught_before <= fit.caught <= 1
        assert 0 < fit.explained <= 1
    start = initial_parameters(FORM, layer.num_heads, layer.kv_heads, layer.head_dim, 0)["scorer"]
    fitted = layer.module.effc_attention["scorer"].detach().clone()
    assert not torch.equal(fitted, start)
    # They stay where the form is taken away and given back.
    observed.use({})
    observed.use(forms)
    assert torch.equal(layer.module.effc_attention["scorer"], fitted)


def test_what_padding_holds_does_not_count():
    scorers = []
    for filler in (0, 7):
        model, observed = observed_model("BertModel")
        batches = [
            {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)}
            for batch in BATCHES
        ]
        calibrate(observed, batches, run(model))
        scorers.append(observed.layers[0].module.effc_attention["scorer"].detach())
    torch.testing.assert_close(scorers[0], scorers[1])


def test_heads_of_their_own():
    model, observed = observed_model("BertModel", parse_form("dense@0;dynamic:24:0@1"))
    fits = calibrate(observed, BATCHES, run(model))
    whole_model, whole = observed_model("BertModel")
    calibrate(whole, BATCHES, run(whole_model))
    assert len(fits) == len(observed.layers)
    for layer, other in zip(observed.layers, whole.layers, strict=True):
        torch.testing.assert_close(
            layer.module.effc_attention["part1_scorer"], other.module.effc_attention["scorer"][1:]
        )


def test_a_scorer_that_catches_less_is_not_taken(monkeypatch):
    model, observed = observed_model("BertModel")
    one_query_for_all(model, "self.query")
    solve = calibrate_dynamic._solve

    def backwards_in_one_head(target, ridge):
        solve(target, ridge)
        target.fitted[0] *= -1

    monkeypatch.setattr(calibrate_dynamic, "_solve", backwards_in_one_head)
    fits = calibrate(observed, BATCHES, run(model))
    layer = observed.layers[0]
    scorer = layer.module.effc_attention["scorer"]
    start = initial_parameters(FORM, layer.num_heads, layer.kv_heads, layer.head_dim, 0)["scorer"]
    assert torch.equal(scorer[0], start[0]) and not torch.equal(scorer[1], start[1])
    assert fits[layer.name].caught > fits[layer.name].caught_before


@pytest.mark.parametrize("kind", ["BertModel", "LlamaForCausalLM"])
def test_exported_model_has_the_scorers_and_equals_torch(kind, tmp_path):
    model, observed = observed_model(kind)
    calibrate(observed, BATCHES, run(model))
    first = observed.layers[0].name
    observed.use(
        {layer.name: parse_form("topk-blocks:3:16") if layer.name == first else FORM for layer in observed.layers}
    )
    graph = export_onnx(model, BATCHES[0], dynamic_axes(BATCHES[0]))
    save_onnx(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (text_batch(290, 133, seed=5), text_batch(7)):
        with torch.no_grad():
            reference = model(**batch)[0]
        output = session.get_outputs()[0].name
        result = torch.from_numpy(session.run([output], {name: ids.numpy() for name, ids in batch.items()})[0])
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(result[real], reference[real], atol=1e-4, rtol=1e-4)


def test_nothing_to_do_without_dynamic_layers():
    model, observed = observed_model("BertModel", parse_form("local:16"))
    assert calibrate(observed, BATCHES, run(model)) == {}


def test_short_texts_are_refused():
    model, observed = observed_model("BertModel")
    with pytest.raises(DataError, match="128 tokens"):
        calibrate(observed, [text_batch(60, 50)], run(model))
