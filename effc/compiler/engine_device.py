"""What running an engine needs of a GPU, as an interface, and torch with TensorRT behind it.

The interface keeps :mod:`effc.compiler.engine_runner`, which decides everything, testable on machines without a GPU.
:class:`TorchDevice` only translates; it was run with stand-ins for torch and TensorRT only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from effc.compiler.engine_choice import check_version
from effc.compiler.engine_records import BuiltEngines
from effc.errors import MissingDependencyError, OutputError


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine. ``dtype`` is the device's name for its type."""

    name: str
    is_input: bool
    dtype: Any


class EngineContext(Protocol):
    """An execution context of one optimization profile. Work on it must not overlap."""

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """Of an input, before addresses are set."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, once the shapes of all inputs are set."""

    def set_address(self, name: str, tensor: Any) -> None:
        """Where the tensor of this name lies."""

    def execute(self, stream: Any) -> bool:
        """Queue the work on a stream; False if TensorRT refuses."""


class Device(Protocol):
    """Tensors, streams and engines of one GPU. Tensors have ``shape`` and are contiguous; slices of them are views."""

    def activate(self) -> None:
        """Make it the GPU that the calling thread works on, before it does."""

    def load(self, file: Path) -> Any:
        """The engine in a file."""

    def tensors(self, engine: Any) -> list[EngineTensor]:
        """Its inputs and outputs."""

    def context(self, engine: Any, profile: int) -> EngineContext:
        """A new execution context, set to a profile."""

    def is_here(self, value: Any) -> bool:
        """Whether a value is a tensor of this device."""

    def tensor(self, value: Any, dtype: Any) -> Any:
        """A value as a contiguous tensor of this device: itself if it is one of that type."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """A tensor with anything in it."""

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        """A tensor of zeros, which an engine may read whatever the input means."""

    def copy(self, target: Any, source: Any) -> None:
        """Queue a copy on the current stream."""

    def clone(self, tensor: Any) -> Any:
        """Queue a copy into a new tensor on the current stream."""

    def current_stream(self) -> Any:
        """The caller's stream; streams can be compared."""

    def event(self, stream: Any) -> Any:
        """A mark behind what is queued on a stream."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make a stream wait for a mark of another one."""

    def synchronize(self, stream: Any) -> None:
        """Wait for a stream."""

    def record(self, work: Callable[[Any], None]) -> Any:
        """Record what ``work(stream)`` queues as a CUDA graph, without running it."""

    def replay(self, graph: Any) -> None:
        """Queue a recorded graph on the current stream."""

    def numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array."""


class TorchDevice:
    """A GPU through torch and one TensorRT; see :class:`Device`.

    Args:
        path: the directory that the record's files lie in.
        gpu: its number; work is queued on a stream of its own. If None, whichever is the caller's current one, and the
            caller's current stream.

    Raises:
        MissingDependencyError: if torch sees no GPU.
        PreconditionError: if the engines were built with another version of TensorRT.
    """

    def __init__(self, path: Path, record: BuiltEngines, gpu: int | None = None):
        import torch

        if not torch.cuda.is_available():
            raise MissingDependencyError(
                "This build of torch sees no GPU, and the engines' tensors are torch's.",
                "Install torch with CUDA: https://pytorch.org/get-started.",
            )
        self._torch = torch
        self._gpu, self._stream = gpu, None
        self.activate()
        self._trt = trt = importlib.import_module(record.flavour)
        check_version(record, trt.__version__)
        self._logger = trt.Logger(trt.Logger.WARNING)
        if record.plugin is not None:
            trt.get_plugin_registry().load_library(str(path / record.plugin))
        self._runtime = trt.Runtime(self._logger)
        holds_code = record.plugin_embedded or record.version_compatible
        if holds_code and hasattr(self._runtime, "engine_host_code_allowed"):
            # A library or a runtime inside the plan is code; the artifact's hashes have been checked.
            self._runtime.engine_host_code_allowed = True
        self._dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
            trt.DataType.INT32: torch.int32,
            trt.DataType.BOOL: torch.bool,
        }

    def activate(self) -> None:
        if self._gpu is None:
            return
        # Both belong to the thread.
        cuda = self._torch.cuda
        cuda.set_device(self._gpu)
        if self._stream is None:
            self._stream = cuda.Stream()
        cuda.set_stream(self._stream)

    def load(self, file: Path) -> Any:
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise OutputError(
                f"TensorRT {self._trt.__version__} cannot load '{file}'; its messages are on stderr.",
                "Compile the model again with this version and for this GPU.",
            )
        return engine

    def tensors(self, engine: Any) -> list[EngineTensor]:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = self._trt.TensorIOMode.INPUT
        return [
            EngineTensor(name, engine.get_tensor_mode(name) == inputs, self._dtypes[engine.get_tensor_dtype(name)])
            for name in names
        ]

    def context(self, engine: Any, profile: int) -> EngineContext:
        context = engine.create_execution_context()
        stream = self.current_stream()
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        stream.synchronize()
        return _TorchContext(context)

    def is_here(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor) and value.is_cuda

    def tensor(self, value: Any, dtype: Any) -> Any:
        torch = self._torch
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        return tensor.to("cuda", dtype).contiguous()

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.empty(tuple(shape), dtype=dtype, device="cuda")

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.zeros(tuple(shape), dtype=dtype, device="cuda")

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def clone(self, tensor: Any) -> Any:
        return tensor.clone()

    def current_stream(self) -> Any:
        return self._torch.cuda.current_stream()

    def event(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()

    def record(self, work: Callable[[Any], None]) -> Any:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            work(self.current_stream())
        return graph

    def replay(self, graph: Any) -> None:
        graph.replay()

    def numpy(self, tensor: Any) -> NDArray[Any]:
        array: NDArray[Any] = tensor.float().cpu().numpy()
        return array


class _TorchContext:
    def __init__(self, context: Any):
        self._context = context

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        self._context.set_input_shape(name, tuple(shape))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def set_address(self, name: str, tensor: Any) -> None:
        self._context.set_tensor_address(name, tensor.data_ptr())

    def execute(self, stream: Any) -> bool:
        return bool(self._context.execute_async_v3(stream.cuda_stream))
