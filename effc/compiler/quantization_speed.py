"""What quantizing a linear layer of a certain shape does to its speed, measured by running it alone."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnxruntime

from effc.compiler.session import session_options
from effc.passes.quantize import quantizing_passes
from effc.passes.quantize_settings import QuantizationSection

Shape = tuple[int, int]
_ROUNDS = 7
# One measurement takes about so many seconds of fp32.
_SECONDS = 0.02
_OPSET = 23


def measure_speedups(
    shapes: Iterable[Shape], settings: QuantizationSection, mode: str, rows: int, *, static: bool, threads: int = 1
) -> dict[Shape, float]:
    """How many times faster than fp32 a layer ``[fan_in, fan_out]`` runs, by process CPU time.

    Args:
        mode: as the recipe writes it.
        rows: tokens that the layer is given at once.
        static: whether ranges of activations are constants.
    """
    return {shape: _speedup(shape, settings, mode, rows, static, threads) for shape in dict.fromkeys(shapes)}


def _speedup(shape: Shape, settings: QuantizationSection, mode: str, rows: int, static: bool, threads: int) -> float:
    x = np.random.default_rng(0).normal(size=(1, rows, shape[0])).astype(np.float32)
    plain = _layer(shape)
    quantized = _layer(shape)
    # Named, so that no rule of thumb applies to a layer without surroundings; what reads data is of no use to time.
    plainly = {
        "mode": "none",
        "layers": {"layer*": mode},
        "weights": settings.weights.model_copy(update={"method": "rtn"}),
        "activations": settings.activations,
        "reduce_range": settings.reduce_range,
    }
    for step in quantizing_passes(QuantizationSection.model_validate(plainly), [{"x": x}] if static else None):
        step.run(quantized)
    sessions = [_session(model, threads) for model in (plain, quantized)]
    repeats = [1, 1]
    times: list[list[float]] = [[], []]
    for turn in range(_ROUNDS + 1):
        for index, session in enumerate(sessions):
            start = time.process_time()
            for _ in range(repeats[index]):
                session.run(None, {"x": x})
            spent = (time.process_time() - start) / repeats[index]
            if turn:
                times[index].append(spent)
            else:
                repeats[index] = max(1, min(500, int(_SECONDS / max(spent, 1e-6))))
    return min(times[0]) / max(min(times[1]), 1e-9)


def _layer(shape: Shape) -> ir.Model:
    weight = np.random.default_rng(1).normal(0, shape[0] ** -0.5, shape).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape([1, "rows", shape[0]]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="layer.weight", const_value=ir.tensor(weight, name="layer.weight"))
    w.shape, w.dtype = ir.Shape(shape), ir.DataType.FLOAT
    node = ir.node("MatMul", [x, w])
    output = node.outputs[0]
    output.name, output.shape, output.dtype = "y", ir.Shape([1, "rows", shape[1]]), ir.DataType.FLOAT
    graph = ir.Graph([x], [output], nodes=[node], initializers=[w], name="layer", opset_imports={"": _OPSET})
    return ir.Model(graph, ir_version=10)


def _session(model: ir.Model, threads: int) -> onnxruntime.InferenceSession:
    options = session_options(threads, spinning=False)
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
