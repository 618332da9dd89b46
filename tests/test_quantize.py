"""INT8 on ONNX graphs: close to fp32, fast kernels under default options, exclusions, refusals."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cpu_products import SATURATES
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from effc.compiler.recipe import build_recipe
from effc.errors import DataError, PassFailedError, PreconditionError
from effc.passes.quantize_int8 import QuantizeInt8
from effc.passes.quantize_numbers import activation_range, quantize_bias, quantize_columns, quantize_rows
from effc.passes.quantize_settings import CalibrationSection, QuantizationSection
from effc.passes.quantize_unfuse import split_slow_fusions

Feeds = dict[str, npt.NDArray[Any]]
INT8 = QuantizationSection(mode="int8", reduce_range=SATURATES)
VOCABULARY = 600


@pytest.fixture(scope="module")
def bert_bytes() -> bytes:
    """A random BERT (2 layers of 64) as the exporter leaves it: fused norms and GELU, packed projections."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial biases are zero and initial gains one, which would hide errors in either.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    program = OnnxExporter().export(
        model,
        {name: torch.from_numpy(value) for name, value in tokens(0, batch=2).items()},
        OnnxConfig(dynamic=True, opset_version=23, ort_fusions="cpu"),
    )
    return ir.to_proto(program.program).SerializeToString()


@pytest.fixture
def bert(bert_bytes: bytes) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(bert_bytes))


def tokens(seed: int, batch: int = 2, length: int = 24) -> Feeds:
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[0, -3:] = 0
    ids = rng.integers(0, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def run(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    """In a plain session with default options."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()}))


def kernels(model: ir.Model, feeds: Feeds, folder: Path) -> collections.Counter[str]:
    """Names of the kernels that run under default options."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return collections.Counter(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))


def relative_error(got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def op_types(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def float_products(model: ir.Model) -> list[str]:
    """Names of weights that a MatMul or Gemm still reads as constant float matrices."""
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            found.append(str(weight.name))
    return found


def graph(
    nodes: list[onnx.NodeProto],
    constants: dict[str, npt.NDArray[Any]],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str] | None],
    functions: list[onnx.FunctionProto] | None = None,
) -> ir.Model:
    value = helper.make_tensor_value_info
    integer = ("ids",)
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [value(n, TensorProto.INT64 if n in integer else TensorProto.FLOAT, s) for n, s in inputs.items()],
            [value(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid("com.microsoft", 1),
            helper.make_opsetid("effc", 1),
        ],
        functions=functions or [],
        ir_version=10,
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


NORM = {"gain": np.ones(64, np.float32)}


def layer(
    *, rank: int, op: str = "MatMul", bias: npt.NDArray[np.float32] | None = None, weight: Any = None, **attributes: Any
) -> ir.Model:
    """One linear layer ``x [.., 64] -> [.., 64]`` with a normalization behind it, so that it is no output head."""
    constants = {"w": normal(64, 64, seed=5, scale=0.1) if weight is None else weight, **NORM}
    if bias is not None:
        constants["b"] = bias
    if op == "Gemm":
        inputs = ["x", "w", "b"] if bias is not None else ["x", "w"]
        nodes = [helper.make_node("Gemm", inputs, ["y"], name="product", **attributes)]
    elif bias is not None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
            helper.make_node("Add", ["p", "b"], ["y"]),
        ]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    nodes.append(helper.make_node("LayerNormalization", ["y", "gain"], ["z"]))
    dimensions: list[int | str] = ["batch", "length", 64][-rank:]
    return graph(nodes, constants, {"x": dimensions}, {"z": None})


# Closeness


def test_dynamic_is_close_to_fp32(bert: ir.Model) -> None:
    feeds = tokens(1)
    wanted = run(bert, feeds)
    result = QuantizeInt8(INT8).run(bert)
    assert result.modified and result.metrics["form"] == "dynamic"
    for got, want in zip(run(result.model, feeds), wanted, strict=True):
        assert 0 < relative_error(got, want) < 0.03


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_static_is_close_to_fp32(bert: ir.Model, method: str) -> None:
    feeds = tokens(1)
    wanted = run(bert, feeds)
    settings = QuantizationSection(mode="int8", calibration=CalibrationSection(method=method))
    result = QuantizeInt8(settings, [tokens(seed) for seed in range(2, 6)]).run(bert)
    assert result.metrics["form"] == "static" and result.metrics["calibration_method"] == method
    # KL-optimal ranges cut tails on purpose.
    bound = 0.1 if method == "entropy" else 0.03
    for got, want in zip(run(result.model, feeds), wanted, strict=True):
        assert 0 < relative_error(got, want) < bound


def test_batch_and_length_stay_free(bert: ir.Model) -> None:
    wanted = {shape: run(bert, tokens(3, *shape))[0] for shape in ((1, 8), (3, 40))}
    model = QuantizeInt8(INT8, [tokens(2)]).run(bert).model
    for shape, want in wanted.items():
        assert relative_error(run(model, tokens(3, *shape))[0], want) < 0.03


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_is_close_to_fp32(static: bool, transposed: int, with_bias: bool) -> None:
    weight = normal(64, 64, seed=3, scale=0.1)
    model = layer(rank=2, op="Gemm", bias=normal(64) if with_bias else None, weight=weight, transB=transposed)
    feeds = {"x": normal(10, 64, seed=9)}
    wanted = run(model, feeds)[0]
    result = QuantizeInt8(INT8, [feeds] if static else None).run(model)
    assert result.changed == ["w"]
    assert relative_error(run(result.model, feeds)[0], wanted) < 0.02


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("static", [False, True])
def test_a_bias_beside_a_vanishing_column_does_not_overflow(rank: int, static: bool) -> None:
    weight, bias = normal(64, 64, scale=0.1), np.full(64, 3.0, np.float32)
    weight[:, 0] = 1e-20
    weight[:, 1] = 0
    model = layer(rank=rank, bias=bias, weight=weight)
    feeds = {"x": normal(*(2, 10, 64)[3 - rank :], seed=9)}
    wanted = run(model, feeds)[0]
    result = QuantizeInt8(INT8, [feeds] if static else None).run(model)
    assert relative_error(run(result.model, feeds)[0], wanted) < 0.02


def test_a_transposed_weight_is_found() -> None:
    model = graph(
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
            helper.make_node("LayerNormalization", ["y", "gain"], ["z"]),
        ],
        {"w": normal(64, 32, scale=0.1), "gain": np.ones(64, np.float32)},
        {"x": ["batch", "length", 32]},
        {"z": None},
    )
    feeds = {"x": normal(1, 5, 32, seed=2)}
    wanted = run(model, feeds)[0]
    result = QuantizeInt8(INT8).run(model)
    assert result.modified and relative_error(run(result.model, feeds)[0], wanted) < 0.02


# The numbers


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans())
def test_every_column_is_within_half_a_step(rows: int, columns: int, seed: int, reduce_range: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-6, 6, columns)).astype(np.float32)
    quantized = quantize_columns(weight, reduce_range=reduce_range)
    assert quantized.scale.shape == (columns,)
    assert np.abs(quantized.values).max() <= (63 if reduce_range else 127)
    error = np.abs(quantized.values * quantized.scale.astype(np.float64) - weight)
    assert np.all(error <= 0.5001 * quantized.scale)


