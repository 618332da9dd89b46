"""Choosing which layers are quantized: where torch computes them, what each changes, and how few have to be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import save_lively

from effc.compiler.calibration_text import CalibrationText, random_text
from effc.compiler.exported import export_now
from effc.compiler.fewest_kept import fewest_kept
from effc.compiler.layer_places import find_places
from effc.compiler.quantization_errors import CHANGE, KL, LayerErrors, layer_errors
from effc.compiler.quantization_search import MeasuredChoices, search_quantization
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.exporters.onnx_graph import save_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.quantize import quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_replace import Beside
from effc.passes.quantize_settings import QuantizationSection

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


def prepared(folder: Path, kind: str, task: str | None = None, **changes: Any) -> tuple[SourceModel, Path]:
    """A small model and its fused graph."""
    path = save_lively(folder / "model", kind, **changes)
    source = load(locate(ModelSection(path=str(path), task=task)))
    rewrite(source, AttentionSection())
    graph = export_now(source)
    FuseOnnxRuntime().run(graph)
    save_onnx(graph, folder / "model.onnx")
    return source, folder / "model.onnx"


def some_inputs(source: SourceModel, count: int = 4) -> CalibrationText:
    """Random inputs, more than one batch of them."""
    one = random_text(source, 48)
    batches = [
        {name: np.roll(value, shift, axis=-1) for name, value in one.batches[0].items()} for shift in range(count)
    ]
    return CalibrationText(one.data, [], batches, one.max_length, one.longest, count * one.tokens)


def hooks(source: SourceModel) -> int:
    return sum(len(module._forward_hooks) for module in source.model.modules())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceModel, Path]:
    return prepared(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", **WIDE, num_key_value_heads=1)


CASES = [
    # Judged by 2 numbers for each text.
    ("BertForSequenceClassification", None, WIDE, {"mode": "int4-weights", "weights": {"block_size": 16}}, KL),
    # A layer that keeps its weight the other way round.
    pytest.param("GPT2LMHeadModel", None, {"n_embd": 64}, {"mode": "int8"}, KL, marks=pytest.mark.slow),
    pytest.param("RobertaModel", None, WIDE, {"mode": "fp8"}, CHANGE, marks=pytest.mark.slow),
    pytest.param("ViTModel", None, WIDE, {"mode": "int8"}, CHANGE, marks=pytest.mark.slow),
    pytest.param(
        "BartForConditionalGeneration", "seq2seq-lm", {"d_model": 64}, {"mode": "fp8"}, KL, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("kind", "task", "changes", "section", "name"), CASES)
def test_estimates_are_what_runs_of_each_layer_measure(
    kind: str, task: str | None, changes: dict[str, Any], section: dict[str, Any], name: str, tmp_path: Path
) -> None:
    check_estimates(*prepared(tmp_path, kind, task, **changes), section, name)


def test_estimates_of_fp8_are_what_runs_measure(llama: tuple[SourceModel, Path]) -> None:
    check_estimates(*llama, {"mode": "fp8"}, KL)


def check_estimates(source: SourceModel, graph: Path, section: dict[str, Any], name: str) -> None:
    texts, chosen = some_inputs(source), QuantizationSection.model_validate(section)
    model, remembered = ir.load(str(graph)), Remembered()
    beside, before = Beside(model.graph), hooks(source)
    for step in quantizing_passes(chosen, None, None, remembered, beside):
        step.run(model)
    found = layer_errors(source, model, beside, texts, lambda _: None)
    layers = list(dict.fromkeys(layer.name for layer in beside.layers))
    assert found.name == name
    assert found.errors.keys() == set(layers) and len(layers) >= 6
    measured = LayerErrors()
    choices = MeasuredChoices(source, graph, chosen, None, texts, remembered)
    choices.measure_missing(measured, layers, layers, lambda _: None)
    both = np.array([[found.errors[layer], measured.errors[layer]] for layer in layers])
    # What matters is the order, and that the sum says where to look.
    assert np.corrcoef(np.log(both.T))[0, 1] > 0.7
    assert both[:, 0].sum() == pytest.approx(both[:, 1].sum(), rel=0.5)
    assert hooks(source) == before


class Mixed(torch.nn.Module):
    """A packed layer, one that runs twice, and one whose output is the same but for a bias and a factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.twice = torch.nn.Linear(8, 24), torch.nn.Linear(24, 24, bias=False)
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed(x)
        first = self.twice(packed.tanh())
        second = self.twice(first.tanh())
        self.outputs = [packed, first, second]
        return second


