"""``auto`` and ``duo``: what is measured, what is chosen from it, and what a compile makes of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch

import effc
from effc.compiler.attention_search import resolved, search
from effc.compiler.calibration_text import CalibrationText, calibration_text
from effc.compiler.choose_layers import Option, Step, efficient_steps, within_budget
from effc.compiler.manifest import AttentionSearch
from effc.compiler.recipe import Recipe, build_recipe
from effc.compiler.report_plots import sensitivity
from effc.compiler.rewrite import observe_attention, rewrite
from effc.compiler.sensitivity import Effect, measure_effects
from effc.compiler.source import SourceModel, load, locate
from effc.compiler.verify import torch_runner
from effc.errors import DataError, PreconditionError, UsageError
from effc.passes.head_importance import choose_heads, enclosing_block, head_importance, split_heads
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
ENCODER = [f"encoder.layer.{number}.attention.self" for number in range(3)]
DECODER = [f"model.layers.{number}.self_attn" for number in range(3)]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.save_lively(tmp_path_factory.mktemp("encoder"), "BertModel", **SIZES)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    return tiny_checkpoints.save_lively(folder, "LlamaForCausalLM", **SIZES, num_key_value_heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts of 50 random words of the tiny vocabulary."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    lines = (" ".join(generator.choice(tiny_checkpoints.WORDS[:20], 50)) for _ in range(12))
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


def recipe_for(model: Path, data: Path | None, text: str, **attention: Any) -> Recipe:
    section = {"pattern": text, "samples": 4, **attention}
    return build_recipe({"model": str(model), "attention": section, "verify": {"data": data and str(data)}})


def opened(recipe: Recipe) -> tuple[SourceModel, Any, CalibrationText]:
    source = load(locate(recipe.model))
    return source, observe_attention(source), calibration_text(recipe, source, "A test")


class TestMeasuring:
    @pytest.mark.parametrize("kind", ["encoder", "decoder"])
    def test_skipping_layers_changes_no_figure(
        self, kind: str, request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, names = request.getfixturevalue(kind), ENCODER if kind == "encoder" else DECODER
        source, observed, texts = opened(recipe_for(model, data, "auto:0.1"))
        form = parse_form("local:4|sinks:1")
        variants = [{names[0]: form}, {names[2]: form}, dict.fromkeys(names, form), {}]
        quick = measure_effects(source, observed, variants, texts)
        monkeypatch.setattr("effc.compiler.sensitivity._holds", lambda *_: True)
        whole = measure_effects(source, observed, variants, texts)
        for one, other in zip(quick, whole, strict=True):
            assert (one.output_error, one.drop) == pytest.approx((other.output_error, other.drop), abs=1e-6)
        assert quick[0].output_error > 1e-3 and quick[0].attention_error > 1e-3
        assert quick[3].output_error == 0
        assert quick[0].drop_name.startswith("relative increase" if kind == "decoder" else "1 - mean cosine")

    def test_figures_are_those_of_the_definition(self, decoder: Path, data: Path) -> None:
        source, observed, texts = opened(recipe_for(decoder, data, "auto:0.1"))
        forms = {DECODER[1]: parse_form("local:4")}
        effect = measure_effects(source, observed, [forms], texts)[0]
        run = torch_runner(source)
        change, size, loss, count = 0.0, 0.0, [0.0, 0.0], 0
        for batch in texts.batches:
            expected = run(batch)["logits"].astype(np.float64)
            with observed.using(forms):
                actual = run(batch)["logits"].astype(np.float64)
            real = batch["attention_mask"].astype(bool)
            change += np.square(actual - expected)[real].sum()
            size += np.square(expected)[real].sum()
            pairs = real[:, 1:] & real[:, :-1]
            for which, logits in enumerate((expected, actual)):
                log = torch.log_softmax(torch.from_numpy(logits[:, :-1]), dim=-1).numpy()
                loss[which] -= np.take_along_axis(log, batch["input_ids"][:, 1:, None], 2)[..., 0][pairs].sum()
            count += pairs.sum()
        assert effect.output_error == pytest.approx(np.sqrt(change / size), rel=1e-4)
        assert effect.drop == pytest.approx(np.exp((loss[1] - loss[0]) / count) - 1, abs=1e-5)

    def test_heads_are_measured_at_the_output_of_their_layer(self, decoder: Path, data: Path) -> None:
        source, observed, texts = opened(recipe_for(decoder, data, "duo:0.5:4:1"))
        streaming = parse_form("local:4|sinks:1")
        run = torch_runner(source)
        found = head_importance(observed, dict.fromkeys(DECODER, streaming), texts.batches, run)
        assert [len(found[name]) for name in DECODER] == [2, 2, 2]
        layer = observed.layers[1]
        assert enclosing_block(source.model, layer) is source.model.model.layers[1]
        # Of the first layer alone the inputs do not change, so that a plain run of the model shows the same.
        first = observed.layers[0]
        outputs: list[torch.Tensor] = []
        handle = enclosing_block(source.model, first).register_forward_hook(
            lambda _, __, output: outputs.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        for head in range(2):
            ratios = []
            for batch in texts.batches:
                outputs.clear()
                run(batch)
                with observed.using({first.name: split_heads(first, [1 - head], streaming)}):
                    run(batch)
                ratio = (outputs[1] - outputs[0]).norm(dim=-1) / outputs[0].norm(dim=-1)
                ratios.append(ratio[torch.from_numpy(batch["attention_mask"]).bool()])
            assert found[first.name][head] == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-4)
        handle.remove()


class TestChoosing:
    def test_steps_go_along_the_hull(self) -> None:
        def option(cost: int, error: float) -> Option:
            return Option(parse_form(f"local:{cost}"), cost, Effect(0, error, 1, 0, "", False))

        options = [option(80, 0.5), option(50, 0.1), option(30, 0.3), option(10, 0.4)]
        assert [str(step.form) for step in efficient_steps("a", 100, options)] == ["local:50", "local:10"]
        assert efficient_steps("a", 40, options[:2]) == []

    def test_the_longest_run_within_the_budget_and_what_still_fits_behind_it(self) -> None:
        forms = {name: parse_form(f"local:{number}") for number, name in enumerate("abcd", 1)}
        steps = [Step(name, form, 0) for name, form in forms.items()]
        costs = {"a": 1, "b": 2, "c": 10, "d": 1}

        def error(chosen: dict[str, AttentionForm]) -> float:
            return sum(costs[name] for name in chosen)

        assert set(within_budget(steps, 100, error)) == set("abcd")
        assert set(within_budget(steps, 4, error)) == {"a", "b", "d"}
        assert set(within_budget(steps, 2.5, error)) == {"a", "d"}
        assert within_budget(steps, 0.5, error) == {}

    def test_the_most_important_heads_of_all_layers_stay(self) -> None:
        importance = {"a": [0.1, 0.9], "b": [0.8, 0.7], "c": [0.2, 0.3]}
        assert choose_heads(importance, 0.5) == {"a": [1], "b": [0, 1], "c": []}
        assert choose_heads(importance, 0.0) == {"a": [], "b": [], "c": []}

    def test_groups_of_queries_stay_together_and_whole_layers_are_plain(self, decoder: Path, data: Path) -> None:
        _, observed, _ = opened(recipe_for(decoder, data, "duo"))
        layer, streaming = observed.layers[0], parse_form("local:4")
        assert [str(split_heads(layer, kept, streaming)) for kept in ([], [1], [0, 1])] == [
            "local:4",
            "local:4@0-1;dense@2-3",
            "dense",
        ]


class TestSearch:
    def test_auto_stays_within_its_budget(self, encoder: Path, data: Path) -> None:
        errors, costs = [], []
        for budget in (0.0005, 0.004, 0.3):
            found = effc.search_attention(encoder, f"auto:{budget}", data=data, samples=4)
            assert found.error <= budget
            errors.append(found.error)
            costs.append(found.cost_share)
        assert costs[0] > costs[1] > costs[2]
        assert found.columns[0] == "local:2|global:1"
        assert [row.chosen for row in found.layers] == ["local:2|global:1"] * 3
        source, observed, texts = opened(recipe_for(encoder, data, "auto:0.3"))
        whole = {name: parse_form(form) for name, form in found.assignment().items()}
        assert found.error == pytest.approx(measure_effects(source, observed, [whole], texts)[0].error, abs=1e-6)
        for row in found.layers:
            assert all(left > right for left, right in zip(row.values, row.values[1:], strict=False)), "wider is closer"

    def test_fixed_and_excluded_layers_are_not_searched(self, encoder: Path, data: Path) -> None:
        recipe = recipe_for(
            encoder, data, "auto:0.5,0=dense", exclude=["*.layer.2.*"], candidates=["local:4", "local:8|global:cls"]
        )
        source, observed, _ = opened(recipe)
        found, _ = search(source, observed, recipe)
        assert [row.layer for row in found.layers] == [ENCODER[1]]
        assert found.columns == ["local:4", "local:8|global:cls"]
        patterns = [layer.pattern for layer in rewrite(source, resolved(recipe.attention, found), observed).layers]
        assert patterns[0] == patterns[2] == "dense" != patterns[1]

    def test_the_same_question_is_answered_from_the_cache(self, decoder: Path, data: Path) -> None:
        recipe = recipe_for(decoder, data, "duo:0.5:4:1")
        source, observed, _ = opened(recipe)
        first, hit = search(source, observed, recipe)
        again, hit_again = search(source, observed, recipe)
        assert (hit, hit_again) == (False, True)
        assert first == again
        assert [len(row.kept) for row in first.layers] != [0, 0, 0]
        assert sum(len(row.kept) for row in first.layers) == 3

    def test_texts_are_others_than_those_of_verify(self, encoder: Path, data: Path) -> None:
        recipe = build_recipe(
            {
                "model": str(encoder),
                "attention": {"pattern": "duo", "samples": 4},
                "verify": {"data": str(data), "samples": 6},
            }
        )
        _, _, texts = opened(recipe)
        from effc.compiler.data import read_samples

        assert len(texts.samples) == 4
        assert not set(texts.samples) & set(read_samples(data, 6))

    def test_what_cannot_be_measured(self, encoder: Path, data: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="'auto:0.1' measures on text, and none is given.*--data"):
            effc.compile(encoder, attention="auto:0.1", output=tmp_path / "o")
        with pytest.raises(UsageError, match="leaves nothing to choose"):
            effc.search_attention(encoder, "local:8", data=data)
        short = tmp_path / "short.txt"
        short.write_text("good film\nbad plot\n")
        with pytest.raises(DataError, match="longest has 4 tokens.*longer texts"):
            effc.search_attention(encoder, "duo:0.5:32", data=short)
        with pytest.raises(DataError, match="longest has 4 tokens"):
            effc.search_attention(encoder, "auto:0.1", data=short, candidates=["local:32"])
        with pytest.raises(PreconditionError, match="no layer left"):
            effc.search_attention(encoder, "auto:0.1,0-*=dense", data=data)
        images = tiny_checkpoints.save(tmp_path / "vit", "ViTModel")
        with pytest.raises(DataError, match="this model reads images"):
            effc.search_attention(images, "duo", data=data)


def test_duo_compiles_from_the_command_line_to_heads_that_onnxruntime_computes(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    command = ["compile", encoder, "--attn=duo:0.5:4:1", f"--data={data}", "--no-bench", "--json", "-o", tmp_path / "o"]
    done = subprocess.run(
        [sys.executable, "-m", "effc.cli", *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "o" / "effc.json").read_text())
    found = AttentionSearch.model_validate(manifest["attention_search"])
    assert [record["name"] for record in manifest["passes"]][:2] == ["choose-attention", "rewrite-attention"]
    patterns = [layer["pattern"] for layer in manifest["attention"]]
    assert patterns == [row.chosen for row in found.layers]
    assert any("@" in pattern for pattern in patterns)
    assert found.cost_share < 1
    assert manifest["recipe"]["attention"]["pattern"] == "duo:0.5:4:1"
    report = (tmp_path / "o" / "report.html").read_text()
    assert "How the attention was chosen" in report
    assert 'aria-label="Sensitivity of every layer' in report

    source = load(locate(build_recipe({"model": str(encoder)}).model))
    rewrite(source, build_recipe({"attention": {"layers": found.assignment()}}).attention)
    ids = torch.randint(5, 25, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source.model(input_ids=ids).last_hidden_state.numpy()
    result = effc.load(tmp_path / "o", native=False)(input_ids=ids.numpy()).last_hidden_state
    np.testing.assert_allclose(result, expected, atol=2e-4)
    figure = str(sensitivity(found, {name: number for number, name in enumerate(ENCODER)}))
    assert figure.count("stroke: var(--fg)") >= sum(len(row.kept) for row in found.layers)


@pytest.mark.slow
def test_auto_compiles_a_language_model(decoder: Path, data: Path, tmp_path: Path) -> None:
    done = effc.compile(
        decoder,
        attention={"pattern": "auto:0.2", "samples": 4},
        output=tmp_path / "o",
        verify={"data": str(data), "samples": 4},
        bench={"enabled": False},
    )
    found = done.manifest.attention_search
    assert found is not None
    assert [layer.pattern for layer in done.manifest.attention] == [row.chosen for row in found.layers]
    assert found.error <= 0.2 and found.cost_share < 1
    assert "How the attention was chosen" in (done.path / "report.html").read_text()
