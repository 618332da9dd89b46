"""Products behind gates in INT8 for engines: their outliers are multiplied beside them, in floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_tensorrt_graphs import Exported, export, reads

from effc.compiler.engine_check import check_engine
from effc.compiler.engine_proof import graph_error
from effc.compiler.engines import EngineSource, build_engines
from effc.compiler.recipe import Recipe, build_recipe
from effc.exporters.engine_graph import make_engine_graph
from effc.exporters.onnx_graph import save_onnx
from effc.passes import quantize_engine
from effc.passes.quantize_find import find_linears
from effc.passes.quantize_fold import scale_rows
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_graph import Editor
from effc.passes.quantize_observe import Remembered

DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
# Channels in front of them, and what they are multiplied by.
SPIKES, HEIGHT = [5, 77], 500.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield export(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


def spiked(llama: Exported) -> ir.Model:
    """The graph with outliers behind its gates; it computes what it did."""
    model = llama.prepared()
    for linear in list(find_linears(model.graph)):
        name, width = linear.columns[0].name, linear.weight().shape
        if name.endswith("up_proj"):
            weight = linear.node.inputs[1]
            array = np.array(linear.weight(), np.float32)
            array[:, SPIKES] *= HEIGHT
            weight.const_value = ir.tensor(array, name=weight.name)
        elif name in DOWN:
            rows = np.ones(width[0], np.float32)
            rows[SPIKES] = 1 / HEIGHT
            scale_rows(Editor(model.graph), linear, rows)
    return model


def recipe() -> Recipe:
    engine = {"arch": "sm_89", "shapes": "2x64", "plugin": False}
    quantization = {"mode": "int8", "layers": {"*layer*": "int8"}}
    return build_recipe({"target": "tensorrt_rtx", "engine": engine, "quantization": quantization})


def quantized(llama: Exported, remembered: Remembered | None = None) -> ir.Model:
    model = spiked(llama)
    for step in engine_quantizing_passes(recipe().quantization, [llama.batch(40, 30)], None, remembered):
        step.run(model)
        step.ensures(model)
    return model


def error_of(model: ir.Model, llama: Exported, folder: Path) -> float:
    save_onnx(model, folder / "model.onnx")
    return graph_error(llama.graph, folder / "model.onnx", llama.batch(40, 17))


def test_outliers_do_not_set_the_scale_of_the_others(llama, tmp_path, monkeypatch):
    assert error_of(spiked(llama), llama, tmp_path) < 1e-5
    error = error_of(quantized(llama), llama, tmp_path)
    monkeypatch.setattr(quantize_engine, "split_gated", lambda *_: [])
    assert error < 0.6 * error_of(quantized(llama), llama, tmp_path)


def test_the_rest_is_an_int8_layer_like_any_other(llama):
    graph = make_engine_graph(quantized(llama), "fp16", plugin=False)
    nodes = {node.name: node for node in graph.model.graph}
    for name in DOWN:
        assert graph.linears[name] == "int8" and graph.linears[f"{name}.outliers"] == "fp16"
        assert reads(nodes[name], (ir.DataType.INT8,)) == [True, True]
        gather = nodes[f"{name}.outliers"].inputs[0].producer()
        channels = gather.inputs[1].const_value.numpy()
        assert gather.op_type == "Gather" and len(channels) == 8 and set(SPIKES) <= set(channels.tolist())


def test_two_graphs_of_a_model_have_the_same_outliers(llama):
    remembered = Remembered()
    one, other = (quantized(llama, remembered) for _ in range(2))
    constants = [
        {name: value.const_value.numpy() for name, value in model.graph.initializers.items()} for model in (one, other)
    ]
    assert constants[0].keys() == constants[1].keys()
    for name, array in constants[0].items():
        np.testing.assert_array_equal(array, constants[1][name])


def test_gates_nobody_asked_for_stay_as_they_are(llama):
    model = llama.prepared()
    (step,) = engine_quantizing_passes(build_recipe({"quantization": "int8"}).quantization, [llama.batch(40)])
    result = step.run(model)
    assert result.metrics["split"] == 0 and {name for name, _ in result.skipped} >= set(DOWN)


def test_tensorrt_computes_them_in_int8(llama, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    save_onnx(quantized(llama), tmp_path / "forward.onnx")
    whole = recipe()
    source = EngineSource("forward", tmp_path / "forward.onnx")
    plan = check_engine(whole, calibration_given=True)
    record = build_engines(
        plan, whole.engine, [source], 64, llama.graph, llama.batch(40, 17), tmp_path, lambda what: None
    )
    (engine,) = record.engines
    assert {engine.linears[name] for name in DOWN} == {"int8 gemm"} and not engine.warnings
    assert sum(kernel == "int8 gemm" for kernel in engine.linears.values()) == 14
