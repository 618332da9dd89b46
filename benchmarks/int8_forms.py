"""Which INT8 form of a linear layer is fast in ONNX Runtime, measured beside fp32 in one run.

Each form is a small graph around one linear layer as it stands in a fused encoder: the packed query/key/value
projection, the first feed-forward layer (bias and GELU behind it), the second (bias, residual and norm behind it) and
one whose input is a matrix, as in GPT-2. `norm` and `gelu` compare the fused operators beside them with their parts.
All sessions use default options except that idle threads do not spin, so the kernels shown are the ones a user gets.
Forms take turns (A B A B); times are medians of process CPU time and wall time; the error is relative to fp32.

    python benchmarks/int8_forms.py --hidden 384,768 --lengths 128,512,4096
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
PLACES = ("qkv", "ffn1", "ffn2", "matrix", "norm", "gelu")
CALIBRATED_RANGE = 4.5
CONTRIB = "com.microsoft"


class Layer:
    """A graph around ``x [1, length, fan_in] -> [1, length, fan_out]``, or around matrices where place is `matrix`."""

    def __init__(self, place: str, hidden: int):
        self.place = place
        self.hidden = hidden
        self.fan_in = 4 * hidden if place in ("ffn2", "gelu") else hidden
        self.fan_out = {"qkv": 3 * hidden, "ffn2": hidden, "norm": hidden}.get(place, 4 * hidden)
        rng = np.random.default_rng(0)
        self.weight = rng.normal(0, 0.05, (self.fan_in, self.fan_out)).astype(np.float32)
        self.bias = rng.normal(0, 0.1, self.fan_out).astype(np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Array | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names

    def part(self, index: int) -> slice:
        """Columns of the query, key or value projection."""
        return slice(index * self.hidden, (index + 1) * self.hidden)

    def quantized_weight(self, dtype: type = np.int8) -> tuple[Array, Array]:
        scale = (np.abs(self.weight).max(0) / 127).astype(np.float32)
        quantized = np.rint(self.weight / scale)
        return (quantized + (128 if dtype is np.uint8 else 0)).astype(dtype), scale

    def gain_and_shift(self) -> list[str]:
        ones, zeros = np.ones(self.hidden, np.float32), np.zeros(self.hidden, np.float32)
        return [self.constant("gain", ones), self.constant("shift", zeros)]

    def fused(self, linear: str) -> bytes:
        """Add the bias as the exporter's fusions do: three Adds behind a Split, or inside what follows."""
        if self.place == "qkv":
            parts = self.add("Split", linear, outputs=3, axis=-1, num_outputs=3)
            biases = [self.constant(f"b{index}", self.bias[self.part(index)]) for index in range(3)]
            return self.model([self.add("Add", *pair)[0] for pair in zip(parts, biases, strict=True)])
        bias = self.constant("bias", self.bias)
        if self.place == "matrix":
            return self.model(self.add("Add", linear, bias))
        if self.place == "ffn1":
            return self.model(self.add("BiasGelu", linear, bias, domain=CONTRIB))
        inputs = [linear, "residual", *self.gain_and_shift(), bias]
        return self.model(self.add("SkipLayerNormalization", *inputs, domain=CONTRIB, epsilon=1e-5))

    def split(self, *linears: str) -> bytes:
        """What follows, in parts; the bias has been added."""
        if self.place in ("qkv", "matrix"):
            return self.model(list(linears))
        if self.place == "ffn1":
            return self.model(self.add("Gelu", *linears))
        total = self.add("Sum", *linears, "residual")
        return self.model(self.add("LayerNormalization", *total, *self.gain_and_shift(), epsilon=1e-5))

    def columns(self) -> list[slice]:
        """The products to make where packed ones are taken apart."""
        return [self.part(index) for index in range(3)] if self.place == "qkv" else [slice(0, self.fan_out)]

    def model(self, outputs: list[str]) -> bytes:
        value, lead = helper.make_tensor_value_info, ["length"] if self.place == "matrix" else [1, "length"]
        inputs = [value("x", TensorProto.FLOAT, [*lead, self.fan_in])]
        if self.place in ("ffn2", "norm"):
            inputs.append(value("residual", TensorProto.FLOAT, [*lead, self.hidden]))
        results = [value(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "layer", inputs, results, self.constants)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())

    def feeds(self, length: int) -> dict[str, Array]:
        rng = np.random.default_rng(1)
        lead = (length,) if self.place == "matrix" else (1, length)
        feeds = {"x": rng.normal(0, 1, (*lead, self.fan_in)).astype(np.float32)}
        if self.place in ("ffn2", "norm"):
            feeds["residual"] = rng.normal(0, 1, (*lead, self.hidden)).astype(np.float32)
        return feeds


