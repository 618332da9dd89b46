"""Queries, keys and values in 8 bits: the operator computes with exactly the rounded numbers, in every graph."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import tiny_checkpoints
from attention_cases import expected, one_node_model, random_inputs, session

import effc
from effc.compiler.artifact_files import GENERATION_NAME, MODEL_NAME
from effc.compiler.recipe import build_recipe
from effc.compiler.report_command import command_line
from effc.errors import PreconditionError, UsageError
from effc.exporters.engine_graph import EngineGraph, Precision, make_engine_graph
from effc.passes.quantize import quantize
from effc.passes.quantize_activation import FORMATS
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry

GEOMETRY = AttentionGeometry(
    parse_form("local:6|sinks:1"), causal=True, num_heads=4, kv_heads=2, head_dim=16, scale=0.3
)
BATCH, LENGTH = 2, 21


def graph() -> ir.Model:
    model = ir.from_proto(one_node_model(GEOMETRY, masked=True))
    next(iter(model.graph)).name = "layer.0.attention"
    return model


def inputs(seed: int) -> dict[str, np.ndarray]:
    feed = random_inputs(GEOMETRY, BATCH, LENGTH, LENGTH, seed, "right")
    # One outlier each, at other places than the calibration data have them.
    for name in ("query", "key", "value"):
        feed[name].flat[seed] *= 20
    return feed


def rounded(array: np.ndarray, kind: str, peak: float) -> np.ndarray:
    """The array as the named format gives it back, computed without ONNX."""
    if kind == "fp8":
        step = np.float32(peak) / np.float32(448)
        return (np.clip(array / step, -448, 448).astype(ml_dtypes.float8_e4m3fn)).astype(np.float32) * step
    step = np.float32(peak) / np.float32(127)
    return np.clip(np.rint(array / step), -128, 127).astype(np.float32) * step


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_attention_reads_the_rounded_numbers(kind: str, calibrated: bool) -> None:
    model, feed, samples = graph(), inputs(3), [inputs(8), inputs(9)]
    quantize(model, QuantizationSection(attention=kind), samples if calibrated else None)
    (found,) = session(ir.to_proto(model)).run(None, feed)
    exact = dict(feed)
    for name in ("query", "key", "value"):
        seen = samples if calibrated else [feed]
        # A fixed FP8 scale leaves room for twice what was seen.
        headroom = 2 if calibrated and kind == "fp8" else 1
        exact[name] = rounded(feed[name], kind, headroom * max(float(np.abs(sample[name]).max()) for sample in seen))
        assert not np.array_equal(exact[name], feed[name])
    reference = expected(GEOMETRY, exact)
    np.testing.assert_allclose(found, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_excluded_layers_stay_and_slips_are_refused() -> None:
    def tried(exclude: str) -> None:
        quantize(graph(), QuantizationSection(attention="fp8", exclude=(exclude,)), None)

    with pytest.raises(PreconditionError, match="no attention operator is left"):
        tried("layer.*")
    with pytest.raises(PreconditionError, match=r"'layr.0.attention' in quantization.exclude.*\n?.*layer.0.attention"):
        tried("layr.0.attention")
    with pytest.raises(UsageError, match=r"attention"):
        build_recipe({"model": "x", "quantization": {"attention": "int4"}})
    twice = graph()
    quantize(twice, QuantizationSection(attention="int8"), None)
    with pytest.raises(PreconditionError, match="quantized already"):
        quantize(twice, QuantizationSection(attention="int8"), None)


def lowered(kind: str, precision: Precision = "fp16", plugin: bool = True) -> tuple[EngineGraph, ir.Node]:
    """A graph for the builder, and its attention."""
    model = graph()
    for step in engine_quantizing_passes(QuantizationSection(attention=kind), [inputs(8)]):
        step.run(model)
        step.ensures(model)
    made = make_engine_graph(model, precision, plugin=plugin)
    return made, next(node for node in made.model.graph if node.op_type in ("SparseAttention", "Attention"))


def check_pair(dequantize: ir.Node, kind: str, dtype: ir.DataType) -> None:
    quantize_node = dequantize.inputs[0].producer()
    assert (dequantize.op_type, quantize_node.op_type) == ("DequantizeLinear", "QuantizeLinear")
    for pair in (dequantize, quantize_node):
        scale = ir.convenience.get_const_tensor(pair.inputs[1])
        assert scale.size == 1 and scale.dtype == dtype and "axis" not in pair.attributes
    assert quantize_node.inputs[2].dtype == FORMATS[kind].dtype


def test_the_plugin_of_an_engine_reads_int8_pairs_with_one_scale() -> None:
    made, node = lowered("int8")
    assert set(made.attention.plugins) == {"layer.0.attention"} and made.attention.eight_bit == []
    for value in node.inputs[:3]:
        check_pair(value.producer(), "int8", ir.DataType.FLOAT16)


@pytest.mark.parametrize("precision, dtype", [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)])
def test_the_plugin_of_an_engine_reads_fp8_as_it_is(precision: Precision, dtype: ir.DataType) -> None:
    made, node = lowered("fp8", precision)
    assert made.attention.eight_bit == ["layer.0.attention"]
    assert [entry.op_type for entry in made.model.graph].count("DequantizeLinear") == 0
    for name, value in zip(("query", "key", "value"), node.inputs[:3], strict=True):
        assert value.dtype == ir.DataType.FLOAT8E4M3FN and value.producer().op_type == "QuantizeLinear"
        scale = ir.convenience.get_const_tensor(value.producer().inputs[1])
        assert scale.dtype == dtype
        assert node.attributes[f"{name}_scale"].as_float() == float(scale.numpy())
    assert node.attributes["output_type"].as_int() == node.outputs[0].dtype == dtype


@pytest.mark.parametrize(
    "precision, plugin, dtype", [("fp32", True, ir.DataType.FLOAT), ("fp16", False, ir.DataType.FLOAT16)]
)
def test_other_kernels_read_fp8_pairs(precision: Precision, plugin: bool, dtype: ir.DataType) -> None:
    """What the FP8 kernels do not write, and what TensorRT computes itself."""
    made, node = lowered("fp8", precision, plugin)
    assert made.attention.eight_bit == []
    for value in node.inputs[:3]:
        check_pair(value.producer(), "fp8", dtype)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def scales(path: Path) -> dict[str, list[float]]:
    """Of query, key and value, by layer."""
    found = {}
    for node in ir.load(str(path)).graph.all_nodes():
        for value in node.inputs[:3] if node.domain == "effc" else ():
            producer = None if value is None else value.producer()
            if producer is not None and producer.op_type == "DequantizeLinear":
                tensor = ir.convenience.get_const_tensor(producer.inputs[1])
                assert tensor is not None
                (scale,) = np.unique(tensor.numpy())
                found.setdefault(str(node.name), []).append(float(scale))
    return found


def test_an_artifact_has_it_in_both_graphs(tmp_path: Path) -> None:
    source = tiny_checkpoints.save_lively(tmp_path / "llama", "LlamaForCausalLM")
    made = effc.compile(
        source,
        attention="local:64",
        quantization={"attention": "fp8", "exclude": ["*layers.1*"]},
        calibration=[{"text": "a good film but the plot was dull"}, {"text": "the acting was great"}],
        bench={"enabled": False},
        verify={"samples": 1},
        output=tmp_path / "fp8",
    )
    record = next(step for step in made.manifest.passes if step.name == "quantize-attention")
    assert record.changed == ["model.layers.0.self_attn"]
    assert [(one.module, one.reason) for one in record.skipped] == [
        ("model.layers.1.self_attn", "excluded by '*layers.1*'")
    ]
    assert record.probe is not None and 1e-5 < max(one.relative_error for one in record.probe.values()) < 0.2
    forward = scales(tmp_path / "fp8" / MODEL_NAME)
    assert list(forward) == record.changed and len(forward[record.changed[0]]) == 3
    constants = ir.load(str(tmp_path / "fp8" / GENERATION_NAME)).graph.initializers
    tensors = (value.const_value for value in constants.values())
    numbers = {float(tensor.numpy().flat[0]) for tensor in tensors if tensor is not None and tensor.size}
    assert set(forward[record.changed[0]]) <= numbers
    assert "--quant-attention=fp8" in command_line(made.manifest.recipe, "model")
    ids = (np.arange(20) % 25 + 5)[None]
    written = effc.load(tmp_path / "fp8").generate(input_ids=ids, max_new_tokens=5, eos_token_id=[])
    assert written.shape[-1] == 25
