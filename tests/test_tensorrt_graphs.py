"""Graphs for engines of small models, run by ONNX Runtime: half precision, INT8 and FP8, prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_checkpoints
import torch

from effc.compiler.engine_check import check_engine
from effc.compiler.engine_proof import graph_error, step_error
from effc.compiler.engine_sources import generation_sources
from effc.compiler.engine_text import write_on
from effc.compiler.engines import EngineSource, build_engines
from effc.compiler.exported import exported_graph
from effc.compiler.generation import Prompt
from effc.compiler.inputs import ragged_inputs
from effc.compiler.manifest import AttentionLayer
from effc.compiler.recipe import build_recipe
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.errors import PassFailedError, PreconditionError
from effc.exporters.engine_build import Request, build_engine
from effc.exporters.engine_graph import EngineGraph, make_engine_graph, save_engine_graph
from effc.exporters.generation_export import positions_of
from effc.exporters.half_precision import to_half
from effc.exporters.onnx_graph import save_onnx
from effc.exporters.tensorrt_flavours import FLAVOURS
from effc.passes.prepare_engine import PrepareEngine
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes

QUANTIZED = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@dataclass
class Exported:
    """A source model with its attention rewritten, and its exported graph."""

    source: SourceModel
    layers: list[AttentionLayer]
    graph: Path

    def prepared(self) -> ir.Model:
        model = ir.load(str(self.graph))
        PrepareEngine().run(model)
        return model

    def batch(self, *lengths: int, side: str = "right") -> dict[str, np.ndarray]:
        inputs = ragged_inputs(self.source, lengths, side=side)
        return {name: value.numpy() for name, value in inputs.items()}


def export(folder: Path, kind: str, form: str = "local:8") -> Exported:
    path = tiny_checkpoints.save_lively(folder, kind, **SIZES)
    recipe = build_recipe({"model": str(path), "attention": form})
    source = load(locate(recipe.model))
    layers = rewrite(source, recipe.attention).layers
    return Exported(source, layers, exported_graph(source, layers)[0])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(cache, tmp_path_factory) -> Exported:
    return export(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


def quantized(exported: Exported, mode: str) -> ir.Model:
    recipe = build_recipe({"quantization": {"mode": mode, "layers": {"*layer*": mode}}})
    model = exported.prepared()
    for step in engine_quantizing_passes(recipe.quantization, [exported.batch(40, 30)]):
        step.run(model)
        step.ensures(model)
    return model


def saved(graph: EngineGraph, path: Path) -> Path:
    save_engine_graph(graph, path, builder=False)
    return path


def reads(node: ir.Node, kinds) -> list[bool]:
    """For each input of a product, whether it is dequantized from one of these types."""
    found = []
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        found.append(
            producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0].dtype in kinds
        )
    return found


def test_half_precision_is_close_to_fp32(llama, tmp_path):
    graph = make_engine_graph(llama.prepared(), "fp16", plugin=False)
    assert not graph.attention.plugins and len(graph.attention.written_out) == 2
    halves = [v for v in graph.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16]
    assert len(halves) > 10 and graph.model.graph.outputs[0].dtype == ir.DataType.FLOAT
    error = graph_error(llama.graph, saved(graph, tmp_path / "half.onnx"), llama.batch(40, 17))
    assert 1e-5 < error < 2e-2


def test_angles_of_rotary_embeddings_stay_fp32(llama):
    graph = make_engine_graph(llama.prepared(), "bf16", plugin=True)
    assert len(graph.attention.plugins) == 2
    for node in graph.model.graph:
        if node.op_type in ("Cos", "Sin"):
            assert node.inputs[0].dtype == ir.DataType.FLOAT and node.outputs[0].dtype == ir.DataType.FLOAT
        if node.op_type in ("MatMul", "RotaryEmbedding", "RMSNormalization", "SparseAttention"):
            kinds = {value.dtype for value in node.inputs if value is not None and value.dtype.is_floating_point()}
            assert kinds <= {ir.DataType.BFLOAT16}, (node.op_type, kinds)


def test_norms_are_one_operator_each(llama):
    kinds = [node.op_type for node in llama.prepared().graph]
    assert kinds.count("RMSNormalization") == 5 and "Pow" not in kinds


def test_numbers_beyond_fp16_are_clipped_and_counted():
    value = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    mask = ir.Value(name="mask", const_value=ir.tensor(np.array([-3.4e38, 1.0], np.float32), name="mask"))
    mask.dtype, mask.shape = ir.DataType.FLOAT, ir.Shape([2])
    add = ir.node("Add", [value, mask])
    add.outputs[0].name, add.outputs[0].dtype, add.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([2])
    graph = ir.Graph([value], [add.outputs[0]], nodes=[add], initializers=[mask], opset_imports={"": 23}, name="g")
    done = to_half(ir.Model(graph, ir_version=10), ir.DataType.FLOAT16)
    assert done.clipped == 1
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString())
    (found,) = session.run(None, {"x": np.zeros(2, np.float32)})
    assert found.tolist() == [-65504.0, 1.0] and found.dtype == np.float32


def test_graphs_that_overflow_are_refused(llama, tmp_path):
    model = llama.prepared()
    weight = model.graph.initializers["model.layers.0.input_layernorm.weight"]
    weight.const_value = ir.tensor(np.full(weight.shape.numpy(), 6e4, np.float32), name=weight.name)
    graph = make_engine_graph(model, "fp16", plugin=False)
    with pytest.raises(PassFailedError, match="not finite in the engine's precision"):
        graph_error(llama.graph, saved(graph, tmp_path / "half.onnx"), llama.batch(20, 9))


@pytest.mark.parametrize(("mode", "kind"), [("int8", ir.DataType.INT8), ("fp8", ir.DataType.FLOAT8E4M3FN)])
def test_quantized_layers_read_two_dequantized_factors(llama, mode, kind, tmp_path):
    model = quantized(llama, mode)
    save_onnx(model, tmp_path / "fp32.onnx")
    graph = make_engine_graph(model, "fp16", plugin=True)
    low = [name for name, precision in graph.linears.items() if precision == mode]
    assert len(low) == 14 and all(name.startswith("model.layers.") for name in low)
    nodes = {node.name: node for node in graph.model.graph}
    for name in low:
        assert reads(nodes[name], (kind,)) == [True, True]
    for node in graph.model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].dtype == ir.DataType.FLOAT16
            zero = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
            assert zero is None or not zero.numpy().astype(np.float32).any()
    plain = make_engine_graph(ir.load(str(tmp_path / "fp32.onnx")), "fp16", plugin=False)
    batch = llama.batch(40, 17)
    exact = graph_error(llama.graph, tmp_path / "fp32.onnx", batch)
    half = graph_error(llama.graph, saved(plain, tmp_path / "half.onnx"), batch)
    assert 0 < exact < 0.5 and half < 1.5 * exact + 0.02


def test_int8_without_calibration_data_is_refused(llama):
    settings = build_recipe({"quantization": "int8"}).quantization
    (step,) = engine_quantizing_passes(settings, None)
    with pytest.raises(PreconditionError, match="Give --calibration FILE"):
        step.run(llama.prepared())


def test_no_operator_of_onnx_runtime_is_left(llama):
    graph = make_engine_graph(llama.prepared(), "fp16", plugin=False)
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""} and not graph.model.functions


class _Runner:
    """Engines' graphs in ONNX Runtime."""

    def __init__(self, paths: dict[str, Path]):
        self.sessions = {name: onnxruntime.InferenceSession(str(path)) for name, path in paths.items()}
        self.pasts: list[int] = []

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        session = self.sessions[graph]
        given = {value.name: feeds[value.name] for value in session.get_inputs()}
        if "past_key.0" in given:
            self.pasts.append(given["past_key.0"].shape[1])
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, given), strict=True))

    def numpy(self, value: Any) -> np.ndarray:
        return value