def test_rows_have_a_scale_each() -> None:
    table = normal(5, 8) * np.array([[1], [100], [1e-3], [0], [7]], np.float32)
    quantized = quantize_rows(table)
    assert quantized.scale.shape == (5, 1)
    assert np.all(np.abs(quantized.values * quantized.scale - table) <= 0.5001 * quantized.scale)


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_activation_range_holds_zero_and_both_ends(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero = activation_range(low, high)
    reached_low, reached_high = -float(zero) * float(scale), (255 - float(zero)) * float(scale)
    assert reached_low <= min(low, 0) + float(scale) and reached_high >= max(high, 0) - float(scale)


def test_bias_is_in_units_of_the_products() -> None:
    assert quantize_bias(np.array([1.0, -2.0], np.float32), np.array([0.5, 0.25], np.float32)).tolist() == [2, -8]


def test_weights_have_a_scale_per_output_channel(bert: ir.Model) -> None:
    weights = {
        node.name: node.inputs[1].const_value
        for node in bert.graph
        if node.op_type == "MatMul" and node.inputs[1].const_value
    }
    wanted = sorted(
        np.abs(tensor.numpy()).max(0).tolist() for name, tensor in weights.items() if tensor.shape[1] == 128
    )
    model = QuantizeInt8(QuantizationSection(mode="int8")).run(bert).model
    got = sorted(
        (
            model.graph.initializers[f"encoder.layer.{i}.intermediate.dense.weight_scale"].const_value.numpy() * 127
        ).tolist()
        for i in range(2)
    )
    assert np.allclose(got, wanted, rtol=1e-5)
    assert len(np.unique(got)) == 256


def test_reduced_range_keeps_weights_to_7_bits(bert: ir.Model) -> None:
    model = QuantizeInt8(QuantizationSection(mode="int8", reduce_range=True)).run(bert).model
    peaks = [
        np.abs(node.inputs[1].const_value.numpy()).max() for node in model.graph if node.op_type == "MatMulInteger"
    ]
    assert peaks and max(peaks) == 63


# What is emitted and what runs


def test_dynamic_graph_runs_integer_kernels(bert: ir.Model, tmp_path: Path) -> None:
    result = QuantizeInt8(INT8).run(bert)
    kinds = op_types(result.model)
    # Two layers of query, key, value, output and two feed-forward products over four distinct inputs.
    assert kinds["MatMulInteger"] == 12 and kinds["DynamicQuantizeLinear"] == 8
    assert not {"QLinearMatMul", "SkipLayerNormalization", "BiasGelu", "Split"} & kinds.keys()
    ran = kernels(result.model, tokens(1), tmp_path)
    assert ran["DynamicQuantizeMatMul"] + ran["MatMulIntegerToFloat"] == 12
    assert not ran["MatMulInteger"] and not ran["SkipLayerNormalization"] and not ran["BiasGelu"]


def test_static_graph_runs_integer_kernels(bert: ir.Model, tmp_path: Path) -> None:
    result = QuantizeInt8(INT8, [tokens(2)]).run(bert)
    kinds = op_types(result.model)
    assert kinds["QuantizeLinear"] == 8 and not kinds["DynamicQuantizeLinear"]
    ran = kernels(result.model, tokens(1), tmp_path)
    # The pooler is the one float product of a weight; DequantizeLinear would be a weight expanded in every run.
    assert ran["QGemm"] == 12 and ran["Gemm"] + ran["FusedGemm"] == 1 and not ran["DequantizeLinear"]


@pytest.mark.parametrize(("op", "rank"), [("Gemm", 2), ("MatMul", 2), ("MatMul", 3)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_form_falls_back_to_a_float_product(
    op: str, static: bool, rank: int, with_bias: bool, tmp_path: Path
) -> None:
    model = layer(rank=rank, op=op, bias=normal(64) if with_bias else None)
    feeds = {"x": normal(*(2, 10, 64)[3 - rank :], seed=9)}
    result = QuantizeInt8(INT8, [feeds] if static else None).run(model)
    ran = kernels(result.model, feeds, tmp_path)
    assert not {"Gemm", "FusedGemm", "MatMul", "DequantizeLinear", "MatMulInteger", "QLinearMatMul"} & ran.keys()


def test_only_skipped_layers_keep_float_weights(bert: ir.Model) -> None:
    result = QuantizeInt8(INT8).run(bert)
    assert float_products(result.model) == ["pooler.dense.weight"]
    assert [name for name, reason in result.skipped if "output head" in reason] == ["pooler.dense"]
    assert "encoder.layer.0.attention.self.query" in result.changed and len(result.changed) == 13
    assert result.metrics["bytes_after"] < 0.4 * result.metrics["bytes_before"]
    QuantizeInt8(INT8).ensures(result.model)


def test_ensures_names_a_layer_left_behind(bert: ir.Model) -> None:
    with pytest.raises(PassFailedError, match="encoder.layer.0"):
        QuantizeInt8(INT8).ensures(bert)


def test_a_shared_weight_is_stored_once() -> None:
    nodes = []
    for index in range(3):
        nodes.append(helper.make_node("MatMul", [f"x{index}", "w"], [f"y{index}"]))
        nodes.append(helper.make_node("LayerNormalization", [f"y{index}", "gain"], [f"x{index + 1}"]))
    constants = {"w": normal(64, 64, scale=0.1), **NORM}
    model = graph(nodes, constants, {"x0": ["batch", "length", 64]}, {"x3": None})
    result = QuantizeInt8(INT8).run(model)
    assert op_types(result.model)["MatMulInteger"] == 3
    stored = [v for v in result.model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert len(stored) == 1 and "w" not in result.model.graph.initializers


def test_embeddings_are_stored_as_int8(bert: ir.Model) -> None:
    feeds = tokens(1)
    wanted = run(bert, feeds)[0]
    result = QuantizeInt8(INT8).run(bert)
    table = result.model.graph.initializers["embeddings.word_embeddings.weight_int8"]
    assert table.dtype == ir.DataType.INT8 and tuple(table.shape.numpy()) == (VOCABULARY, 64)
    assert "embeddings.word_embeddings.weight" not in result.model.graph.initializers
    assert any(name == "embeddings.token_type_embeddings" for name, _ in result.skipped)
    assert relative_error(run(result.model, feeds)[0], wanted) < 0.03


def test_embeddings_can_stay(bert: ir.Model) -> None:
    result = QuantizeInt8(QuantizationSection(mode="int8", embeddings=False)).run(bert)
    assert "embeddings.word_embeddings.weight" in result.model.graph.initializers
    assert result.metrics["embeddings"] == 0


def test_a_table_that_stays_for_another_reader_is_not_copied() -> None:
    model = graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
            helper.make_node("MatMul", ["rows", "head"], ["logits"]),
        ],
        {"table": normal(500, 64)},
        {"ids": ["batch", "length"]},
        {"logits": None},
    )
    result = QuantizeInt8(INT8).run(model)
    assert not result.modified
    assert {reason.split(":")[0].split(",")[0] for _, reason in result.skipped} == {
        "output head",
        "its table is also read in fp32",
    }


# effc operators, functions and external data


def sparse_attention(overload: str, factor: float) -> onnx.FunctionProto:
    function = helper.make_function(
        "effc",
        "SparseAttention",
        ["q", "k", "v"],
        ["y"],
        [
            helper.make_node("Constant", [], ["c"], value_float=factor),
            helper.make_node("Mul", ["q", "c"], ["m"]),
            helper.make_node("Sum", ["m", "k", "v"], ["y"]),
        ],
        [helper.make_opsetid("", 23)],
        ["pattern", "causal", "num_heads", "kv_num_heads", "scale"],
    )
    function.overload = overload
    return function


def attention_graph() -> ir.Model:
    attributes = {"pattern": "local:4", "causal": 0, "num_heads": 4, "kv_num_heads": 4, "scale": 0.25}
    nodes = [
        helper.make_node("MatMul", ["x", "packed"], ["qkv"]),
        helper.make_node("Split", ["qkv", "sizes"], ["q", "k", "v"], axis=-1),
    ]
    for index, previous in enumerate("qa"):
        node = helper.make_node(
            "SparseAttention",
            [previous, "k", "v"],
            ["ab"[index]],
            f"layer.{index}.attention",
            domain="effc",
            **attributes,
        )
        node.overload = f"pattern_{index}"
        nodes.append(node)
    constants = {"packed": normal(64, 192, scale=0.1), "sizes": np.array([64, 64, 64])}
    functions = [sparse_attention("pattern_0", 2.0), sparse_attention("pattern_1", 5.0)]
    return graph(nodes, constants, {"x": ["batch", "length", 64]}, {"b": ["batch", "length", 64]}, functions)


@pytest.mark.parametrize("static", [False, True])
def test_effc_nodes_and_functions_stay_as_they_are(static: bool) -> None:
    model = attention_graph()
    feeds = {"x": normal(1, 6, 64, seed=3)}
    wanted = run(model, feeds)[0]
    before = [(n.name, n.overload, dict(n.attributes)) for n in model.graph if n.domain == "effc"]
    functions = {key: [str(node) for node in function] for key, function in model.functions.items()}
    result = QuantizeInt8(INT8, [feeds] if static else None).run(model)
    assert [(n.name, n.overload, dict(n.attributes)) for n in result.model.graph if n.domain == "effc"] == before
    assert {key: [str(n) for n in function] for key, function in result.model.functions.items()} == functions
    assert result.metrics["linears"] == 3
    assert relative_error(run(result.model, feeds)[0], wanted) < 0.02


def test_external_data_is_read_and_left_alone(bert: ir.Model, tmp_path: Path) -> None:
    feeds = tokens(1)
    wanted = run(bert, feeds)[0]
    ir.save(bert, tmp_path / "model.onnx", external_data="model.onnx.data")
    data = (tmp_path / "model.onnx.data").read_bytes()
    model = QuantizeInt8(INT8, [tokens(2)]).run(ir.load(tmp_path / "model.onnx")).model
    (tmp_path / "out").mkdir()
    ir.save(model, tmp_path / "out" / "model.onnx", external_data="model.onnx.data")
    assert (tmp_path / "model.onnx.data").read_bytes() == data
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert relative_error(session.run(None, feeds)[0], wanted) < 0.03


def test_calibration_leaves_outputs_as_they_were(bert: ir.Model) -> None:
    outputs = [(value.name, str(value.shape)) for value in bert.graph.outputs]
    model = QuantizeInt8(INT8, [tokens(2)]).run(bert).model
    assert [(value.name, str(value.shape)) for value in model.graph.outputs] == outputs


# Exclusions and refusals


@pytest.mark.parametrize("glob", ["encoder.layer.1.*", "*.query", "*.output.dense"])
def test_globs_match_modules(bert: ir.Model, glob: str) -> None:
    from fnmatch import fnmatchcase

    feeds = tokens(1)
    wanted = run(bert, feeds)[0]
    everything = QuantizeInt8(INT8).run(ir.from_proto(ir.to_proto(bert))).changed
    result = QuantizeInt8(QuantizationSection(mode="int8", exclude=(glob,))).run(bert)
    matching = {name for name in everything if fnmatchcase(name, glob)}
    assert matching and {name for name, reason in result.skipped if glob in reason} == matching
    assert set(result.changed) == set(everything) - matching
    QuantizeInt8(QuantizationSection(mode="int8", exclude=(glob,))).ensures(result.model)
    assert relative_error(run(result.model, feeds)[0], wanted) < 0.03


@pytest.mark.parametrize("glob", ["w", "prod*"])
def test_globs_match_weights_and_nodes(glob: str) -> None:
    result = QuantizeInt8(QuantizationSection(mode="int8", exclude=(glob,))).run(layer(rank=3))
    assert not result.modified and result.skipped == [("w", f"excluded by '{glob}'")]


def test_an_excluded_packed_projection_stays_packed(bert: ir.Model) -> None:
    settings = QuantizationSection(mode="int8", exclude=("encoder.layer.0.attention.self.*",))
    assert op_types(QuantizeInt8(settings).run(bert).model)["Split"] == 1


def test_a_glob_without_match_is_refused(bert: ir.Model) -> None:
    settings = QuantizationSection(mode="int8", exclude=("encoder.layer.0.intermediat.dense",))
    with pytest.raises(PreconditionError, match="matches no layer.*encoder.layer.0.intermediate.dense"):
        QuantizeInt8(settings).requires(bert)


@pytest.mark.parametrize("static", [False, True])
def test_a_quantized_graph_is_refused(bert: ir.Model, static: bool) -> None:
    model = QuantizeInt8(INT8, [tokens(2)] if static else None).run(bert).model
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeInt8(INT8).requires(model)
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeInt8(INT8).run(model)


def test_an_old_opset_is_refused(bert: ir.Model) -> None:
    bert.opset_imports[""] = 12
    with pytest.raises(PreconditionError, match="opset 12"):
        QuantizeInt8(INT8).requires(bert)


def test_small_layers_and_other_types_are_skipped_with_a_reason() -> None:
    constants = {"small": normal(64, 8), "half": normal(64, 64).astype(np.float16)}
    model = graph(
        [
            helper.make_node("MatMul", ["x", "small"], ["y"]),
            helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["h", "half"], ["p"]),
            helper.make_node("Cast", ["p"], ["q"], to=TensorProto.FLOAT),
        ],
        constants,
        {"x": ["batch", "length", 64]},
        {"y": None, "q": None},
    )
    result = QuantizeInt8(INT8).run(model)
    assert not result.modified
    reasons = dict(result.skipped)
    assert "too small" in reasons["small"] and "float16" in reasons["half"]


def gated_mlp(activation: list[onnx.NodeProto], product: onnx.NodeProto) -> ir.Model:
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["g"]),
        helper.make_node("MatMul", ["x", "up"], ["u"]),
        *activation,
        product,
        helper.make_node("MatMul", ["h", "down"], ["y"]),
        helper.make_node("Add", ["u", "y"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "gain"], ["z"]),
    ]
    constants = {name: normal(64, 64, scale=0.1) for name in ("gate", "up", "down")} | NORM
    return graph(nodes, constants, {"x": ["batch", "length", 64]}, {"z": None})


