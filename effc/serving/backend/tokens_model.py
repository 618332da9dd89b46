"""Triton model: text in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effc.errors import EffcError
from effc.serving.backend.tokens import TextEncoder, TokenizerSettings
from effc.serving.backend.triton import answer, inputs_of, version_directory
from effc.serving.backend.version import read_version, texts


class TritonPythonModel:
    """See Triton's python backend for when each method is called."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        directory = version_directory(arguments)
        settings = TokenizerSettings.from_json(read_version(directory)["tokenizer"])
        self._encoder = TextEncoder(directory, settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [answer(request, self._encode(request)) for request in requests]

    def _encode(self, request: Any) -> Any:
        try:
            given = inputs_of(request)["text"].reshape(-1)
            return self._encoder.encode(texts(given, self._encoder.settings.max_bytes))
        except EffcError as error:
            return error
