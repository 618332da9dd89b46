"""One client of a text model on a Triton server, over gRPC; see :mod:`effc.serving.load_client` for HTTP."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from effc.errors import EffcError, MissingDependencyError, UsageError
from effc.serving.load_client import Answer, RequestFailed, Target
from effc.serving.load_endpoint import Encoded, Endpoint


def grpc_models(endpoint: Endpoint) -> list[str]:
    """See :meth:`Endpoint.models`."""
    with _asking(endpoint) as client:
        index = client.get_model_repository_index(as_json=True, client_timeout=endpoint.timeout_s).get("models", [])
    return sorted({entry["name"] for entry in index if entry.get("state") == "READY"})


def grpc_config(endpoint: Endpoint, model: str) -> Mapping[str, Any]:
    """See :meth:`Endpoint.config`."""
    with _asking(endpoint, model) as client:
        config: Mapping[str, Any] = client.get_model_config(model, as_json=True, client_timeout=endpoint.timeout_s)
    return config["config"]  # type: ignore[no-any-return]


def grpc_infer_text(endpoint: Endpoint, model: str, text: str) -> Encoded:
    """See :meth:`Endpoint.infer_text`."""
    tensor = _grpc().InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    with _asking(endpoint) as client:
        result = client.infer(model, [tensor], client_timeout=endpoint.timeout_s)
    arrays = {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
    return {name: (array.reshape(-1).tolist(), list(array.shape[1:])) for name, array in arrays.items()}


@contextmanager
def _asking(endpoint: Endpoint, model: str | None = None) -> Iterator[Any]:
    """A connection whose errors are effc's."""
    grpc = _grpc()
    try:
        with grpc.InferenceServerClient(f"{endpoint.host}:{endpoint.port}") as client:
            yield client
    except grpc.InferenceServerException as error:
        if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
            raise EffcError(
                f"No server answers by gRPC at {endpoint.host}:{endpoint.port}: {error.message()}.",
                "Start one: effc serve OUT.",
            ) from None
        if model is None:
            raise EffcError(f"The server refuses: {error.message()}.", "Look at its log.") from None
        raise UsageError(f"The server has no model '{model}': {error.message()}.", "Ask it for another one.") from None


class GrpcClient:
    """A connection; texts that are written come over one stream. For one thread."""

    def __init__(self, target: Target, timeout_s: float):
        self._target, self._timeout_s, self._grpc = target, timeout_s, _grpc()
        self._client = self._grpc.InferenceServerClient(f"{target.host}:{target.port}")
        self._answers: queue.Queue[tuple[Any, Any]] | None = None

    def ask(self, text: str) -> Answer:
        """Send one text and read the whole answer.

        Raises:
            RequestFailed: with what the server said.
        """
        start = time.perf_counter()
        try:
            if self._target.writes:
                return self._written(text, start)
            tensor = self._tensor(self._target.field, [[text.encode()]], "BYTES")
            self._client.infer(self._target.model, [tensor], client_timeout=self._timeout_s)
            return Answer(time.perf_counter() - start, 0)
        except self._grpc.InferenceServerException as error:
            self._stop_stream()
            raise RequestFailed(str(error.message())) from None

    def close(self) -> None:
        """Close the connection."""
        self._stop_stream()
        self._client.close()

    def _written(self, text: str, start: float) -> Answer:
        if self._answers is None:
            answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
            self._client.start_stream(callback=lambda result, error: answers.put((result, error)))
            self._answers = answers
        parameters = json.dumps({"max_tokens": self._target.max_tokens, "ignore_eos": True})
        inputs = [
            self._tensor(self._target.field, [text.encode()], "BYTES"),
            self._tensor("stream", [True], "BOOL"),
            self._tensor("sampling_parameters", [parameters.encode()], "BYTES"),
        ]
        self._client.async_stream_infer(self._target.model, inputs, enable_empty_final_response=True)
        first, tokens = 0.0, 0
        while True:
            try:
                result, error = self._answers.get(timeout=self._timeout_s)
            except queue.Empty:
                self._stop_stream()
                raise RequestFailed(f"no answer within {self._timeout_s:g} s") from None
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                first = first or time.perf_counter() - start
                written = result.as_numpy("token_ids")
                tokens += 1 if written is None else written.size
            if response.parameters["triton_final_response"].bool_param:
                return Answer(first, tokens)

    def _tensor(self, name: str, values: list[Any], kind: str) -> Any:
        array = np.array(values, dtype=bool if kind == "BOOL" else np.object_)
        tensor = self._grpc.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        return tensor

    def _stop_stream(self) -> None:
        if self._answers is not None:
            self._client.stop_stream(cancel_requests=True)
            self._answers = None


def _grpc() -> Any:
    try:
        import tritonclient.grpc as module
    except ImportError:
        raise MissingDependencyError(
            "A load test by gRPC needs the package tritonclient.", "Install it: pip install 'effc[serve]'."
        ) from None
    return module
