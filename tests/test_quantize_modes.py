"""Every quantization mode but plain INT8: on graphs, against exact arithmetic, and through the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from cpu_products import SATURATES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import WORDS, save_lively

import effc
from effc.compiler.recipe import build_recipe
from effc.errors import PreconditionError, UsageError
from effc.passes.quantize import quantize, quantizing_passes
from effc.passes.quantize_blocks import gptq_blocks, round_to_nearest
from effc.passes.quantize_find import find_linears
from effc.passes.quantize_fp8 import quantize_columns_fp8
from effc.passes.quantize_gptq import Feedback, error_spread
from effc.passes.quantize_grid import own_grid
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_settings import QuantizationSection

Feeds = dict[str, npt.NDArray[Any]]
WIDTH, INNER = 64, 96


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def gated_mlp(outlier: float = 1.0) -> ir.Model:
    """Norm, a gated MLP and a norm, as in Llama: ``x [1, n, 64]``, one channel of the first norm ``outlier`` times as
    large as the others."""
    gain = np.ones(WIDTH, np.float32)
    gain[7] = outlier
    constants = {
        "norm.weight": gain,
        "gate.weight": normal(WIDTH, INNER, seed=1, scale=0.1),
        "up.weight": normal(WIDTH, INNER, seed=2, scale=0.1),
        "down.weight": normal(INNER, WIDTH, seed=3, scale=0.1),
        "last.weight": np.ones(WIDTH, np.float32),
    }
    given = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()}
    for name, value in given.items():
        value.shape, value.dtype = ir.Shape(constants[name].shape), ir.DataType.FLOAT
    x = ir.Value(name="x", shape=ir.Shape([1, "n", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, width: int = WIDTH, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes=attributes)
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([1, "n", width]), ir.DataType.FLOAT
        node.outputs[0].name = f"v{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    normed = add("RMSNormalization", x, given["norm.weight"], axis=-1)
    gate = add("MatMul", normed, given["gate.weight"], width=INNER)
    up = add("MatMul", normed, given["up.weight"], width=INNER)
    active = add("Mul", gate, add("Sigmoid", gate, width=INNER), width=INNER)
    down = add("MatMul", add("Mul", active, up, width=INNER), given["down.weight"])
    y = add("RMSNormalization", down, given["last.weight"], axis=-1)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=list(given.values()), name="mlp", opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: Feeds) -> npt.NDArray[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model).SerializeToString()
    return np.asarray(ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0])


def relative_error(got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def error_of(model: ir.Model, calibrated: bool = True, **section: Any) -> float:
    """Relative error of the output after quantizing as ``section`` says."""
    wanted = run(model, INPUT)
    quantize(model, QuantizationSection.model_validate(section), CALIBRATION if calibrated else None)
    return relative_error(run(model, INPUT), wanted)


INPUT = {"x": normal(1, 40, WIDTH, seed=9)}
CALIBRATION = [{"x": normal(1, 40, WIDTH, seed=seed)} for seed in range(20, 24)]


# Numbers


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 32), (8, 32), (8, 128)])
def test_blocks_are_what_the_kernel_computes_with(bits: int, size: int, symmetric: bool) -> None:
    # 72 inputs: the last block is not full.
    weight = normal(72, 24, seed=3)
    blocks = round_to_nearest(weight, bits, size, symmetric)
    floats = blocks.floats()
    assert floats.shape == weight.shape
    assert relative_error(floats, weight) < (0.12 if bits == 4 else 0.008)
    inputs: list[Any] = [blocks.values, blocks.scales.reshape(-1)]
    inputs += [] if blocks.zeros is None else [blocks.zeros.reshape(-1)]
    x = ir.Value(name="x", shape=ir.Shape([5, 72]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [ir.Value(name=f"c{i}", const_value=ir.tensor(a, name=f"c{i}")) for i, a in enumerate(inputs)]
    attributes = {"K": 72, "N": 24, "bits": bits, "block_size": size}
    node = ir.node("MatMulNBits", [x, *constants], attributes=attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=constants, name="g", opset_imports=opsets)
    feeds = {"x": normal(5, 72)}
    assert relative_error(run(ir.Model(graph, ir_version=10), feeds), feeds["x"] @ floats) < 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_lowers_the_error_of_the_output(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    # Inputs that go together, so that one can make up for another.
    x = (rng.normal(size=(500, 12)) @ rng.normal(size=(12, 72)) + 0.1 * rng.normal(size=(500, 72))).astype(np.float32)
    weight = normal(72, 24, seed=3)
    plain = round_to_nearest(weight, 4, 32, symmetric).floats()
    better = gptq_blocks(weight, error_spread(x.T @ x / len(x)), 4, 32, symmetric).floats()
    assert relative_error(x @ better, x @ weight) < 0.6 * relative_error(x @ plain, x @ weight)
    # Without any connection between inputs there is nothing to make up for.
    alone = gptq_blocks(weight, error_spread(np.eye(72, dtype=np.float32)), 4, 32, symmetric).floats()
    assert relative_error(alone, weight) == pytest.approx(relative_error(plain, weight), rel=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 16), below=st.floats(0, 1), half=st.booleans())
def test_weights_that_were_4_bit_keep_their_grid(seed: int, levels: int, below: float, half: bool) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, levels, size=(5, 3, 32))
    steps, least = rng.uniform(0.02, 0.1, (5, 3, 1)), -below * rng.uniform(0, 1, (5, 3, 1))
    weight = (codes * np.float16(steps) + np.float16(least)).astype(np.float32).reshape(5, 96).T
    if half:
        weight = weight.astype(np.float16).astype(np.float32)
    found = own_grid(weight, 32)
    assert found is not None and found.kept
    assert np.abs(found.floats() - weight).max() <= (2e-3 if half else 1e-6)
    # Half the block size divides the grid's; twice does not.
    assert own_grid(weight, 16) is not None
    assert own_grid(normal(96, 5, seed=seed), 32) is None
    assert own_grid(weight[:80], 32) is None


def test_a_graph_of_4_bit_weights_keeps_their_grid() -> None:
    model = gated_mlp()
    for linear in find_linears(model.graph):
        fan_in, fan_out = linear.fan_in, linear.fan_out
        codes = np.random.default_rng(fan_out).integers(0, 16, (fan_out, fan_in // 32, 32))
        weight = (codes * np.float32(0.02) - 0.11).reshape(fan_out, fan_in).T.astype(np.float32)
        linear.node.inputs[1].const_value = ir.tensor(np.ascontiguousarray(weight))
    wanted = run(model, INPUT)
    (step,) = quantizing_passes(QuantizationSection(mode="int4-weights"), None)
    result = step.run(model)
    step.ensures(model)
    assert result.metrics["on_their_own_grid"] == 3
    assert result.metrics["largest_weight_error"]["relative_error"] < 1e-6
    # What is left is the rounding of inputs to 8 bits.
    assert relative_error(run(model, INPUT), wanted) < 0.012


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-8, 8))
def test_fp8_weights_are_those_of_torch(seed: int, exponent: float) -> None:
    weight = (np.random.default_rng(seed).normal(size=(8, 4)) * 10.0**exponent).astype(np.float32)
    values, scale = quantize_columns_fp8(weight)
    wanted = torch.tensor(weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(values.astype(np.float32), wanted)
    assert np.abs(values.astype(np.float32)).max() == 448


def test_gptq_lowers_the_error_of_fp8_products() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 12)) @ rng.normal(size=(12, 72)) + 0.1 * rng.normal(size=(500, 72))).astype(np.float32)
    weight = normal(72, 24, seed=3)
    errors = []
    for feedback in (None, Feedback.of(x.T @ x / len(x))):
        values, scale = quantize_columns_fp8(weight, feedback)
        errors.append(relative_error(x @ (values.astype(np.float32) * scale), x @ weight))
    assert errors[1] < 0.6 * errors[0]


# Graphs


def test_modes_are_as_close_as_their_bits_allow() -> None:
    modes = ("int8", "int8-weights", "int4-weights", "fp8", "fp16", "bf16")
    errors = {mode: error_of(gated_mlp(), mode=mode, reduce_range=SATURATES and mode == "int8") for mode in modes}
    assert all(error > 0 for error in errors.values())
    assert errors["fp16"] < 1e-3 and errors["bf16"] < 8e-3
    assert errors["int8"] < (0.03 if SATURATES else 0.02) and errors["int8-weights"] < 0.02
    assert errors["fp8"] < 0.08 and 0.03 < errors["int4-weights"] < 0.15


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_fp8_graph_equals_bit_exact_emulation(calibrated: bool) -> None:
    model = gated_mlp(outlier=30)
    layers = {linear.weight_name: linear.weight().copy() for linear in find_linears(model.graph)}
    quantize(model, QuantizationSection(mode="fp8"), CALIBRATION if calibrated else None)
    kinds = {node.op_type for node in model.graph}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    # The input of each product as the graph rounds it, and the product that E4M3 numbers give.
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products) == 3
    for product, name in zip(products, ("gate.weight", "up.weight", "down.weight"), strict=True):
        rounded = product.inputs[0]
        floats = rounded.producer().inputs[0].producer().inputs[0]
        scale = rounded.producer().inputs[1]
        model.graph.outputs[:] = [floats, rounded, product.outputs[0], *([] if calibrated else [scale])]
        for value in model.graph.outputs:
            value.name = value.name or f"out{id(value)}"
        options = ort.SessionOptions()
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        x, seen, result, *dynamic = session.run(None, INPUT)
        step = np.float32(dynamic[0] if dynamic else scale.const_value.numpy())
        wanted = np.clip(x / step, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * step
        assert np.array_equal(seen, wanted)
        values, steps = quantize_columns_fp8(layers[name])
        weight = values.astype(np.float32) * steps
        assert np.allclose(result, wanted @ weight, atol=1e-5 * np.abs(result).max())


def test_a_fixed_fp8_scale_holds_twice_what_calibration_has_seen() -> None:
    seen = max(float(np.abs(batch["x"]).max()) for batch in CALIBRATION)
    errors = []
    for peak in (1.0, 1.9, 4.0):
        model = gated_mlp()
        gate = next(iter(find_linears(model.graph))).node
        # Without the norm in front, so that the input keeps its size.
        gate.replace_input_with(0, model.graph.inputs[0])
        model.graph.outputs[:] = [gate.outputs[0]]
        feeds = {"x": INPUT["x"].clip(-2, 2)}
        feeds["x"][0, :, 5] = peak * seen
        wanted = run(model, feeds)
        quantize(model, QuantizationSection(mode="none", layers={"gate": "fp8"}), CALIBRATION)
        errors.append(relative_error(run(model, feeds), wanted))
    assert max(errors[:2]) < 0.06 < 0.3 < errors[2]


def test_smoothing_takes_outliers_out_and_costs_no_node() -> None:
    plain = error_of(gated_mlp(outlier=200), mode="int8")
    model = gated_mlp(outlier=200)
    before = len(list(model.graph))
    wanted = run(model, INPUT)
    remembered = Remembered()
    section = QuantizationSection(mode="int8", smoothing="auto")
    quantize(model, section, CALIBRATION, remembered=remembered)
    assert relative_error(run(model, INPUT), wanted) < 0.4 * plain
    assert remembered.smoothing["gate"][7] > 10 * np.median(remembered.smoothing["gate"])
    unsmoothed = gated_mlp(outlier=200)
    quantize(unsmoothed, QuantizationSection(mode="int8"), CALIBRATION)
    assert len(list(model.graph)) == len(list(unsmoothed.graph)) > before


def test_smoothing_alone_changes_nothing() -> None:
    from effc.passes.quantize_smooth import Smooth

    model = gated_mlp(outlier=200)
    wanted = run(model, INPUT)
    everything = QuantizationSection(mode="int8", smoothing=0.5, layers={"down": "int8"})
    result = Smooth(everything, CALIBRATION).run(model)
    # Into the norm, and into the layer behind the gate's other factor.
    assert result.changed == ["gate", "down"] and result.metrics["products_inserted"] == 0
    assert relative_error(run(model, INPUT), wanted) < 1e-5


def test_awq_and_gptq_are_better_than_rounding() -> None:
    errors = {
        method: error_of(gated_mlp(outlier=30), mode="int4-weights", weights={"method": method})
        for method in ("rtn", "awq")
    }
    assert errors["awq"] < 0.97 * errors["rtn"]
    # Inputs that go together, so that GPTQ has something to gain.
    mix = normal(6, WIDTH, seed=1)
    data = [{"x": normal(1, 200, 6, seed=seed) @ mix} for seed in range(5)]
    for method in ("rtn", "gptq"):
        model = gated_mlp()
        wanted = run(model, data[0])
        section = QuantizationSection.model_validate({"mode": "int4-weights", "weights": {"method": method}})
        quantize(model, section, data[1:])
        errors[method] = relative_error(run(model, data[0]), wanted)
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_a_scale_per_token_holds_tokens_of_all_sizes() -> None:
    feeds = {"x": normal(1, 40, WIDTH, seed=9)}
    errors = {}
    for activations in ("tensor", "token"):
        model = gated_mlp()
        # Without the norm in front, so that tokens keep their sizes.
        for node in list(model.graph)[1:3]:
            node.replace_input_with(0, model.graph.inputs[0])
        feeds["x"][0, 0] = 300 * normal(WIDTH)
        wanted = run(model, feeds)
        quantize(model, QuantizationSection(mode="int8", activations=activations, reduce_range=SATURATES), None)
        got = run(model, feeds)
        errors[activations] = relative_error(got[0, 1:], wanted[0, 1:])
    assert errors["token"] < 0.03 < errors["tensor"]


def test_bias_correction_restores_the_mean() -> None:
    offset = {"x": CALIBRATION[0]["x"] + 3}
    data = [{"x": batch["x"] + 3} for batch in CALIBRATION]
    means = []
    for correct in (False, True):
        model = gated_mlp()
        for node in list(model.graph)[1:3]:
            node.replace_input_with(0, model.graph.inputs[0])
        gate = next(iter(find_linears(model.graph))).node.outputs[0]
        model.graph.outputs[:] = [gate]
        wanted = run(model, offset)
        # With 3 bits fewer than INT8 has, rounding would show more; here it is a matter of the mean alone.
        section = QuantizationSection(mode="none", layers={"gate": "int8"}, bias_correction=correct)
        quantize(model, section, data)
        means.append(np.abs((run(model, offset) - wanted).mean(axis=(0, 1))).mean())
    assert means[1] < 0.6 * means[0]


@pytest.mark.parametrize("section", [{"layers": {"up": "none", "down": "int4-weights", "*": "fp8"}}])
def test_layers_have_modes_of_their_own(section: dict[str, Any]) -> None:
    model = gated_mlp()
    wanted = run(model, INPUT)
    quantize(model, QuantizationSection.model_validate({"mode": "int8", **section}), None)
    kinds = [node.op_type for node in model.graph]
    # up in fp32, down in 4 bits, gate in FP8, and no INT8 anywhere.
    assert kinds.count("MatMulNBits") == 1 and kinds.count("DequantizeLinear") == 2 and kinds.count("MatMul") == 2
    assert "MatMulInteger" not in kinds
    assert relative_error(run(model, INPUT), wanted) < 0.15


def test_gates_are_quantized_where_a_glob_asks_for_it() -> None:
    model = gated_mlp()
    quantize(model, QuantizationSection(mode="int8"), None)
    assert [node.op_type for node in model.graph].count("MatMul") == 1
    model = gated_mlp()
    quantize(model, QuantizationSection(mode="int8", layers={"down*": "int8"}), None)
    assert [node.op_type for node in model.graph].count("MatMul") == 0


def test_two_graphs_of_a_model_get_the_same_weights() -> None:
    remembered, found = Remembered(), []
    section = QuantizationSection(mode="int4-weights", weights={"method": "gptq"})
    for _ in range(2):
        model = gated_mlp()
        quantize(model, section, CALIBRATION, remembered=remembered)
        found.append({n: v.const_value.numpy() for n, v in model.graph.initializers.items() if "int4" in n})
        # The second graph must not need data.
        CALIBRATION_SEEN = len(found)
    assert CALIBRATION_SEEN == 2 and found[0].keys() == found[1].keys() and len(found[0]) == 3
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


# Refusals


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "int8", "smoothing": "auto"}, "smoothing looks at activations.*--calibration"),
        ({"mode": "int4-weights", "weights": {"method": "awq"}}, "awq looks at activations.*--calibration"),
        ({"mode": "int4-weights", "weights": {"method": "gptq"}}, "gptq.*no calibration data.*rtn"),
        ({"mode": "fp8", "weights": {"method": "gptq"}}, "gptq.*no calibration data.*rtn"),
        ({"mode": "int8", "bias_correction": True}, "Bias correction.*--calibration"),
        ({"mode": "int8", "layers": {"*nowhere*": "fp8"}}, "quantization.layers matches no layer"),
    ],
)
def test_what_cannot_be_done_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError, match=f"(?s){message}"):
        quantize(gated_mlp(), QuantizationSection.model_validate(section), None)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "int9"}, "not a mode.*int8"),
        ({"mode": "auto"}, "how much quality"),
        ({"mode": "auto:much"}, "how much quality"),
        ({"mode": "auto:-1"}, "auto:0.01"),
        ({"mode": "auto:0.1:fp16"}, "does not choose layers for 'fp16'"),
        ({"layers": {"*head": "int3"}}, "int3.*not a mode"),
        ({"mode": "int8", "smoothing": 1.5}, "between 0 and 1"),
        ({"mode": "int4-weights", "weights": {"block_size": 48}}, "block_size"),
        ({"mode": "int4-weights", "weights": {"methd": "awq"}}, "method"),
        ({"mode": "int8", "weights": {"method": "gptq"}}, "weights.method gptq is for fp8 and int4-weights"),
        ({"mode": "fp8", "weights": {"method": "awq"}}, "weights.method awq is for int4-weights and int8-weights"),
        ({"mode": "int8", "weights": {"block_size": 32}}, "weights.block_size 32 is for int4-weights"),
        ({"mode": "fp8", "smoothing": "auto"}, "smoothing auto is for int8"),
        ({"mode": "int8-weights", "activations": "token"}, "activations token is for int8"),
    ],
)
def test_bad_settings_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        build_recipe({"quantization": section})


# Through the pipeline


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 1}
    return save_lively(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", **changes)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(WORDS[:15], 30))}) for _ in range(12)))
    return path


QUICK: dict[str, Any] = {"bench": {"enabled": False}, "verify": {"samples": 4, "max_length": 48}}


@pytest.mark.parametrize(
    "section",
    [
        {"mode": "int8", "smoothing": "auto", "activations": "token"},
        {"mode": "int8-weights"},
        {"mode": "int4-weights", "weights": {"method": "gptq", "block_size": 16}},
        {"mode": "fp8"},
        {"mode": "bf16"},
        {"mode": "none", "layers": {"lm_head": "int8-weights", "*layers.0.*": "fp16"}},
    ],
    ids=lambda section: section["mode"],
)
def test_compiled_models_predict_and_write(section: dict[str, Any], llama: Path, texts: Path, tmp_path: Path) -> None:
    quantization = {**section, "calibration": {"data": str(texts), "samples": 6, "max_length": 32}}
    artifact = effc.compile(llama, quantization=quantization, output=tmp_path / "out", **QUICK)
    names = [record.name for record in artifact.manifest.passes]
    assert any(name.startswith(("quantize", "store")) for name in names)
    record = artifact.manifest.verification
    assert record is not None and 0 < record.outputs["logits"].relative_error < 0.4
    model = effc.load(tmp_path / "out")
    ids = np.array([[5, 6, 7, 8, 9, 10]])
    whole = model(input_ids=ids, attention_mask=np.ones_like(ids)).logits
    written = model.generate(ids, max_new_tokens=1, eos_token_id=[])
    # The generating graph has the same quantization, up to the last bit of a range.
    assert written[0, -1] == whole[0, -1].argmax()
    generation = next(record for record in artifact.manifest.passes if record.name == "generation")
    assert generation.metrics["bytes_shared"] > 0


def test_auto_keeps_what_the_budget_needs(llama: Path, texts: Path, tmp_path: Path) -> None:
    found = {}
    for budget in (0.0, 1000.0):
        artifact = effc.compile(
            llama,
            quantization={"mode": f"auto:{budget}:int4-weights", "weights": {"block_size": 16}},
            attention={"samples": 4, "max_length": 32, "data": str(texts)},
            output=tmp_path / f"out{budget}",
            **QUICK,
        )
        search = artifact.manifest.quantization_search
        assert search is not None and search.samples == 4 and search.tokens > 0
        assert len({layer.layer for layer in search.layers}) == len(search.layers) == 15
        for layer in search.layers:
            assert layer.speedup is not None and layer.quantized == (layer.reason is None)
            # A layer is left out for speed without being measured for quality.
            assert (layer.error is None) == (layer.reason is not None and "slower" in layer.reason)
        found[budget] = search
        report = (tmp_path / f"out{budget}" / "report.html").read_text()
        assert "How the layers to quantize were chosen" in report
        sentences = [sentence for sentence in artifact.unmet if "auto:" in sentence]
        assert bool(sentences) == (not search.met)
    assert found[1000.0].met
    assert all(layer.quantized or "slower" in str(layer.reason) for layer in found[1000.0].layers)
    assert found[1000.0].measured == 1
    assert found[0.0].quantized_share < found[1000.0].quantized_share or found[0.0].drop <= 0


def test_flags_say_what_the_recipe_says(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from effc import cli
    from effc.compiler import pipeline
    from effc.compiler.report_command import command_line

    seen: list[Any] = []

    def run(recipe: Any, *_: Any, **__: Any) -> Any:
        seen.append(recipe)
        raise UsageError("seen", "enough")

    monkeypatch.setattr(pipeline, "run", run)
    flags = ["--quant=int4-weights", "--quant-weights=awq", "--quant-smoothing=0.5", "--quant-activations=token"]
    layers = ["--quant-layer", "*head=int8-weights", "--quant-layer", "*.0.*=int8"]
    with pytest.raises(SystemExit):
        cli.main(["compile", str(llama), *flags, *layers, "-o", str(tmp_path / "out")])
    section = seen[0].quantization
    assert (section.mode, section.weights.method, section.smoothing) == ("int4-weights", "awq", 0.5)
    assert section.activations == "token" and section.layers == {"*head": "int8-weights", "*.0.*": "int8"}
    assert section.modes == {"int4-weights", "int8-weights", "int8"}
    plain = build_recipe({"quantization": {"mode": "int8", "smoothing": "auto"}}).model_dump(mode="json")
    assert command_line(plain, "model") == "effc compile model --attn=dense --quant=int8 --quant-smoothing=auto -o OUT"
    with pytest.raises(SystemExit):
        cli.main(["compile", str(llama), "--quant-layer", "head", "-o", str(tmp_path / "out")])
    assert len(seen) == 1


def test_any_iterable_calibrates(llama: Path, tmp_path: Path) -> None:
    texts = (f"the film was {word}" for word in WORDS)
    artifact = effc.compile(
        llama, quantization={"mode": "int8", "calibration": {"samples": 6}}, calibration=texts, output=tmp_path, **QUICK
    )
    record = next(record for record in artifact.manifest.passes if record.name == "quantize-int8")
    assert record.metrics["form"] == "static" and next(texts) == f"the film was {WORDS[6]}"
