"""Runs the engines of an artifact: which profile, whose memory, which stream, and CUDA graphs.

Tensors on the device go in and come out without copies. Work is queued on the caller's current stream, and nothing
waits for it: results are in order for whatever the caller queues behind. A context is one stream's at a time; where
another comes, it waits for the former.

Shapes for which :meth:`EngineRunner.capture` was called have memory and a context of their own and a CUDA graph, which
launches all kernels of the engine at once: worth it where an engine's kernels are shorter than their launches. There
the inputs are copied in and the results out, on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from effc.compiler.engine_choice import choose_profile
from effc.compiler.engine_device import Device, EngineContext, EngineTensor
from effc.compiler.engine_records import BuiltEngine
from effc.errors import EffcError, UsageError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class _Lane:
    """A context, and the last work queued on it."""

    context: EngineContext
    stream: Any = None
    done: Any = None


@dataclass
class _Captured:
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    graph: Any
    lane: _Lane


class EngineRunner:
    """The engines of one artifact on one device.

    Args:
        path: the artifact directory.
        engines: by graph.

    Attributes:
        graphs: the engines, by graph.
        device: where they run.
    """

    def __init__(self, device: Device, path: Path, engines: Mapping[str, BuiltEngine]):
        self.graphs = dict(engines)
        self.device = device
        self._engines = {name: device.load(path / record.file) for name, record in engines.items()}
        self._tensors = {name: device.tensors(engine) for name, engine in self._engines.items()}
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, on the device; see :class:`effc.compiler.engine_text.Runner`.

        Args:
            feeds: tensors of the device, which are used where they lie if they have the engine's type, or arrays.

        Raises:
            UsageError: if no profile holds them.
            EffcError: if TensorRT does not take the work.
        """
        given = self._given(graph, feeds)
        captured = self._captured.get(_key(graph, given))
        if captured is not None:
            return self._replay(captured, given)
        number = choose_profile(self.graphs[graph], {name: tuple(value.shape) for name, value in given.items()})
        with self._lock:
            lane = self._lanes.get((graph, number))
            if lane is None:
                lane = self._lanes[graph, number] = _Lane(self.device.context(self._engines[graph], number))
            stream = self._take(lane)
            results = self._bind(graph, lane.context, given)
            self._execute(graph, lane.context, stream)
            lane.done = self.device.event(stream)
        return results

    def capture(self, graph: str, shapes: Shapes) -> None:
        """Record a CUDA graph for inputs of exactly these shapes; :meth:`run` replays it from then on.

        Args:
            shapes: of every input of the engine, by name.

        Raises:
            UsageError: if an input is left out or no profile holds them.
            EffcError: if TensorRT does not take the work.
        """
        device = self.device
        wanted = [tensor for tensor in self._tensors[graph] if tensor.is_input]
        for tensor in wanted:
            if tensor.name not in shapes:
                raise UsageError(f"The engine '{graph}' also reads '{tensor.name}'.", "Give the shapes of all inputs.")
        number = choose_profile(self.graphs[graph], {tensor.name: shapes[tensor.name] for tensor in wanted})
        with self._lock:
            inputs = {tensor.name: device.zeros(shapes[tensor.name], tensor.dtype) for tensor in wanted}
            # Another use of the context would change the addresses that the graph has recorded.
            lane = _Lane(device.context(self._engines[graph], number))
            outputs = self._bind(graph, lane.context, inputs)
            # Once outside: TensorRT finishes its preparations for new shapes in the first run.
            stream = device.current_stream()
            self._execute(graph, lane.context, stream)
            device.synchronize(stream)
            recorded = device.record(lambda stream: self._execute(graph, lane.context, stream))
            self._captured[_key(graph, inputs)] = _Captured(inputs, outputs, recorded, lane)

    def is_here(self, value: Any) -> bool:
        """Whether a value is a tensor of the device."""
        return self.device.is_here(value)

    def numpy(self, value: Any) -> NDArray[Any]:
        """A tensor as a numpy array."""
        return self.device.numpy(value)

    def inputs(self, graph: str) -> list[EngineTensor]:
        """What an engine reads."""
        return [tensor for tensor in self._tensors[graph] if tensor.is_input]

    def _given(self, graph: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {tensor.name: self.device.tensor(feeds[tensor.name], tensor.dtype) for tensor in self.inputs(graph)}

    def _take(self, lane: _Lane) -> Any:
        """The caller's stream, behind what another one has queued on the lane."""
        stream = self.device.current_stream()
        if lane.done is not None and lane.stream != stream:
            self.device.wait(stream, lane.done)
        lane.stream = stream
        return stream

    def _bind(self, graph: str, context: EngineContext, given: Mapping[str, Any]) -> dict[str, Any]:
        """Give a context its inputs, and memory for its outputs."""
        for name, value in given.items():
            context.set_shape(name, tuple(value.shape))
            context.set_address(name, value)
        results = {}
        for tensor in self._tensors[graph]:
            if not tensor.is_input:
                results[tensor.name] = self.device.empty(context.shape(tensor.name), tensor.dtype)
                context.set_address(tensor.name, results[tensor.name])
        return results

    def _execute(self, graph: str, context: EngineContext, stream: Any) -> None:
        if not context.execute(stream):
            raise EffcError(f"TensorRT failed on the engine '{graph}'.", "Its messages are on stderr.")

    def _replay(self, captured: _Captured, given: Mapping[str, Any]) -> dict[str, Any]:
        device = self.device
        with self._lock:
            stream = self._take(captured.lane)
            for name, value in given.items():
                device.copy(captured.inputs[name], value)
            device.replay(captured.graph)
            # The next replay overwrites them.
            results = {name: device.clone(value) for name, value in captured.outputs.items()}
            captured.lane.done = device.event(stream)
        return results


def _key(graph: str, given: Mapping[str, Any]) -> tuple[Any, ...]:
    return (graph, *sorted((name, tuple(value.shape)) for name, value in given.items()))
