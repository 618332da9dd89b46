"""Heads, feed-forward neurons and layers: what is left computes what a model computes whose units are hidden."""

from __future__ import annotations

import pytest
import torch
from prune_cases import calibration, distance, fresh, output

from effc.errors import PassFailedError, PreconditionError, UsageError
from effc.passes import prune_ffn, prune_heads
from effc.passes.prune_calibration import Calibration, InputStatistics
from effc.passes.prune_config import mismatches
from effc.passes.prune_ffn import PruneFeedForward
from effc.passes.prune_heads import PruneHeads
from effc.passes.prune_layers import PruneLayers
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_slice import forget_inputs
from effc.passes.prune_structure import attention_parts, feed_forward_parts, layer_lists

FAMILIES = ["bert", "roberta", "distilbert", "llama", "qwen3", "t5", "t5-encoder", "vit", "gpt2", "phi3", "modernbert"]
# Their configs hold the size of a head, or compute it from one, so that they can say another number of heads.
SAYS_HEADS = {"llama", "qwen3", "t5", "t5-encoder", "vit", "phi3"}
every_family = pytest.mark.parametrize("name", FAMILIES)

pytestmark = pytest.mark.usefixtures("one_thread")


def prune(kind, share, name, model, inputs, *, data=False, batches=3, **settings):
    method = "heads" if kind is PruneHeads else "ffn"
    step = PruneStep(method=method, share=share, **settings)
    made = kind(step, inputs, calibration(name, model, batches) if data else None)
    result = made.run(model)
    made.ensures(model)
    return result


def hidden_units(model, readers):
    """Hooks that set some inputs of the named layers to zero: what removing the units must come to."""
    handles = []
    for reader, gone in readers.items():

        def hook(module, arguments, gone=gone):
            value = arguments[0].clone()
            value[..., gone] = 0
            return (value, *arguments[1:])

        handles.append(model.get_submodule(reader).register_forward_pre_hook(hook))
    return handles