def test_layers_are_found_by_what_they_compute() -> None:
    model, x = Mixed().train(False), torch.randn(5, 6, 8)
    with torch.no_grad():
        model(x)
    packed, first, second = model.outputs
    factor = torch.linspace(0.5, 2, 8)
    graph = [
        ("named.otherwise", packed[..., 8:16] - model.packed.bias[8:16].detach()),
        ("divided", packed[..., 16:] / factor),
        ("twice", first),
        ("twice", second),
        ("of another model", torch.randn(5, 6, 24)),
    ]
    places = find_places(model, lambda: model(x), graph)
    assert [place and (place.module, place.call, place.start) for place in places] == [
        ("packed", 0, 8),
        ("packed", 0, 16),
        ("twice", 0, 0),
        ("twice", 1, 0),
        None,
    ]
    assert places[1] is not None and torch.allclose(places[1].factor, factor, rtol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


@settings(max_examples=200, deadline=None)
@given(
    errors=st.lists(st.floats(1e-6, 1), min_size=0, max_size=300).map(lambda found: sorted(found, reverse=True)),
    budget=st.floats(0, 5),
    exponent=st.floats(0.3, 3),
    rest=st.sampled_from([0.0, 0.01]),
)
def test_few_measurements_find_the_fewest_kept(
    errors: list[float], budget: float, exponent: float, rest: float
) -> None:
    tried: dict[int, float] = {}

    def drop(kept: int) -> float:
        assert kept not in tried and 0 <= kept <= len(errors)
        # The estimate is off, by another factor at every place.
        tried[kept] = sum(errors[kept:]) ** exponent + rest
        return tried[kept]

    kept = fewest_kept(errors, budget, drop)
    assert kept in tried
    right = next((n for n in range(len(errors) + 1) if sum(errors[n:]) ** exponent + rest <= budget), len(errors))
    assert right <= kept <= right + max(0, int(0.02 * len(errors)) - 1)
    assert len(tried) <= 2 + 2 * np.log2(max(2, len(errors)))


def test_a_good_estimate_needs_few_measurements() -> None:
    errors, tried = np.geomspace(1, 1e-4, 200).tolist(), []

    def drop(kept: int) -> float:
        tried.append(kept)
        return 1.3 * sum(errors[kept:])

    assert fewest_kept(errors, 0.5, drop) > 0
    assert len(tried) <= 5


def test_what_no_module_computes_is_measured_by_a_run(
    llama: tuple[SourceModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from effc.compiler import quantization_errors

    source, graph = llama
    searched: list[dict[str, float | None]] = []
    told: list[str] = []
    monkeypatch.setattr(
        "effc.compiler.quantization_search.measure_speedups", lambda shapes, *_, **__: dict.fromkeys(shapes, 2.0)
    )
    real = quantization_errors.find_places
    for hide in (False, True):
        if hide:
            monkeypatch.setattr(quantization_errors, "find_places", lambda *given: [*real(*given)[:-1], None])
        section = QuantizationSection(mode="auto:1e9:int8")
        search = search_quantization(source, graph, section, None, some_inputs(source), Remembered(), told.append)
        assert search.met and search.quantized_share == 1 and search.measured == 1
        searched.append({layer.layer: layer.error for layer in search.layers})
        assert any("by a run of its own" in line for line in told) == hide
    (changed,) = [name for name, error in searched[0].items() if error != searched[1][name]]
    assert searched[1][changed] == pytest.approx(searched[0][changed], rel=1.5)