def float32(layer: Layer) -> bytes:
    return layer.fused(*layer.add("MatMul", "x", layer.constant("w", layer.weight)))


def float32_split(layer: Layer) -> bytes:
    (linear,) = layer.add("MatMul", "x", layer.constant("w", layer.weight))
    # A bias of higher rank escapes BiasGeluFusion.
    bias = layer.bias if layer.place in ("matrix", "qkv") else layer.bias.reshape(1, 1, -1)
    (linear,) = layer.add("Add", linear, layer.constant("bias", bias))
    if layer.place == "qkv":
        return layer.split(*layer.add("Split", linear, outputs=3, axis=-1, num_outputs=3))
    return layer.split(linear)


def _integer_product(layer: Layer, x: str, zero: str, scale: str, columns: slice, dtype: type = np.int8) -> str:
    quantized, weight_scale = layer.quantized_weight(dtype)
    name = f"w{columns.start}"
    weight = [layer.constant(name, quantized[:, columns].copy()), zero]
    if dtype is np.uint8:
        weight.append(layer.constant("w_zero", np.uint8(128)))
    (product,) = layer.add("MatMulInteger", x, *weight)
    (product,) = layer.add("Cast", product, to=TensorProto.FLOAT)
    (factor,) = layer.add("Mul", scale, layer.constant(f"{name}_scale", weight_scale[columns]))
    return layer.add("Mul", product, factor)[0]


def dynamic(layer: Layer, dtype: type = np.int8) -> bytes:
    x, scale, zero = layer.add("DynamicQuantizeLinear", "x", outputs=3)
    return layer.fused(_integer_product(layer, x, zero, scale, slice(0, layer.fan_out), dtype))


def dynamic_u8_weights(layer: Layer) -> bytes:
    return dynamic(layer, np.uint8)


def dynamic_split(layer: Layer) -> bytes:
    x, scale, zero = layer.add("DynamicQuantizeLinear", "x", outputs=3)
    parts = []
    for columns in layer.columns():
        product = _integer_product(layer, x, zero, scale, columns)
        parts += layer.add("Add", product, layer.constant(f"b{columns.start}", layer.bias[columns]))
    return layer.split(*parts)


def _activation(layer: Layer, dtype: type = np.uint8) -> list[str]:
    """The quantized input, its scale and its zero point."""
    unsigned = dtype is np.uint8
    scale = np.float32(2 * CALIBRATED_RANGE / 255 if unsigned else CALIBRATED_RANGE / 127)
    names = [layer.constant("x_scale", scale), layer.constant("x_zero", dtype(128 if unsigned else 0))]
    return [*layer.add("QuantizeLinear", "x", *names), *names]


def _dequantized_weight(layer: Layer, columns: slice) -> tuple[str, Array]:
    quantized, scale = layer.quantized_weight()
    name = f"w{columns.start}"
    inputs = [
        layer.constant(name, quantized[:, columns].copy()),
        layer.constant(f"{name}_scale", scale[columns]),
        layer.constant(f"{name}_zero", np.zeros(len(scale[columns]), np.int8)),
    ]
    return layer.add("DequantizeLinear", *inputs, axis=1)[0], scale[columns]


def qdq(layer: Layer, dtype: type = np.uint8, quantized_output: bool = False) -> bytes:
    x = layer.add("DequantizeLinear", *_activation(layer, dtype))
    weight, _ = _dequantized_weight(layer, slice(0, layer.fan_out))
    (y,) = layer.add("MatMul", *x, weight)
    if quantized_output:
        zero = dtype(128 if dtype is np.uint8 else 0)
        y_range = layer.constant("y_scale", np.float32(0.05)), layer.constant("y_zero", zero)
        (y,) = layer.add("DequantizeLinear", *layer.add("QuantizeLinear", y, *y_range), *y_range)
    return layer.fused(y)


def qdq_s8(layer: Layer) -> bytes:
    return qdq(layer, np.int8)