@pytest.fixture(scope="module")
def text(llama, tmp_path_factory):
    """Prefill and decode graphs of the causal model, and its forward graph."""
    work = tmp_path_factory.mktemp("text")
    forward = work / "model.onnx"
    save_onnx(llama.prepared(), forward)
    given = (Schemes(build_recipe({}).quantization), Remembered())
    sources = generation_sources(llama.source, llama.layers, build_recipe({}), None, given, llama.graph, forward, work)
    return forward, sources


def test_decoding_token_by_token_is_the_forward_pass(text):
    _, (prefill, decode) = text
    assert [prefill.name, decode.name] == ["prefill", "decode"] and decode.step_error < 1e-5
    assert {cache.most for cache in decode.caches} == {7} and decode.pads


@pytest.mark.slow
def test_a_wrong_cache_is_noticed(text, llama, tmp_path):
    forward, (prefill, decode) = text
    model = ir.load(str(decode.path))
    node = next(node for node in model.graph if node.domain == "effc")
    node.attributes["pattern"] = ir.AttrString("pattern", "local:3")
    from effc.plugins.function_body import attach_bodies

    attach_bodies(model)
    save_onnx(model, tmp_path / "wrong.onnx")
    with pytest.raises(PassFailedError, match="The decode graph is off by"):
        step_error(llama.source, forward, prefill.path, tmp_path / "wrong.onnx", exact=True)