@every_family
def test_removed_heads_are_hidden_heads(name):
    model, inputs = fresh(name)
    untouched = output(model, inputs)
    before = {parts.name: parts for parts in attention_parts(model)}
    values = {
        parts.name: model.get_submodule(parts.value).weight.clone() for parts in before.values() if not parts.fused
    }
    readers = {parts.name: model.get_submodule(parts.output).weight.clone() for parts in before.values()}
    result = prune(PruneHeads, 0.5, name, model, inputs)
    after = {parts.name: parts for parts in attention_parts(model)}
    assert after and result.metrics["parameters"] < result.metrics["parameters_before"]
    reference, _ = fresh(name)
    gone = {}
    for parts in after.values():
        old = before[parts.name]
        assert (parts.heads, parts.groups) == (old.heads // 2, old.groups)
        if not parts.fused:
            kept = model.get_submodule(parts.value).weight
            rows = [i for i, row in enumerate(values[parts.name]) if not any(torch.equal(row, other) for other in kept)]
            assert len(rows) == (old.kv_heads - parts.kv_heads) * old.head_dim
        weight, old_weight = model.get_submodule(parts.output).weight, readers[parts.name]
        columns, old_columns = (weight, old_weight) if name == "gpt2" else (weight.T, old_weight.T)
        gone[parts.output] = [
            i for i, column in enumerate(old_columns) if not any(torch.equal(column, other) for other in columns)
        ]
        assert len(gone[parts.output]) == old.heads * old.head_dim // 2
    hidden_units(reference, gone)
    expected = output(reference, inputs)
    assert distance(expected, output(model, inputs)) < 1e-4
    assert distance(untouched, expected) > 1e-3, "hiding heads must show"
    assert (mismatches(model, model.config) == 0) == (name in SAYS_HEADS)


@every_family
def test_removed_neurons_are_hidden_neurons_and_the_config_says_so(name):
    model, inputs = fresh(name)
    untouched = output(model, inputs)
    before = {parts.name: model.get_submodule(parts.output).weight.clone() for parts in feed_forward_parts(model)}
    prune(PruneFeedForward, 0.25, name, model, inputs)
    reference, _ = fresh(name)
    gone = {}
    for parts in feed_forward_parts(model):
        weight, old = model.get_submodule(parts.output).weight, before[parts.name]
        columns, old_columns = (weight, old) if name == "gpt2" else (weight.T, old.T)
        gone[parts.output] = [
            i for i, column in enumerate(old_columns) if not any(torch.equal(column, other) for other in columns)
        ]
        assert len(gone[parts.output]) == len(old_columns) // 4
    hidden_units(reference, gone)
    expected = output(reference, inputs)
    assert distance(expected, output(model, inputs)) < 1e-4
    assert distance(untouched, expected) > 1e-3
    assert mismatches(model, model.config) == 0


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_units_that_do_nothing_go_first(name, criterion):
    model, inputs = fresh(name)
    untouched = output(model, inputs)
    with torch.no_grad():
        for parts in feed_forward_parts(model):
            model.get_submodule(parts.output).weight[:, 5:17] = 0
        for parts in attention_parts(model):
            width = parts.head_dim * parts.groups
            model.get_submodule(parts.output).weight[:, width : 2 * width] = 0
    planted = output(model, inputs)
    assert distance(untouched, planted) > 1e-3
    for kind, share in ((PruneFeedForward, 0.25), (PruneHeads, 0.25 if name == "bert" else 0.5)):
        result = prune(kind, share, name, model, inputs, data=True, criterion=criterion, reconstruct=False)
        assert len(result.changed) == 2
    assert distance(planted, output(model, inputs)) < 1e-4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fitting_what_stays_comes_closer_to_the_output(name):
    errors = {}
    for fit in (False, True):
        model, inputs = fresh(name)
        for parts in feed_forward_parts(model):
            _make_redundant(model, parts)
        untouched = output(model, inputs)
        result = prune(PruneFeedForward, 0.5, name, model, inputs, data=True, batches=8, reconstruct=fit)
        assert result.metrics["reconstructed"] is fit
        errors[fit] = distance(untouched, output(model, inputs))
    assert errors[True] < 0.9 * errors[False]


def test_a_massive_activation_stays_whatever_its_gradient_says(monkeypatch):
    model, inputs = fresh("bert")
    parts = feed_forward_parts(model)[0]
    producer, reader = model.get_submodule(parts.producers[0].name), model.get_submodule(parts.output)
    with torch.no_grad():
        producer.weight[7] = 0
        producer.bias[7] = 1000
    massive = reader.weight[:, 7].clone()
    owed = Calibration.owed

    def saturated(self, readers, seed=0):
        found = owed(self, readers, seed)
        found[parts.output][7] = 0
        return found

    monkeypatch.setattr(Calibration, "owed", saturated)
    untouched = output(model, inputs)
    prune(PruneFeedForward, 0.25, "bert", model, inputs, data=True, criterion="taylor", reconstruct=False)
    assert any(torch.equal(column, massive) for column in model.get_submodule(parts.output).weight.T)
    assert distance(untouched, output(model, inputs)) < 0.3


def test_a_fit_leaves_the_weights_of_units_that_calibration_never_saw():
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
    weight = module.weight.clone()
    rows = torch.randn(50, 6, generator=generator)
    rows[:, 2] = 0
    rows[:, 1] = rows[:, 0]
    statistics = InputStatistics(torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    statistics.add(rows)
    forget_inputs(module, torch.tensor([1, 2, 3, 4, 5]), statistics)
    assert torch.equal(module.weight[:, 0], torch.zeros(4))
    assert torch.allclose(module.weight[:, 2], weight[:, 2])
    # Input 1 says what input 0 said, and takes its weight over, all but what the damping keeps back.
    assert distance(weight[:, 0] + weight[:, 1], module.weight[:, 1]) < 0.4
    assert distance(rows @ weight.T, rows @ module.weight.T) < 0.5 * distance(
        rows @ weight.T, rows[:, 1:] @ weight[:, 1:].T
    )


def _make_redundant(model, parts):
    """Let the second half of the neurons do nearly what the first does: then the rest can stand in for what goes."""
    with torch.no_grad():
        for producer in parts.producers:
            module = model.get_submodule(producer.name)
            half = producer.channels // 2
            module.weight[half:] = 1.01 * module.weight[:half]
            if module.bias is not None:
                module.bias[half:] = 1.01 * module.bias[:half]


def test_without_uniform_layers_the_least_important_of_all_go():
    model, inputs = fresh("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1e-3)
    prune(PruneFeedForward, 0.25, "bert", model, inputs, uniform=False)
    first, second = (layer.output.dense.in_features for layer in model.encoder.layer)
    assert (first, second) == (24, 48)
    assert mismatches(model, model.config) != 0


def test_one_key_head_for_all_queries_lets_single_queries_go():
    from family_configs import _GROUPED, _of

    torch.manual_seed(0)
    model = _of("LlamaModel", "LlamaConfig", **(_GROUPED | {"num_key_value_heads": 1, "use_cache": False}))()
    model.train(False).requires_grad_(False)
    _, inputs = fresh("llama")
    prune(PruneHeads, 0.25, "llama", model, inputs)
    assert {(parts.heads, parts.kv_heads) for parts in attention_parts(model)} == {(3, 1)}
    assert model.layers[0].self_attn.num_key_value_groups == 3


def test_heads_under_a_norm_over_all_of_them_are_refused():
    model, inputs = fresh("olmo3")
    with pytest.raises(PreconditionError, match="q_norm spans all heads"):
        prune(PruneHeads, 0.5, "olmo3", model, inputs)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"share": 0.1}, PreconditionError, "One step is 0.25"),
        ({"share": 0.5, "include": ("decoder.*",)}, UsageError, "matches no module"),
        ({"share": 0.5, "criterion": "taylor"}, PreconditionError, "--calibration"),
    ],
)
def test_what_cannot_be_done_is_said(settings, error, words):
    model, inputs = fresh("bert")
    with pytest.raises(error, match=words):
        prune(PruneHeads, settings.pop("share"), "bert", model, inputs, **settings)