def qdq_output(layer: Layer) -> bytes:
    return qdq(layer, np.uint8, quantized_output=True)


def qdq_output_s8(layer: Layer) -> bytes:
    return qdq(layer, np.int8, quantized_output=True)


def qdq_split(layer: Layer) -> bytes:
    x = layer.add("DequantizeLinear", *_activation(layer))
    parts = []
    for columns in layer.columns():
        weight, _ = _dequantized_weight(layer, columns)
        bias = layer.bias[columns] if layer.place == "matrix" else layer.bias[columns].reshape(1, 1, -1)
        parts += layer.add("Add", *layer.add("MatMul", *x, weight), layer.constant(f"b{columns.start}", bias))
    return layer.split(*parts)


def qdq_gemm(layer: Layer) -> bytes:
    x, *x_range = _activation(layer)
    if layer.place != "matrix":
        (x,) = layer.add("Reshape", x, layer.constant("rows", np.array([-1, layer.fan_in])))
        (lead,) = layer.add("Shape", "x", start=0, end=-1)
    (x,) = layer.add("DequantizeLinear", x, *x_range)
    parts = []
    for columns in layer.columns():
        weight, scale = _dequantized_weight(layer, columns)
        unit = (scale * np.float32(2 * CALIBRATED_RANGE / 255)).astype(np.float32)
        integers = np.rint(layer.bias[columns] / unit).astype(np.int32)
        names = layer.constant(f"b{columns.start}", integers), layer.constant(f"b{columns.start}_scale", unit)
        (y,) = layer.add("Gemm", x, weight, *layer.add("DequantizeLinear", *names, axis=0))
        if layer.place != "matrix":
            width = layer.constant(f"n{columns.start}", np.array([len(scale)]))
            (y,) = layer.add("Reshape", y, *layer.add("Concat", lead, width, axis=0))
        parts.append(y)
    return layer.split(*parts)


def contrib_dynamic(layer: Layer) -> bytes:
    quantized, scale = layer.quantized_weight()
    names = layer.constant("w", quantized), layer.constant("w_scale", scale)
    return layer.fused(*layer.add("DynamicQuantizeMatMul", "x", *names, domain=CONTRIB))


def contrib_static(layer: Layer) -> bytes:
    x, x_scale, x_zero = _activation(layer)
    quantized, scale = layer.quantized_weight()
    parts = []
    for columns in layer.columns():
        name = f"w{columns.start}"
        weight = layer.constant(name, quantized[:, columns].copy())
        rest = [layer.constant(f"{name}_scale", scale[columns]), x_zero, ""]
        bias = layer.constant(f"{name}_bias", layer.bias[columns])
        parts += layer.add("MatMulIntegerToFloat", x, weight, x_scale, *rest, bias, domain=CONTRIB)
    return layer.split(*parts)


def static_integer(layer: Layer) -> bytes:
    x, scale, zero = _activation(layer)
    return layer.fused(_integer_product(layer, x, zero, scale, slice(0, layer.fan_out)))


def skip_norm(layer: Layer) -> bytes:
    inputs = ["x", "residual", *layer.gain_and_shift()]
    return layer.model(layer.add("SkipLayerNormalization", *inputs, domain=CONTRIB, epsilon=1e-5))


def norm_of_addition(layer: Layer) -> bytes:
    total = layer.add("Add", "x", "residual")
    return layer.model(layer.add("LayerNormalization", *total, *layer.gain_and_shift(), epsilon=1e-5))


def norm_of_sum(layer: Layer) -> bytes:
    total = layer.add("Sum", "x", "residual")
    return layer.model(layer.add("LayerNormalization", *total, *layer.gain_and_shift(), epsilon=1e-5))


def bias_gelu(layer: Layer) -> bytes:
    return layer.model(layer.add("BiasGelu", "x", layer.constant("bias", layer.bias), domain=CONTRIB))


def gelu_of_addition(layer: Layer) -> bytes:
    return layer.model(layer.add("Gelu", *layer.add("Add", "x", layer.constant("bias", layer.bias.reshape(1, 1, -1)))))


def gelu_alone(layer: Layer) -> bytes:
    return layer.model(layer.add("Gelu", "x"))


