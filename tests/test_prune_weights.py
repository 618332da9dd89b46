"""Zeros: which weights go, where two of four lie, and how they stay zero in training and in the graph."""

from __future__ import annotations

import pytest
import torch
from prune_cases import calibration, distance, fresh, output

from effc.errors import PassFailedError, PreconditionError
from effc.passes.prune_calibration import InputStatistics
from effc.passes.prune_criteria import mask_share, mask_two_four, scores, sparsegpt
from effc.passes.prune_magnitude import PruneUnstructured
from effc.passes.prune_masks import apply_masks, masks_of, sparsity
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_slice import weight_of
from effc.passes.prune_speed import sparse_requirements, speed_note
from effc.passes.prune_structure import layer_linears
from effc.passes.prune_two_four import PruneTwoFour, is_two_four

pytestmark = pytest.mark.usefixtures("one_thread")


def statistics_of(rows):
    size = rows.shape[1]
    found = InputStatistics(torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))
    found.add(rows)
    return found


def test_two_of_every_four_along_the_inputs_stay_and_they_are_the_largest():
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    mask = mask_two_four(weight.abs())
    for row, kept in zip(weight, mask, strict=True):
        for start in range(0, 12, 4):
            group = row[start : start + 4].abs()
            assert sorted(group[kept[start : start + 4]].tolist()) == sorted(group.tolist())[2:]
    assert is_two_four(weight * mask)
    assert not is_two_four((weight * mask).T.contiguous()[:, :4])


def test_a_share_goes_by_row_or_over_all():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert mask_share(values, 0.5, True).tolist() == [[False, False, True, True]] * 2
    assert mask_share(values, 0.5, False).tolist() == [[False] * 4, [True] * 4]


def test_wanda_weighs_by_the_norm_of_the_inputs():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0] + [1.0] * 7)
    weight = torch.full((3, 8), 1.0)
    values = scores(weight, statistics_of(rows))
    assert torch.allclose(values[0], rows.square().mean(0).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("share", [0.5, None])
def test_sparsegpt_loses_less_of_the_output_than_magnitude_and_wanda(share):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(64) + 0.15 * torch.randn(64, 64, generator=generator)
    rows = torch.randn(600, 64, generator=generator) @ mixing
    weight = torch.randn(16, 64, generator=generator)
    statistics = statistics_of(rows)
    found, mask = sparsegpt(weight, statistics, share)
    assert torch.equal(found == 0, ~mask)
    assert is_two_four(found) if share is None else float((~mask).float().mean()) == pytest.approx(0.5)

    def lost(other):
        return float((rows @ (other - weight).T).norm())

    for values, by_row in ((scores(weight, None), False), (scores(weight, statistics), True)):
        simple = weight * (mask_two_four(values) if share is None else mask_share(values, share, by_row))
        assert lost(found) < 0.9 * lost(simple)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_two_four_on_models(name, criterion):
    model, inputs = fresh(name)
    untouched = output(model, inputs)
    made = PruneTwoFour(PruneStep(method="2:4", criterion=criterion), calibration(name, model))
    result = made.run(model)
    made.ensures(model)
    linears = layer_linears(model)
    assert set(result.changed) == set(linears) and result.metrics["sparsity"] == 0.5
    assert all(is_two_four(weight_of(module)) for module in linears.values())
    assert 0.001 < distance(untouched, output(model, inputs)) < 1.5
    assert set(masks_of(model)) == {f"{layer}.weight" for layer in linears}


def test_unstructured_on_a_model_leaves_embeddings_and_heads_alone():
    model, _ = fresh("llama")
    embeddings, head = model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()
    made = PruneUnstructured(PruneStep(method="unstructured", share=0.6))
    result = made.run(model)
    made.ensures(model)
    assert sparsity(model) == pytest.approx(0.6, abs=0.01)
    assert result.metrics["criterion"] == "magnitude"
    assert torch.equal(embeddings, model.model.embed_tokens.weight) and torch.equal(head, model.lm_head.weight)


def test_training_with_masks_keeps_the_zeros():
    model, inputs = fresh("bert")
    PruneTwoFour(PruneStep(method="2:4")).run(model)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(**inputs).last_hidden_state.square().sum().backward()
    optimizer.step()
    name = "encoder.layer.0.output.dense.weight"
    weight = dict(model.named_parameters())[name]
    assert not is_two_four(weight.detach()), "a step without masks fills the zeros"
    apply_masks(model)
    assert is_two_four(weight.detach()) and not torch.equal(weight.detach(), before[name])
    assert not any("mask" in key for key in model.state_dict())


def test_layers_whose_inputs_are_no_multiple_of_four_are_named():
    from family_configs import _BERT_LIKE, _of

    model = _of("BertModel", "BertConfig", **(_BERT_LIKE | {"intermediate_size": 50}))().requires_grad_(False)
    made = PruneTwoFour(PruneStep(method="2:4"))
    result = made.run(model)
    made.ensures(model)
    assert [name for name, _ in result.skipped] == [f"encoder.layer.{i}.output.dense" for i in (0, 1)]
    assert "50 inputs are no multiple of 4" in result.skipped[0][1]


def test_criteria_that_need_text_say_so():
    model, _ = fresh("bert")
    with pytest.raises(PreconditionError, match="--calibration"):
        PruneTwoFour(PruneStep(method="2:4", criterion="wanda")).run(model)


def test_a_pass_that_missed_its_form_is_not_let_through():
    model, _ = fresh("bert")
    made = PruneTwoFour(PruneStep(method="2:4"))
    made.run(model)
    model.encoder.layer[0].output.dense.weight.data.fill_(1)
    with pytest.raises(PassFailedError, match="not 2:4"):
        made.ensures(model)


def test_what_zeros_bring_is_said_per_target():
    assert "no speed" in speed_note("2:4", "onnxruntime") and "no speed" in speed_note("unstructured", "onnxruntime")
    assert speed_note("2:4", "tensorrt") is None and "no speed" in speed_note("unstructured", "tensorrt")
    assert speed_note("heads", "onnxruntime") is None
    assert sparse_requirements("onnxruntime", {"int8"}) == []
    assert not any("INT8" in rule for rule in sparse_requirements("tensorrt"))
    assert any("INT8 in and INT8 out" in rule for rule in sparse_requirements("tensorrt_rtx", {"int8"}))
