"""What every model of effc needs of Triton's python backend."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from effc.compiler.machine import usable_cores
from effc.errors import EffcError, UsageError


def version_directory(arguments: Mapping[str, str]) -> Path:
    """The directory of the version that is being loaded."""
    return Path(arguments["model_repository"]) / arguments["model_version"]


def providers(arguments: Mapping[str, str]) -> list[Any]:
    """ONNX Runtime's execution providers for where this instance is to run.

    Raises:
        UsageError: if that is a GPU and the server's onnxruntime has no kernels for it.
    """
    if arguments["model_instance_kind"] != "GPU":
        return ["CPUExecutionProvider"]
    # Imported here because only models that run a graph need it, and each is a process of its own.
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UsageError(
            "This model is to run on a GPU, and the onnxruntime of the server has no GPU kernels.",
            "Install onnxruntime-gpu in the server, or write the repository with --instances cpu.",
        )
    device = int(arguments["model_instance_device_id"])
    return [("CUDAExecutionProvider", {"device_id": device}), "CPUExecutionProvider"]


def threads(arguments: Mapping[str, str], asked: int | None) -> int:
    """Computing threads of one instance: those asked for, or its share of the cores."""
    if asked is not None:
        return asked
    groups = json.loads(arguments["model_config"]).get("instance_group", [])
    return max(1, usable_cores() // max(1, sum(int(group.get("count", 1)) for group in groups)))


def inputs_of(request: Any) -> dict[str, NDArray[Any]]:
    """The inputs that a client sent, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def answer(request: Any, outputs: Mapping[str, NDArray[Any]] | EffcError) -> Any:
    """A response with those outputs that the client wants, or with the error."""
    if isinstance(outputs, EffcError):
        return failure(outputs)
    wanted = request.requested_output_names()
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.ascontiguousarray(outputs[name])) for name in wanted if name in outputs]
    )


def failure(error: Exception) -> Any:
    """A response that says what is wrong: the client's fault if effc says so, the server's if not."""
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, EffcError) else pb_utils.TritonError.INTERNAL
    text = str(error) if isinstance(error, EffcError) else f"{type(error).__name__}: {error}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))


class Counters:
    """Counters of the server's metrics, one per set of labels, in the order given."""

    def __init__(self, name: str, description: str, labels: Iterable[Mapping[str, str]]):
        # Metrics end with their family, so it has to live as long as they do.
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
        self._metrics = [self._family.Metric(labels=dict(entry)) for entry in labels]

    def add(self, amount: float, number: int = 0) -> None:
        """Raise one of them, which waits for the server."""
        self._metrics[number].increment(amount)


class LateCounter:
    """A counter that requests do not wait for: the server's metrics follow within a fifth of a second."""

    _INTERVAL_S = 0.2

    def __init__(self, counters: Counters):
        self._counters, self._amount = counters, 0.0
        self._lock, self._raised, self._closed = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="effc-counter", daemon=True)
        self._thread.start()

    def add(self, amount: float) -> None:
        """Raise it."""
        with self._lock:
            self._amount += amount
        if not self._raised.is_set():
            self._raised.set()

    def close(self) -> None:
        """Tell the server what it was not told yet, and end."""
        self._closed.set()
        self._raised.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed.is_set():
            self._raised.wait()
            self._closed.wait(self._INTERVAL_S)
            self._raised.clear()
            with self._lock:
                amount, self._amount = self._amount, 0.0
            if amount:
                self._counters.add(amount)