Form = Callable[[Layer], bytes]
LINEAR_FORMS: dict[str, Form] = {
    "fp32": float32,
    "fp32, split": float32_split,
    "dynamic s8": dynamic,
    "dynamic s8, split [emitted]": dynamic_split,
    "dynamic u8 weights": dynamic_u8_weights,
    "DynamicQuantizeMatMul": contrib_dynamic,
    "QDQ u8s8": qdq,
    "QDQ s8s8": qdq_s8,
    "QDQ u8s8, output Q": qdq_output,
    "QDQ s8s8, output Q": qdq_output_s8,
    "QDQ u8s8, split": qdq_split,
    "QDQ Gemm, split [emitted]": qdq_gemm,
    "Q + MatMulIntegerToFloat, split": contrib_static,
    "Q + MatMulInteger": static_integer,
}
NORM_FORMS: dict[str, Form] = {"Skip": skip_norm, "Add + norm": norm_of_addition, "Sum + norm [emitted]": norm_of_sum}
GELU_FORMS: dict[str, Form] = {
    "BiasGelu": bias_gelu,
    "Add + Gelu": gelu_of_addition,
    "Gelu, no bias [emitted]": gelu_alone,
}


def session(model: bytes, profile: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def kernels(model: bytes, feeds: dict[str, Array]) -> str:
    """The node kinds that really ran, from a profile."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(model, str(Path(folder) / "profile"))
        profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    ran = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    return " ".join(f"{op}*{count}" if count > 1 else op for op, count in collections.Counter(ran).items())


def bind(of: ort.InferenceSession, feeds: dict[str, Array]) -> ort.IOBinding:
    """Outputs in memory that stays: within a model they come from the arena, not from fresh pages."""
    binding = of.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    for output, value in zip(of.get_outputs(), of.run(None, feeds), strict=True):
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(value))
    return binding


def compare(place: str, hidden: int, length: int, rounds: int, seconds: float) -> None:
    forms = {"norm": NORM_FORMS, "gelu": GELU_FORMS}.get(place, LINEAR_FORMS)
    layer = Layer(place, hidden)
    feeds = layer.feeds(length)
    models = {name: build(Layer(place, hidden)) for name, build in forms.items()}
    sessions = {name: session(model) for name, model in models.items()}
    bindings = {name: bind(of, feeds) for name, of in sessions.items()}
    first = next(iter(forms))
    start = time.process_time()
    sessions[first].run_with_iobinding(bindings[first])
    loops = max(1, int(seconds / max(time.process_time() - start, 1e-5)))
    cpu: dict[str, list[float]] = collections.defaultdict(list)
    wall: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        for name, of in sessions.items():
            start, start_wall = time.process_time(), time.perf_counter()
            for _ in range(loops):
                of.run_with_iobinding(bindings[name])
            cpu[name].append((time.process_time() - start) / loops * 1e3)
            wall[name].append((time.perf_counter() - start_wall) / loops * 1e3)
    width = "" if place in ("norm", "gelu") else f" x {layer.fan_out}"
    print(f"\n{place}: {layer.fan_in}{width}, {length} tokens")
    print(f"{'form':33}{'CPU ms':>9}{'wall ms':>9}{'speed-up':>10}{'error':>8}  kernels that ran")
    reference = sessions[first].run(None, feeds)[0]
    for name, of in sessions.items():
        got = of.run(None, feeds)[0]
        error = np.linalg.norm(got - reference) / np.linalg.norm(reference)
        times = statistics.median(cpu[name]), statistics.median(wall[name])
        ratio = statistics.median(cpu[first]) / times[0]
        ran = kernels(models[name], feeds)
        print(f"{name:33}{times[0]:9.2f}{times[1]:9.2f}{ratio:9.2f}x{error:8.4f}  {ran}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", default="384,768", help="widths of the model")
    parser.add_argument("--lengths", default="128,512,4096", help="tokens")
    parser.add_argument("--places", default=",".join(PLACES), help="which layers")
    parser.add_argument("--rounds", type=int, default=5, help="turns per form")
    parser.add_argument("--seconds", type=float, default=0.1, help="CPU time of the first form in one turn")
    arguments = parser.parse_args()
    for place in arguments.places.split(","):
        if place not in PLACES:
            parser.error(f"'{place}' is not one of {', '.join(PLACES)}")
        for hidden in map(int, arguments.hidden.split(",")):
            for length in map(int, arguments.lengths.split(",")):
                compare(place, hidden, length, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
