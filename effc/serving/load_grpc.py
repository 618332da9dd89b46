"""One client of a text model on a Triton server, over gRPC; see :mod:`effc.serving.load_client` for HTTP."""

from __future__ import annotations

import json
import queue
import time
from typing import Any

import numpy as np

from effc.errors import EffcError, MissingDependencyError, UsageError
from effc.serving.load_client import Answer, RequestFailed, Target, choose, target_of

SCHEME = "grpc"
DEFAULT_PORT = 8001


def find_grpc_target(host: str, port: int, model: str | None, max_tokens: int, timeout_s: float) -> Target:
    """Ask a server what a model takes.

    Raises:
        UsageError: if there is no such model, or it takes no text.
        EffcError: if the server does not answer.
        MissingDependencyError: if tritonclient is not installed.
    """
    grpc = _grpc()
    try:
        with grpc.InferenceServerClient(f"{host}:{port}") as client:
            if not client.is_server_ready(client_timeout=timeout_s):
                raise EffcError(f"The server at {host}:{port} is not ready.", "Wait until it has loaded its models.")
            index = client.get_model_repository_index(as_json=True, client_timeout=timeout_s).get("models", [])
            ready = sorted({entry["name"] for entry in index if entry.get("state") == "READY"})
            found = []
            for name in [model] if model else ready:
                config = client.get_model_config(name, as_json=True, client_timeout=timeout_s)["config"]
                found.append(target_of(config, host, port, name, max_tokens, SCHEME))
    except grpc.InferenceServerException as error:
        if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
            raise EffcError(
                f"No server answers by gRPC at {host}:{port}: {error.message()}.", "Start one: effc serve OUT."
            ) from None
        raise UsageError(f"The server has no model '{model}': {error.message()}.", "Ask it for another one.") from None
    return choose([target for target in found if target is not None], model)


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
