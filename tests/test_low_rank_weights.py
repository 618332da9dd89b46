"""Linear layers as products of two thinner ones: ranks, budgets, and what whitening is for."""

from __future__ import annotations

import pytest
import torch
from prune_cases import calibration, distance, fresh, output

from effc.compiler.recipe import build_recipe
from effc.errors import PreconditionError, UsageError
from effc.passes.low_rank import LowRank, _factored
from effc.passes.low_rank_linear import LowRankLinear
from effc.passes.low_rank_ranks import Spectrum, choose_ranks
from effc.passes.prune_calibration import InputStatistics
from effc.passes.prune_structure import layer_linears

pytestmark = pytest.mark.usefixtures("one_thread")


def section(text, **more):
    key, _, value = text.rpartition(":")
    if key == "rank":
        return build_recipe({"low_rank": {"rank": int(value), **more}}).low_rank
    return build_recipe({"low_rank": {key or "parameters": float(value), **more}}).low_rank


def factorize(name, text, data=True, **more):
    model, inputs = fresh(name)
    untouched = output(model, inputs)
    weights = sum(module.weight.numel() for module in layer_linears(model).values())
    made = LowRank(section(text, **more), calibration(name, model, 8) if data else None)
    result = made.run(model)
    made.ensures(model)
    return model, result, weights, distance(untouched, output(model, inputs))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5-encoder", "vit"])
def test_a_budget_is_kept_and_nearly_used_up(name):
    model, result, weights, error = factorize(name, "0.6")
    gone = result.metrics["parameters_before"] - result.metrics["parameters"]
    assert 0.55 <= 1 - gone / weights <= 0.6
    assert result.metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result.metrics["share_of_weights"] == pytest.approx(1 - gone / weights)
    assert 0.001 < error < 1.2
    for layer, rank in result.metrics["ranks"].items():
        module = model.get_submodule(layer)
        assert isinstance(module, LowRankLinear) and module.rank == rank == module.down.out_features


@pytest.mark.parametrize("bias", [True, False])
def test_a_whitened_factor_is_the_best_of_its_rank_for_the_output(bias):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 3.0
    layer = torch.nn.Linear(24, 16, bias=bias).requires_grad_(False)
    statistics = InputStatistics(torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64))
    statistics.add(rows)
    exact = layer(rows)
    errors = {
        kind: float((_factored(layer, given, 6)(rows) - exact).norm())
        for kind, given in (("plain", None), ("whitened", statistics))
    }
    # Eckart and Young: no product of rank 6 (with its own bias) comes closer to these outputs than this.
    centred = exact.double() - exact.double().mean(0) if bias else exact.double()
    best = float(torch.linalg.svdvals(centred)[6:].norm())
    assert errors["whitened"] == pytest.approx(best, rel=1e-2)
    assert errors["whitened"] < 0.8 * errors["plain"]


def test_whitening_loses_less_of_the_models_output():
    assert factorize("bert", "0.5")[3] < 0.8 * factorize("bert", "0.5", data=False)[3]


def test_the_rank_of_every_layer_and_the_layers_it_would_not_shrink():
    model, result, _, _ = factorize("llama", "rank:12")
    assert set(result.metrics["ranks"].values()) == {12}
    # 16 x 32 breaks even at 11.
    assert {name for name, _ in result.skipped} == {
        f"model.layers.{layer}.self_attn.{proj}" for layer in (0, 1) for proj in ("k_proj", "v_proj")
    }
    assert all("rank 12 saves nothing; below 11 it would" in reason for _, reason in result.skipped)
    assert isinstance(model.model.layers[0].self_attn.k_proj, torch.nn.Linear)


def test_an_energy_is_the_share_of_the_output_that_every_layer_keeps():
    _, result, _, _ = factorize("bert", "energy:0.7")
    assert result.changed and all(0.7 <= kept < 0.85 for kept in result.metrics["energy_kept"].values())


def test_a_budget_goes_where_it_brings_most():
    falling, flat = 0.5 ** torch.arange(64), torch.ones(64)
    spectra = {
        name: Spectrum(64, 64, energies / energies.sum()) for name, energies in (("easy", falling), ("hard", flat))
    }
    ranks = choose_ranks(spectra, section("0.6"))
    cost = sum(spectrum.cost(ranks[name]) for name, spectrum in spectra.items())
    assert cost <= 0.6 * 2 * 64 * 64
    assert ranks["easy"] <= 8
    assert spectra["hard"].cost(64) == 64 * 64, "a layer that would not shrink stays whole"


@pytest.mark.parametrize(
    ("text", "more", "error", "words"),
    [
        ("rank:32", {}, PreconditionError, "shrinks no layer"),
        ("0.5", {"criterion": "whitened"}, PreconditionError, "--calibration"),
        ("0.5", {"include": ["decoder.*"]}, UsageError, "matches no module"),
    ],
)
def test_what_cannot_be_done_is_said(text, more, error, words):
    with pytest.raises(error, match=words):
        factorize("bert", text, data=False, **more)


def test_globs_leave_layers_whole():
    model, result, _, _ = factorize("bert", "0.5", include=["*.intermediate.dense", "*.output.dense"])
    assert all("intermediate" in name or "output" in name for name in result.changed)
    assert isinstance(model.encoder.layer[0].attention.self.query, torch.nn.Linear)
