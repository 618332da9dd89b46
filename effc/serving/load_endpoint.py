"""Ask a Triton server what its models are, and one of them to encode a text; over HTTP or gRPC."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from effc.errors import EffcError, UsageError

Encoded = dict[str, tuple[list[Any], list[int]]]
"""Tensors of one text: values in a row, and the shape without the batch."""

_PORTS = {"http": 8000, "grpc": 8001}


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers.

    Attributes:
        scheme: ``http`` or ``grpc``.
        timeout_s: for one of these questions.
    """

    scheme: str
    host: str
    port: int
    timeout_s: float = 10

    @classmethod
    def of(cls, url: str) -> Endpoint:
        """Read ``http://host:port`` or ``grpc://host:port``.

        Raises:
            UsageError: if it is neither.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in _PORTS or not parts.hostname:
            raise UsageError(
                f"'{url}' is no address of a server.",
                "Write, for example, http://127.0.0.1:8000 or grpc://127.0.0.1:8001.",
            )
        return cls(parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme])

    def models(self) -> list[str]:
        """The models that are ready.

        Raises:
            EffcError: if no server answers.
        """
        if self.scheme == "grpc":
            from effc.serving.load_grpc import grpc_models

            return grpc_models(self)
        index = self._http("POST", "/v2/repository/index", {"ready": True})
        return sorted({entry["name"] for entry in index})

    def config(self, model: str) -> Mapping[str, Any]:
        """A model's configuration.

        Raises:
            UsageError: if there is no such model.
            EffcError: if no server answers.
        """
        if self.scheme == "grpc":
            from effc.serving.load_grpc import grpc_config

            return grpc_config(self, model)
        config: Mapping[str, Any] = self._http("GET", f"/v2/models/{model}/config", model=model)
        return config

    def infer_text(self, model: str, text: str) -> Encoded:
        """What a model that takes ``text`` makes of one.

        Raises:
            EffcError: if it refuses the text.
        """
        if self.scheme == "grpc":
            from effc.serving.load_grpc import grpc_infer_text

            return grpc_infer_text(self, model, text)
        body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}
        answer = self._http("POST", f"/v2/models/{model}/infer", body, model=model)
        return {entry["name"]: (entry["data"], entry["shape"][1:]) for entry in answer["outputs"]}

    def _http(self, method: str, path: str, body: Any = None, model: str | None = None) -> Any:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EffcError(
                f"No server answers at {self.host}:{self.port}: {error}.", "Start one: effc serve OUT."
            ) from None
        finally:
            connection.close()
        if response.status == 200:
            return json.loads(content)
        if method == "GET" and model is not None:
            raise UsageError(f"The server has no model '{model}': {error_of(content)}.", "Ask it for another one.")
        raise EffcError(f"The server refuses: {error_of(content)}.", "Look at its log.")


def error_of(content: bytes) -> str:
    """What a server's error says."""
    text = content.decode(errors="replace").removeprefix("data:").strip()
    try:
        return str(json.loads(text).get("error", text))
    except ValueError:
        return text