def test_globs_choose_layers_and_the_others_are_listed():
    model, inputs = fresh("bert")
    result = prune(PruneHeads, 0.5, "bert", model, inputs, exclude=("encoder.layer.0",))
    assert result.changed == ["encoder.layer.1.attention.self"]
    assert result.skipped == [("encoder.layer.0.attention.self", "not chosen by include and exclude")]
    assert [parts.heads for parts in attention_parts(model)] == [4, 2]


@pytest.mark.parametrize(("kind", "module"), [(PruneHeads, prune_heads), (PruneFeedForward, prune_ffn)])
def test_a_model_that_was_misunderstood_is_not_let_through(kind, module, monkeypatch):
    model, inputs = fresh("bert")
    right = module.keep_inputs
    monkeypatch.setattr(module, "keep_inputs", lambda layer, kept: right(layer, kept.flip(0)))
    with pytest.raises(PassFailedError, match="off by"):
        prune(kind, 0.5, "bert", model, inputs)


def idle(layer):
    """Let a layer hand on its input: its two branches add nothing."""
    with torch.no_grad():
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.zero_()


@pytest.mark.parametrize("criterion", ["similarity", "output"])
def test_the_layer_that_does_nothing_goes(criterion):
    model, inputs = fresh("llama")
    idle(model.model.layers[0])
    expected = output(model, inputs)
    step = PruneStep(method="layers", share=0.5, criterion=criterion)
    made = PruneLayers(step, inputs, calibration("llama", model))
    result = made.run(model)
    made.ensures(model)
    assert result.changed == ["model.layers.0"]
    assert distance(expected, output(model, inputs)) < 1e-5
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert model.model.layers[0].self_attn.layer_idx == 0
    assert mismatches(model, model.config) == 0


def test_layers_of_other_kinds_keep_their_kind():
    model, inputs = fresh("gemma3")
    step = PruneStep(method="layers", share=0.5, exclude=("layers.1",))
    PruneLayers(step, inputs, calibration("gemma3", model)).run(model)
    assert model.config.layer_types == ["full_attention"]
    reference, _ = fresh("gemma3")
    reference.layers = reference.layers[1:]
    reference.config.layer_types, reference.config.num_hidden_layers = ["full_attention"], 1
    assert distance(output(reference, inputs), output(model, inputs)) < 1e-5


@pytest.mark.parametrize("name", ["t5-encoder", "modernbert"])
def test_a_layer_with_weights_of_its_own_stays(name):
    model, inputs = fresh(name)
    result = PruneLayers(PruneStep(method="layers", share=0.5), inputs, calibration(name, model)).run(model)
    (stack,) = layer_lists(model)
    assert result.changed == [f"{stack.name}.1"]
    assert result.skipped == [(f"{stack.name}.0", "it has other weights than the layers around it")]


def test_a_share_below_one_layer_is_said():
    model, inputs = fresh("bert")
    with pytest.raises(PreconditionError, match="0.1 of 2 layers is none"):
        PruneLayers(PruneStep(method="layers", share=0.1), inputs, calibration("bert", model)).run(model)