def test_text_is_written_with_two_graphs_and_bounded_caches(text, llama):
    _, (prefill, decode) = text
    runner = _Runner({"prefill": prefill.path, "decode": decode.path})
    batch = llama.batch(20, 11, side="left")
    prompt = Prompt(batch["input_ids"], batch["attention_mask"].astype(bool))
    written = list(write_on(runner, prompt, max_length=64, ends=[], padding=0, max_new_tokens=6))
    assert runner.pasts == [7] * 5
    tokens = torch.from_numpy(np.concatenate([prompt.tokens, *(step[:, None] for step in written)], axis=1))
    mask = torch.from_numpy(np.pad(batch["attention_mask"], ((0, 0), (0, 6)), constant_values=1))
    positions = positions_of(mask)
    with torch.no_grad():
        logits = llama.source.model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    assert np.array_equal(logits[:, 19:25].argmax(-1).numpy(), np.stack(written, axis=1))


# --- engines ---------------------------------------------------------------------------------------------------------


def test_engines_are_built_without_the_plugin(text, llama, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    _, sources = text
    told: list[str] = []
    whole = build_recipe({"target": "tensorrt_rtx", "engine": {"arch": "sm_89", "shapes": "2x32", "plugin": False}})
    plan = check_engine(whole)
    record = build_engines(plan, whole.engine, sources[1:], 64, llama.graph, {}, tmp_path, told.append)
    (engine,) = record.engines
    assert (tmp_path / engine.file).stat().st_size > 10_000 and engine.graph == "decode" and engine.arch == "sm_89"
    assert set(engine.linears.values()) == {"fp16 gemm"} and len(engine.linears) == 15
    assert all(kernel.startswith("TensorRT ") for kernel in engine.attention.values()) and record.plugin is None
    assert engine.profiles[0]["past_key.0"][2] == [2, 7, 32] and record.not_run == "engines not run: no device"
    assert any("decode sm_89" in line and "%" in line for line in told)
    kinds = {tensor.name: tensor.dtype for tensor in (*engine.inputs, *engine.outputs)}
    assert kinds["past_key.0"] == kinds["present_value.1"] == "float16" and kinds["logits"] == "float"


def test_tensorrts_own_words_are_passed_on(tmp_path, text, llama):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    _, sources = text
    model = ir.load(str(sources[0].path))
    node = next(node for node in model.graph if node.op_type == "MatMul")
    node.op_type, node.name = "Frobnicate", "the culprit"
    ir.save(model, str(sources[0].path.with_name("broken.onnx")))
    broken = EngineSource("forward", sources[0].path.with_name("broken.onnx"))
    graph = make_engine_graph(ir.load(str(broken.path)), "fp32", plugin=False)
    request = Request(
        "tensorrt_rtx", str(saved(graph, tmp_path / "g.onnx")), str(tmp_path / "p"), str(tmp_path / "l"), None, None,
        89, [],
    )  # fmt: skip
    with pytest.raises(PassFailedError, match=r"TensorRT-RTX did not build the engine 'x':.*Frobnicate"):
        build_engine(FLAVOURS["tensorrt_rtx"], request, "x")
