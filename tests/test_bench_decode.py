"""What a token costs: the dense baseline writes what torch does, and both sides are measured by length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_checkpoints
import torch
from click.testing import CliRunner
from generation_cases import ToyModel, prompts

import effc
from effc import cli
from effc.compiler.artifact_files import read_manifest
from effc.compiler.bench_ratios import unmet_speed
from effc.compiler.decode_steps import SharedCacheSteps
from effc.compiler.generation_memory import Memory
from effc.compiler.report import render_report
from effc.compiler.twin import dense_decode_twin
from effc.errors import PreconditionError, UsageError
from effc.exporters.decode_twin import add_shared_caches, dense_window

VERIFY = {"verify": {"samples": 1, "max_length": 16}}
QUICK = VERIFY | {"bench": {"lengths": [8, 32], "rounds": 1}}


def shared(graph: Path, batch: int) -> SharedCacheSteps:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return SharedCacheSteps(onnxruntime.InferenceSession(str(graph), options), batch)


def written(steps: SharedCacheSteps, tokens: np.ndarray) -> np.ndarray:
    """Logits of all places, token by token; what the caches hold behind them would show."""
    steps.reserve(tokens.shape[1] + 3, lambda size, dtype: np.full(size, np.nan, dtype))
    found = []
    for place in range(tokens.shape[1]):
        steps.place(tokens[:, place], place)
        steps.run()
        found.append(steps.logits()[:, -1].copy())
    return np.stack(found, axis=1)


@pytest.mark.parametrize("form", ["dense", "local:6", "local:1", "local:5:0"])
def test_baseline_equals_float64(form: str, tmp_path: Path) -> None:
    model = ToyModel(form)
    graph = model.graph()
    add_shared_caches(graph)
    ir.save(graph, str(tmp_path / "twin.onnx"))
    tokens, mask = prompts([20, 20], 0)
    expected = model.logits(tokens, mask)
    np.testing.assert_allclose(written(shared(tmp_path / "twin.onnx", 2), tokens), expected, rtol=0, atol=2e-5)


class TestRefusals:
    @pytest.mark.parametrize("pattern", ["strided:4", "local:8|sinks:2", "dilated:3:2", "linear:elu", "topk:4"])
    def test_what_the_kernel_does_not_know(self, pattern: str) -> None:
        with pytest.raises(PreconditionError, match="no plain window"):
            dense_window(pattern)

    def test_scores_with_distances(self) -> None:
        graph = ToyModel("dense", extras={"distance_slope": np.array([0.5, 0.25, 0.1, 0.05], np.float32)}).graph()
        with pytest.raises(PreconditionError, match="adds to its scores by distance"):
            add_shared_caches(graph)


def test_rewinding_forgets_what_came_after(tmp_path: Path) -> None:
    for form in ("dense", "strided:5", "hierarchical:4"):
        generator, record = ToyModel(form).generator(tmp_path)
        tokens, mask = prompts([12, 12], 3)
        memory = Memory(record, tokens, mask)
        generator.prefill(memory)
        first = generator.step(memory, np.array([4, 5]))
        generator.step(memory, np.array([6, 7]))
        memory.rewind(12)
        np.testing.assert_array_equal(generator.step(memory, np.array([4, 5])), first)


@pytest.fixture(scope="module", params=["GPT2LMHeadModel", "MistralForCausalLM"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> effc.Artifact:
    folder = tmp_path_factory.mktemp("writer")
    changes = {"sliding_window": 16} if request.param.startswith("Mistral") else {}
    source = tiny_checkpoints.save(folder / "source", request.param, with_tokenizer=True, **changes)
    return effc.compile(source, attention="local:8|sinks:2", output=folder / "out", **QUICK)


class TestMeasured:
    def test_both_models_at_every_length(self, artifact: effc.Artifact) -> None:
        bench = artifact.manifest.benchmark
        assert bench is not None and bench.decode is not None and bench.not_written is None
        speed = bench.decode
        assert speed.lengths == [8, 32] and set(speed.dense) == set(speed.compiled) == {"8", "32"}
        assert speed.speedup["32"] == speed.dense["32"].cpu_ms / speed.compiled["32"].cpu_ms > 0
        assert speed.dense_form.startswith("contrib GroupQueryAttention")
        assert speed.dense_form.endswith("with caches in place")
        assert all(name.endswith("/step") for name in speed.kernels) and len(speed.kernels) == 2
        report = (artifact.path / "report.html").read_text()
        assert "Writing token by token" in report and speed.dense_form in report

    def test_the_baseline_writes_what_torch_does(self, artifact: effc.Artifact) -> None:
        from effc.compiler.recipe import ModelSection
        from effc.compiler.source import load, locate

        model = load(locate(ModelSection(path=artifact.manifest.source.path))).model
        tokens = np.random.default_rng(0).integers(4, 20, (2, 40))
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
        found = written(shared(dense_decode_twin(artifact.manifest), 2), tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> effc.Artifact:
    folder = tmp_path_factory.mktemp("small")
    source = tiny_checkpoints.save(folder / "source", "LlamaForCausalLM", with_tokenizer=True)
    return effc.compile(source, attention="local:8", output=folder / "out", bench={"enabled": False}, **VERIFY)


def test_bench_of_an_artifact(small: effc.Artifact) -> None:
    arguments = ["bench", str(small.path), "--lengths=8", "--rounds=1", "--require-decode-speedup=1000000"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1 and "Not met: The speed-up per token at place 8 is" in result.output
    assert "CPU time to write the token at that place" in result.output
    bench = read_manifest(small.path).benchmark
    assert bench is not None and bench.decode is not None and bench.decode.lengths == [8]
    [missed] = unmet_speed(bench, None, 1e6)
    assert "below 1e+06x" in missed and list(unmet_speed(bench, 1e-6, 1e-6)) == []
    [unknown] = unmet_speed(bench.model_copy(update={"decode": None}), None, 1.0)
    assert unknown == "The speed-up per token is unknown: the model does not write."


def test_what_is_not_measured_is_not_required(small: effc.Artifact, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["bench", str(small.path), "--require-decode-speedup=2", "--no-decode"])
    assert result.exit_code == 2 and "Leave --no-decode out" in result.output
    given = {"bench": {"enabled": False}, "require": {"min_decode_speedup": 1}}
    with pytest.raises(UsageError, match="per token is required but not measured"):
        effc.compile(small.manifest.source.path, attention="local:8", output=tmp_path / "o", **given)


def test_a_model_without_a_baseline_says_so(small: effc.Artifact) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = small.manifest.model_copy(deep=True)
    assert manifest.generation is not None
    manifest.generation.groups[0].distance = True
    record = effc.bench(
        small,
        lengths=[8],
        rounds=1,
        decode_twin=lambda: dense_decode_twin(manifest),
        progress=lambda *step: told.append(step),
    )
    assert record.decode is None and record.not_written is not None and "by distance" in record.not_written
    assert told[-1][1] == told[-1][2]
    report = render_report(manifest.model_copy(update={"benchmark": record}))
    assert "Not measured: The model adds" in report