def test_a_product_behind_a_gate_stays_and_one_behind_an_activation_does_not() -> None:
    silu = [helper.make_node("Sigmoid", ["g"], ["s"]), helper.make_node("Mul", ["g", "s"], ["a"])]
    gated = gated_mlp(silu, helper.make_node("Mul", ["a", "u"], ["h"]))
    plain = gated_mlp(silu[:1], helper.make_node("Mul", ["g", "s"], ["h"]))
    result = QuantizeInt8(INT8).run(gated)
    assert result.changed == ["gate", "up"] and "gated MLP" in dict(result.skipped)["down"]
    QuantizeInt8(INT8).ensures(result.model)
    assert QuantizeInt8(INT8).run(plain).changed == ["gate", "up", "down"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("static", [False, True])
def test_a_fused_product_is_quantized(transposed: int, static: bool) -> None:
    model = layer(rank=3)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    product.domain, product.op_type = "com.microsoft", "FusedMatMul"
    product.attributes.add(ir.AttrInt64("transB", transposed))
    feeds = {"x": normal(1, 5, 64, seed=2)}
    wanted = run(model, feeds)[0]
    result = QuantizeInt8(INT8, [feeds] if static else None).run(model)
    assert result.changed == ["w"] and relative_error(run(result.model, feeds)[0], wanted) < 0.02


def test_a_scaled_fused_product_is_skipped() -> None:
    model = layer(rank=3)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    product.domain, product.op_type = "com.microsoft", "FusedMatMul"
    product.attributes.add(ir.AttrFloat32("alpha", 0.5))
    assert "scales" in dict(QuantizeInt8(INT8).run(model).skipped)["w"]


def test_calibration_samples_must_fit(bert: ir.Model) -> None:
    with pytest.raises(DataError, match="no calibration sample"):
        QuantizeInt8(INT8, []).run(bert)
    with pytest.raises(DataError, match="attention_mask"):
        QuantizeInt8(INT8, [{"input_ids": tokens(1)["input_ids"]}]).run(bert)


def test_generators_of_batches_are_read_once(bert: ir.Model) -> None:
    def batches() -> Iterator[Feeds]:
        yield tokens(2)
        yield tokens(3)

    assert QuantizeInt8(INT8, batches()).run(bert).metrics["form"] == "static"


def test_recipe_keeps_the_section() -> None:
    recipe = build_recipe({"quantization": {"mode": "int8", "calibration": {"method": "entropy"}}})
    assert isinstance(recipe.quantization, QuantizationSection)
    assert recipe.quantization.calibration == CalibrationSection(method="entropy")


# Fusions taken apart


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sum_used", [False, True])
def test_split_fusions_compute_the_same_and_stay_split(with_bias: bool, sum_used: bool, tmp_path: Path) -> None:
    norm_inputs = ["x", "skip", "gain", "shift"] + (["bias"] if with_bias else [])
    nodes = [
        helper.make_node(
            "SkipLayerNormalization",
            norm_inputs,
            ["n", "", "", "total"] if sum_used else ["n"],
            domain="com.microsoft",
            epsilon=1e-6,
        ),
        helper.make_node("BiasGelu", ["n", "bias"], ["y"], domain="com.microsoft"),
    ]
    constants = {"gain": normal(64, seed=1), "shift": normal(64, seed=2), "bias": normal(64, seed=3)}
    outputs: dict[str, list[int | str] | None] = {"y": None, **({"total": None} if sum_used else {})}
    model = graph(nodes, constants, {"x": ["batch", "length", 64], "skip": ["batch", "length", 64]}, outputs)
    feeds = {"x": normal(2, 3, 64, seed=4), "skip": normal(2, 3, 64, seed=5)}
    wanted = run(model, feeds)
    assert split_slow_fusions(model) == 2
    for got, want in zip(run(model, feeds), wanted, strict=True):
        assert np.allclose(got, want, atol=1e-5)
    assert "SkipLayerNormalization" not in kernels(model, feeds, tmp_path)


def test_a_norm_whose_statistics_are_read_stays() -> None:
    node = helper.make_node(
        "SkipLayerNormalization", ["x", "skip", "gain"], ["y", "mean"], domain="com.microsoft", epsilon=1e-6
    )
    shape: list[int | str] = ["batch", "length", 64]
    model = graph([node], {"gain": normal(64)}, {"x": shape, "skip": shape}, {"y": None, "mean": None})
    assert split_slow_fusions(model) == 0
