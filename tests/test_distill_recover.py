"""Recovery within a compile: forms that need training are trained, once, and verified against the untouched model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch
from click.testing import CliRunner
from test_report import full_manifest

import effc
from effc.cli import main
from effc.compiler.manifest import PassRecord
from effc.compiler.recipe import ModelSection, build_recipe, merge
from effc.compiler.recover import RECOVER, Recovery, recover
from effc.compiler.report import render_report
from effc.compiler.rewrite import observe_attention, rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.errors import DataError, PreconditionError, UsageError
from effc.passes.attention_settings import AttentionSection
from effc.passes.fake_quant import (
    fake_quantize_channels,
    fake_quantize_rows,
    fake_quantize_tensor,
    fake_quantized,
    quantized_layers,
)
from effc.passes.quantize_numbers import activation_range, quantize_columns, quantize_rows
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins.hook import PARAMETERS

TRAINING: dict[str, Any] = {
    "steps": 16,
    "evaluate_every": 4,
    "learning_rate": 2e-3,
    "transfer_learning_rate": 1e-2,
    "warmup": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoints.save_lively(tmp_path_factory.mktemp("model"), "BertModel")
    generator = random.Random(0)
    words = tiny_checkpoints.WORDS[:20]
    lines = [" ".join(generator.choices(words, k=generator.randint(5, 30))) for _ in range(60)]
    (path / "texts.txt").write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))


def recovered(path: Path, form: str, progress: Any = None, **settings: Any) -> tuple[SourceModel, dict[str, Any], bool]:
    """Load, rewrite and recover a model, without the rest of a compile."""
    section = TRAINING | {"data": str(path / "texts.txt")} | settings
    recipe = build_recipe({"model": str(path), "attention": form, "recover": section})
    source = load(locate(ModelSection(path=str(path))))
    observed = observe_attention(source)
    rewritten = rewrite(source, recipe.attention, observed)
    result, hit = recover(Recovery.read(recipe, source), source, observed, rewritten.layers, progress=progress)
    # Trained parameters of forms outlast a change of forms.
    before = {name: value.clone() for name, value in source.model.named_parameters()}
    with observed.using({}):
        pass
    assert all(torch.equal(before[name], value) for name, value in source.model.named_parameters())
    return source, result.metrics, hit


@pytest.mark.parametrize("form", ["hedgehog", "linformer:8:64", "linear:elu"])
def test_forms_are_trained_in_two_stages_and_only_once(model: Path, form: str) -> None:
    source, record, hit = recovered(model, form)
    assert not hit and source.weights is not None
    first, second = record["stages"]
    assert (first["name"], second["name"]) == ("attention-transfer", "distillation")
    assert (first["steps"], second["steps"]) == (4, 12)
    assert first["after"] < first["before"] and record["after"] < record["before"]
    layers = [module for name, module in source.model.named_modules() if name.endswith("attention.self")]
    own = [value for module in layers for value in getattr(module, PARAMETERS, {}).values()]
    # Forms without parameters of their own let those of their modules learn.
    expected = own or [value for module in layers for value in module.parameters()]
    assert first["parameters"] == sum(value.numel() for value in expected)
    again, cached, hit = recovered(model, form, progress=lambda *_: pytest.fail("trained again"))
    assert hit and cached == record and again.weights == source.weights
    assert not recovered(model, form, seed=1)[2]


def test_a_killed_recovery_goes_on(model: Path, tmp_path: Path) -> None:
    whole, record, _ = recovered(model, "hedgehog")
    for entry in (tmp_path / "cache" / RECOVER).iterdir():
        entry.rename(tmp_path / "elsewhere")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("distillation: step 7"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(model, "hedgehog", progress=stop)
    seen: list[str] = []
    again, resumed, hit = recovered(model, "hedgehog", progress=lambda what, *_: seen.append(what))
    assert not hit and seen[0].startswith("distillation: step 5,")
    assert again.weights == whole.weights
    assert resumed["stages"] == record["stages"]


def test_verified_texts_are_not_trained_on(model: Path) -> None:
    source = load(locate(ModelSection(path=str(model))))
    texts = str(model / "texts.txt")
    values = {"model": str(model), "verify": {"data": texts, "samples": 20}, "recover": {"data": texts}}
    recovery = Recovery.read(build_recipe(values), source)
    assert len(recovery.never) == 20
    observed = observe_attention(source)
    layers = rewrite(source, AttentionSection(), observed).layers
    values["recover"] |= TRAINING | {"steps": 1}
    recovery = Recovery.read(build_recipe(values), source)
    record = recover(recovery, source, observed, layers)[0].metrics
    assert record["trained_on"] + record["held_out"] == len(set(recovery.samples)) - 20


def test_recovery_says_what_it_lacks(model: Path, tmp_path: Path) -> None:
    source = load(locate(ModelSection(path=str(model))))
    with pytest.raises(UsageError, match="--recover-data"):
        Recovery.read(build_recipe({"recover": {"enabled": True}}), source)
    with pytest.raises(DataError, match="no data file"):
        Recovery.read(build_recipe({"recover": {"data": "nowhere.txt"}}), source)
    texts = str(model / "texts.txt")
    with pytest.raises(PreconditionError, match="--quant=int8"):
        Recovery.read(build_recipe({"recover": {"data": texts, "fake_quant": True}}), source)
    images = load(locate(ModelSection(path=str(tiny_checkpoints.save(tmp_path / "vit", "ViTModel")))))
    with pytest.raises(DataError, match="images"):
        Recovery.read(build_recipe({"recover": {"data": texts}}), images)
    with pytest.raises(UsageError, match="learning_rate"):
        build_recipe({"recover": {"learning_rat": 1}})


def test_flags_and_recipes_merge() -> None:
    base = {"recover": "20m"}
    assert build_recipe(merge(base, {"recover": {"data": "x"}})).recover.minutes == 20
    merged = build_recipe(merge({"recover": {"data": "x", "minutes": 5}}, {"recover": {"budget": "300"}})).recover
    assert (merged.data, merged.minutes, merged.steps) == ("x", None, 300)
    assert not build_recipe({}).recover.enabled


def test_rounding_in_training_is_that_of_the_export() -> None:
    torch.manual_seed(0)
    weight, values = torch.randn(48, 40), torch.randn(5, 7, 40) * 3 - 1
    expected = quantize_columns(weight.T.numpy())
    np.testing.assert_allclose(fake_quantize_channels(weight).T, expected.values * expected.scale, atol=1e-6)
    seven = quantize_columns(weight.T.numpy(), reduce_range=True)
    np.testing.assert_allclose(fake_quantize_channels(weight, 63).T, seven.values * seven.scale, atol=1e-6)
    scale, zero = activation_range(float(values.min()), float(values.max()))
    rounded = (np.clip(np.rint(values.numpy() / scale) + zero, 0, 255) - zero) * scale
    np.testing.assert_allclose(fake_quantize_tensor(values), rounded, atol=1e-5)
    rows = quantize_rows(weight.numpy())
    np.testing.assert_allclose(fake_quantize_rows(weight), rows.values * rows.scale, atol=1e-6)


def test_gradients_pass_through_the_rounding() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    fake_quantize_channels(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, 6))


def test_fake_quantization_leaves_names_and_weights() -> None:
    model = tiny_checkpoints.model("BertForSequenceClassification", hidden_size=32, intermediate_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {"input_ids": torch.randint(5, 20, (2, 9))}
    with torch.no_grad():
        plain = model(**inputs).logits
        with fake_quantized(model, QuantizationSection(mode="int8", exclude=("*query*",))) as (linears, _):
            rounded = model(**inputs).logits
        after = model(**inputs).logits
    assert len(linears) == 11 and not any("query" in name or "classifier" in name for name in linears)
    assert torch.equal(plain, after) and not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, rtol=0, atol=0.1)
    assert model.state_dict().keys() == before.keys()


def test_gated_products_and_heads_are_not_rounded() -> None:
    model = tiny_checkpoints.model("LlamaForCausalLM", hidden_size=32, intermediate_size=64)
    linears, tables = quantized_layers(model, QuantizationSection(mode="int8"))
    assert not any("down_proj" in name or "lm_head" in name for name in linears)
    assert any("up_proj" in name for name in linears) and tables == []


@pytest.mark.slow
def test_a_compile_with_recovery(model: Path, tmp_path: Path) -> None:
    texts = str(model / "texts.txt")
    arguments = ["compile", str(model), "--attn=hedgehog", "--no-bench", "--data", texts]
    flags = ["--recover=16", "--recover-data", texts, "--recover-loss", "embedding", "--recover-loss", "hidden:2"]
    refused = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "refused")])
    assert refused.exit_code == 2
    done = CliRunner().invoke(main, [*arguments, *flags, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    artifact = effc.load(tmp_path / "out")
    record = next(entry for entry in artifact.manifest.passes if entry.name == RECOVER)
    assert record.metrics["losses"] == ["embedding:1", "hidden:2"] and record.probe
    rewritten = next(entry for entry in artifact.manifest.passes if entry.name == "rewrite-attention")
    name = "last_hidden_state"
    assert rewritten.probe is not None
    assert record.probe[name].relative_error < rewritten.probe[name].relative_error
    # The graph holds the trained weights, and the twin the untouched ones.
    effc.bench(tmp_path / "out", lengths=[16], rounds=1)
    forced = effc.compile(
        model, attention={"pattern": "hedgehog", "force": True}, output=tmp_path / "forced", verify={"data": texts}
    )
    assert artifact.manifest.verification is not None and forced.manifest.verification is not None
    assert artifact.manifest.verification.quality_drop < forced.manifest.verification.quality_drop
    assert artifact.manifest.export_key != forced.manifest.export_key


@pytest.mark.slow
def test_rounding_hits_the_layers_that_the_export_rounds(tmp_path: Path) -> None:
    path = tiny_checkpoints.save(
        tmp_path / "model", "BertForSequenceClassification", with_tokenizer=True, hidden_size=64, intermediate_size=128
    )
    quantization = {"mode": "int8", "exclude": ["*layer.0*key*"]}
    artifact = effc.compile(path, quantization=quantization, output=tmp_path / "out", bench={"enabled": False})
    record = next(entry for entry in artifact.manifest.passes if entry.name == "quantize-int8")
    model = load(locate(ModelSection(path=str(path)))).model
    linears, tables = quantized_layers(model, QuantizationSection(**quantization))
    exported = sorted(record.changed)
    assert len(exported) == len(linears) + len(tables)
    for name in linears:
        assert any(name.split(".", 1)[1] in found for found in exported), (name, exported)


@pytest.mark.slow
def test_training_with_rounding_loses_less_to_it(tmp_path: Path) -> None:
    path = tiny_checkpoints.save_lively(tmp_path / "model", "BertModel", hidden_size=32, intermediate_size=64)
    generator = random.Random(0)
    lines = [" ".join(generator.choices(tiny_checkpoints.WORDS[:15], k=20)) for _ in range(80)]
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(lines))
    drops = {}
    for fake_quant in (False, True):
        section = {"data": str(texts), "steps": 60, "evaluate_every": 10, "learning_rate": 1e-3}
        artifact = effc.compile(
            path,
            quantization="int8",
            recover=section | {"fake_quant": fake_quant},
            output=tmp_path / str(fake_quant),
            bench={"enabled": False},
            verify={"data": str(texts)},
        )
        assert artifact.manifest.verification is not None
        drops[fake_quant] = artifact.manifest.verification.quality_drop
    assert drops[True] < drops[False]


def test_the_report_draws_the_curves() -> None:
    stage = {"name": "distillation", "curve": [[10, 0.5], [20, 0.2]], "held_out": [[0, 0.9], [20, 0.25]]}
    metrics = {
        "stages": [stage],
        "before": 0.9,
        "after": 0.25,
        "trained_on": 90,
        "held_out": 10,
        "notes": ["a note"],
        "losses": ["hidden:1"],
    }
    manifest = full_manifest()
    assert "Recovery" not in render_report(manifest)
    manifest.passes.append(PassRecord(name=RECOVER, version=1, seconds=3.0, modified=True, metrics=metrics))
    page = render_report(manifest)
    assert "steps of distillation" in page and "a note." in page and "0.25 after" in page
