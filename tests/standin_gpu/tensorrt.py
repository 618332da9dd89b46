"""Stands in for TensorRT: its engines are ONNX files, which ONNX Runtime computes on the memory that was bound.

Shapes are held against the optimization profiles that the file brings along.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math

import numpy as np
import onnxruntime
import torch

__version__ = "10.9.0.34"
DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT64 INT32 BOOL")
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}
loaded_libraries: list[str] = []
runs: list[tuple[str, int, dict[str, tuple[int, ...]]]] = []
"""Graph, profile and shapes of every run."""


class Logger:
    WARNING = 2

    def __init__(self, severity: int): ...


class _Registry:
    def load_library(self, path: str) -> None:
        with open(path, "rb") as file:
            assert file.read(7) == b"library"
        loaded_libraries.append(path)


def get_plugin_registry() -> _Registry:
    return _Registry()


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: Logger): ...

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine(plan)


class Engine:
    def __init__(self, plan: bytes):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.graph, self.profiles = metadata["graph"], json.loads(metadata["profiles"])
        self.inputs = {argument.name: argument for argument in self.session.get_inputs()}
        self.outputs = {argument.name: argument for argument in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.argument(name).type][0]

    def argument(self, name: str):
        return self.inputs.get(name) or self.outputs[name]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.computed: list[np.ndarray] | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        least, _, most = self.engine.profiles[self.profile][name]
        inside = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        assert inside, f"{name} {shape} is not within profile {self.profile}, {least} to {most}"
        self.shapes[name], self.computed = shape, None

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        self.computed = self.computed or self._compute()
        return dict(zip(self.engine.outputs, self.computed, strict=True))[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == torch.current_stream().cuda_stream
        torch._check()
        runs.append((self.engine.graph, self.profile, dict(self.shapes)))
        for name, value in zip(self.engine.outputs, self._compute(), strict=True):
            self._memory(name, value.shape)[...] = value
        return True

    def _compute(self) -> list[np.ndarray]:
        given = {name: self._memory(name, self.shapes[name]).copy() for name in self.engine.inputs}
        return self.engine.session.run(list(self.engine.outputs), given)

    def _memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = np.dtype(_TYPES[self.engine.argument(name).type][1])
        size = math.prod(shape) * kind.itemsize
        raw = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(raw, kind).reshape(shape)
