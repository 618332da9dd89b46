"""One client of a text model on a Triton server, over its HTTP ``generate`` endpoints. Standard library only."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effc.errors import UsageError
from effc.serving.load_endpoint import Endpoint, error_of


@dataclass(frozen=True)
class Target:
    """A model on a server.

    Attributes:
        field: the input that takes text.
        writes: it writes text, token by token.
        max_tokens: that it is asked to write.
        scheme: ``http`` or ``grpc``.
    """

    host: str
    port: int
    model: str
    field: str
    writes: bool
    max_tokens: int
    scheme: str = "http"


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
        first_s: seconds until the first part of the answer came.
        tokens: that were written; 0 for models that write none.
    """

    first_s: float
    tokens: int


class RequestFailed(Exception):
    """The server refused a request, or there was no answer."""


def find_target(url: str, model: str | None, max_tokens: int) -> Target:
    """Ask a server what a model takes.

    Args:
        url: ``http://host:port`` or ``grpc://host:port``.
        model: the only one that takes text when None.

    Raises:
        UsageError: if the URL is none, there is no such model, or it takes no text.
        EffcError: if the server does not answer.
        MissingDependencyError: if tritonclient is needed and not installed.
    """
    endpoint = Endpoint.of(url)
    names = [model] if model else endpoint.models()
    found = [target_of(endpoint.config(name), endpoint, name, max_tokens) for name in names]
    return choose([target for target in found if target is not None], model)


def choose(found: list[Target], model: str | None) -> Target:
    """The one model that takes text.

    Raises:
        UsageError: if there is none, or several.
    """
    if len(found) != 1:
        which = f"'{model}' takes no text" if model else f"{len(found)} models take text: {_names(found)}"
        raise UsageError(f"{which}.", "Name one that does with --model.")
    return found[0]


def target_of(config: Mapping[str, Any], endpoint: Endpoint, model: str, max_tokens: int) -> Target | None:
    """A model by its configuration; None if it takes no text."""
    names = {entry["name"] for entry in config.get("input", [])}
    place = endpoint.host, endpoint.port, model
    if "text_input" in names:
        return Target(*place, "text_input", True, max_tokens, endpoint.scheme)
    if names == {"text"} and config.get("platform") == "ensemble":
        return Target(*place, "text", False, 0, endpoint.scheme)
    return None


def takes_tensors(config: Mapping[str, Any]) -> bool:
    """Whether no input of a model is text."""
    return all(entry.get("data_type") != "TYPE_STRING" for entry in config.get("input", []))


class Client:
    """A connection that is opened again when it breaks. For one thread."""

    def __init__(self, target: Target, timeout_s: float):
        self._target, self._timeout_s = target, timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, text: str) -> Answer:
        """Send one text and read the whole answer.

        Raises:
            RequestFailed: with what the server said.
        """
        target = self._target
        body: dict[str, Any] = {target.field: text}
        if target.writes:
            body |= {"max_tokens": target.max_tokens, "stream": True, "ignore_eos": True}
        start = time.perf_counter()
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(target.host, target.port, timeout=self._timeout_s)
            path = f"/v2/models/{target.model}/generate{'_stream' if target.writes else ''}"
            self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            return self._read(response, start)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise RequestFailed(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, response: http.client.HTTPResponse, start: float) -> Answer:
        if not self._target.writes or response.status != 200:
            content = response.read()
            if response.status != 200:
                raise RequestFailed(error_of(content))
            return Answer(time.perf_counter() - start, 0)
        first, parts = 0.0, 0
        for line in response:
            if not line.startswith(b"data:"):
                continue
            first = first or time.perf_counter() - start
            values = json.loads(line[5:])
            if "error" in values:
                response.read()
                raise RequestFailed(str(values["error"]))
            tokens = values.get("token_ids", [])
            parts += len(tokens) if isinstance(tokens, list) else 1
        # A connection takes its next request only once the end of the answer was read.
        response.read()
        return Answer(first, parts)


def _names(targets: list[Target]) -> str:
    return ", ".join(target.model for target in targets) or "none"
