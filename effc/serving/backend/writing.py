"""Text in, text out, token by token, whatever runs the model. Tensors are named as vLLM's Triton backend names them."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from effc.compiler.rows import Rows
from effc.errors import EffcError, UsageError
from effc.serving.backend.sampling_parameters import Wanted, read_wanted
from effc.serving.backend.scheduler import Finish, Job, Scheduler
from effc.serving.backend.text_stream import TextStream
from effc.serving.backend.triton import Counters, failure, inputs_of, version_directory
from effc.serving.backend.version import read_version, texts

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Writer(ABC):
    """A model for Triton's python backend, which says when each method is called."""

    @abstractmethod
    def open(
        self, directory: Path, settings: Mapping[str, Any], arguments: Mapping[str, str]
    ) -> tuple[Rows, Sequence[int]]:
        """What runs the model, and the tokens that end a text.

        Args:
            directory: of the model's version, its files checked.
            settings: of that version.
            arguments: Triton's.
        """

    def initialize(self, arguments: Mapping[str, str]) -> None:
        directory = version_directory(arguments)
        settings = read_version(directory)
        # Tokenizers' own threads would compete with the graph's.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_bytes: int = settings["max_bytes"]
        rows, ends = self.open(directory, settings, arguments)
        self._scheduler = Scheduler(rows, ends, settings["vocabulary"], settings["max_length"])
        label = {"model": arguments["model_name"], "version": arguments["model_version"]}
        self._steps = Counters("effc_decode_steps", "Steps that wrote a token of each text in progress", [label])
        self._tokens = Counters("effc_tokens", "Tokens written", [label])
        self._counted = 0

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._scheduler.submit(_Answer(self, request, sender).job())
            except Exception as error:
                sender.send(failure(error), flags=_FINAL)
        # Decoupled models answer through the senders.

    def finalize(self) -> None:
        self._scheduler.close()

    def count(self, tokens: int) -> None:
        """Bring the server's metrics up to date."""
        self._tokens.add(tokens)
        steps = self._scheduler.steps
        self._steps.add(steps - self._counted)
        self._counted = steps

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def stream(self, wanted: Wanted) -> TextStream:
        """An empty answer."""
        return TextStream(self._tokenizer, wanted.stop)

    def prompt_of(self, given: Mapping[str, Any]) -> str:
        """The text of a request.

        Raises:
            EffcError: if it is not one text of UTF-8.
        """
        values = given["text_input"].reshape(-1)
        if len(values) != 1:
            raise UsageError(f"text_input has {len(values)} texts.", "Send one text per request.")
        return texts(values, self._max_bytes)[0]


class _Answer:
    """One request that is being answered."""

    def __init__(self, model: Writer, request: Any, sender: Any):
        given = inputs_of(request)
        self._model, self._sender = model, sender
        self._wanted = read_wanted(_parameters(request, given))
        self._streams = _flag(given, "stream", False)
        self._names = set(request.requested_output_names())
        self._prompt = model.prompt_of(given)
        self._text = model.stream(self._wanted)
        self._pieces: list[str] = [] if _flag(given, "exclude_input_in_output", True) else [self._prompt]
        self._tokens: list[int] = []
        self._count = 0

    def job(self) -> Job:
        prompt = np.array(self._model.encode(self._prompt), np.int64)
        return Job(prompt, self._wanted, self._emit, self._done, self._sender.is_cancelled)

    def _emit(self, token: int) -> bool:
        self._tokens.append(token)
        self._count += 1
        self._pieces.append(self._text.put(token))
        if self._streams:
            self._send(None)
        return self._text.stopped

    def _done(self, finish: Finish | Exception) -> None:
        self._model.count(self._count)
        if isinstance(finish, Exception):
            self._sender.send(failure(finish), flags=_FINAL)
            return
        if finish == "cancelled":
            error = pb_utils.TritonError("The request was cancelled.", pb_utils.TritonError.CANCELLED)
            self._sender.send(pb_utils.InferenceResponse(error=error), flags=_FINAL)
            return
        self._pieces.append(self._text.end())
        self._send("stop" if self._text.stopped else finish)

    def _send(self, finish: str | None) -> None:
        values = {
            "text_output": np.array(["".join(self._pieces).encode()], dtype=np.object_),
            "token_ids": np.array(self._tokens, np.int64),
            "finish_reason": np.array([(finish or "").encode()], dtype=np.object_),
        }
        self._pieces, self._tokens = [], []
        tensors = [pb_utils.Tensor(name, value) for name, value in values.items() if name in self._names]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=_FINAL if finish is not None else 0)


def _parameters(request: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters: as vLLM's tensor of JSON text, or as parameters of the request."""
    values: dict[str, Any] = json.loads(request.parameters() or "{}")
    if "sampling_parameters" in given:
        [text] = texts(given["sampling_parameters"].reshape(-1)[:1], 1 << 16)
        try:
            more = json.loads(text)
        except ValueError as error:
            raise EffcError(f"sampling_parameters is no JSON: {error}.", "Correct it.") from None
        if not isinstance(more, dict):
            raise UsageError("sampling_parameters must be a JSON object.", 'Write {"max_tokens": 32}.')
        values |= more
    return values


def _flag(given: Mapping[str, Any], name: str, default: bool) -> bool:
    return bool(given[name].reshape(-1)[0]) if name in given else default
