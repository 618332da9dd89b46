"""Shares of several GPUs: together they compute what the whole graph does, and each holds its part of the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny_checkpoints

import effc
from effc.compiler.engine_check import check_engine
from effc.compiler.engine_proof import graph_error
from effc.compiler.engine_ranks import divide
from effc.compiler.exported import exported_graph
from effc.compiler.inputs import ragged_inputs
from effc.compiler.recipe import ModelSection, build_recipe
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.errors import MissingDependencyError, PreconditionError, UsageError
from effc.exporters.onnx_graph import save_onnx
from effc.exporters.shard_graph import COLLECTIVE, shard
from effc.passes.attention_settings import AttentionSection
from effc.passes.prepare_engine import PrepareEngine
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_settings import QuantizationSection

KINDS = {
    "gates, grouped heads": ("LlamaForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "fused projections": ("GPT2LMHeadModel", {}),
    "biases by distance, cross attention": ("T5ForConditionalGeneration", {}),
}


def prepared(folder: Path, kind: str, quantization: dict[str, object] | None = None, **changes: object):
    """The graph that engines are built from, and inputs for it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = tiny_checkpoints.save_lively(folder / "source", kind, **changes)
    source = load(locate(ModelSection(path=str(path))))
    layers = rewrite(source, AttentionSection(pattern="local:8")).layers
    graph = ir.load(str(exported_graph(source, layers)[0]))
    PrepareEngine().run(graph)
    feeds = probe(source)
    if quantization is not None:
        for step in engine_quantizing_passes(QuantizationSection(**quantization), [feeds]):
            step.run(graph)
    save_onnx(graph, folder / "whole.onnx")
    return folder / "whole.onnx", feeds


def probe(source: SourceModel) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in ragged_inputs(source, [20, 13]).items()}


@pytest.mark.parametrize("name", KINDS)
def test_ranks_together_compute_the_whole(name: str, tmp_path: Path) -> None:
    kind, changes = KINDS[name]
    whole, feeds = prepared(tmp_path, kind, **changes)
    files, error = divide(whole, 2, feeds, tmp_path)
    assert len(files) == 2 and error < 1e-5
    for file in files:
        model = ir.load(str(file))
        collectives = [node for node in model.graph if node.op_type == COLLECTIVE]
        assert len(collectives) >= 4
        assert {node.attributes.get_int("nb_rank") for node in collectives} == {2}
        assert {value.name for value in model.graph.outputs} == {v.name for v in ir.load(str(whole)).graph.outputs}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    return prepared(tmp_path_factory.mktemp("bert"), "BertModel", num_attention_heads=4, num_hidden_layers=1)


def test_each_rank_holds_its_share_of_every_layer(bert: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    whole, share = ir.load(str(bert[0])), ir.load(str(bert[0]))
    sharding = shard(share, 4, 1)
    assert len(sharding.columns) == 4 and len(sharding.rows) == 2
    assert divide(bert[0], 4, bert[1], tmp_path)[1] < 1e-5

    def weights(model: ir.Model) -> int:
        nodes = {node.name: node for node in model.graph}
        names = [*sharding.columns, *sharding.rows]
        return sum(nodes[name].inputs[1].const_value.size for name in names)  # type: ignore[union-attr]

    assert weights(share) * 4 == weights(whole)
    heads = [node.attributes.get_int("num_heads") for node in share.graph if node.op_type == "SparseAttention"]
    assert heads == [1]


def test_a_wrong_share_is_noticed(
    bert: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the proof is for: with the first rank's share in every place the sum is wrong."""
    from effc.compiler import engine_ranks
    from effc.errors import PassFailedError

    monkeypatch.setattr(engine_ranks, "shard", lambda model, ranks, rank: shard(model, ranks, 0))
    with pytest.raises(PassFailedError, match="Divided between 2 GPUs the model would be off by"):
        divide(*(bert[0], 2, bert[1], tmp_path))


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_rounded_layers_are_divided_with_their_scales(mode: str, tmp_path: Path) -> None:
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    whole, feeds = prepared(tmp_path, "LlamaForCausalLM", {"mode": mode}, num_hidden_layers=1, **changes)
    files, error = divide(whole, 2, feeds, tmp_path)
    assert error < 5e-3
    kinds = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN}
    for file in files:
        tensors = [value.const_value for value in ir.load(str(file)).graph.initializers.values()]
        rounded = [tensor for tensor in tensors if tensor.dtype in kinds and len(tensor.shape) > 1]
        assert len(rounded) >= 6
    assert graph_error(whole, tmp_path / "whole.ranks.onnx", feeds) == error


class TestRefusals:
    def test_heads_that_do_not_come_out(self, bert: tuple[Path, dict[str, np.ndarray]]) -> None:
        with pytest.raises(PreconditionError, match=r"3 GPUs cannot share evenly.*--tensor-parallel"):
            shard(ir.load(str(bert[0])), 3, 0)

    def test_what_is_no_engine(self) -> None:
        recipe = build_recipe({"model": "m", "engine": {"tensor_parallel": 2}})
        with pytest.raises(UsageError, match="settings for engines"):
            check_engine(recipe)

    @pytest.mark.parametrize("shapes", [[], ["1x64", "8x64"]])
    def test_several_profiles(self, shapes: list[str]) -> None:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        engine = {"tensor_parallel": 2, "shapes": shapes, "plugin": False}
        recipe = build_recipe({"model": "m", "target": "tensorrt_rtx", "engine": engine})
        with pytest.raises(UsageError, match="one optimization profile"):
            check_engine(recipe)

    def test_models_that_write(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        path = tiny_checkpoints.save_lively(tmp_path / "m", "LlamaForCausalLM")
        engine = {"tensor_parallel": 2, "shapes": "2x32", "plugin": False}
        with pytest.raises(UsageError, match="--no-generation"):
            effc.compile(path, target="tensorrt_rtx", engine=engine, output=tmp_path / "out")


@pytest.mark.slow
def test_engines_are_built_with_their_collectives(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = tiny_checkpoints.save_lively(tmp_path / "m", "BertModel", hidden_size=64, intermediate_size=96)
    made = effc.compile(
        path,
        attention="local:8",
        target="tensorrt_rtx",
        engine={"arch": "sm_89", "shapes": "4x64", "plugin": False, "tensor_parallel": 2},
        output=tmp_path / "out",
        verify={"samples": 2},
    )
    record = made.manifest.engines
    assert record is not None and record.tensor_parallel == 2
    assert [(engine.file, engine.rank) for engine in record.engines] == [
        (f"engines/forward.sm_89.rank{rank}.plan", rank) for rank in range(2)
    ]
    assert record.graphs["forward"].divided_error < 1e-5
    assert "2 GPUs compute every layer together" in (made.path / "report.html").read_text()
    with pytest.raises(MissingDependencyError, match="2 GPUs compute these engines together"):
        effc.load(made.path, engine=True)
