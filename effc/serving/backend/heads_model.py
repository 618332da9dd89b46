"""Triton model: a graph's outputs in, embeddings or labels out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effc.serving.backend import heads
from effc.serving.backend.triton import answer, inputs_of, version_directory
from effc.serving.backend.version import read_version


class TritonPythonModel:
    """See Triton's python backend for when each method is called."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        self._settings = read_version(version_directory(arguments))["head"]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [answer(request, self._outputs(inputs_of(request))) for request in requests]

    def _outputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = self._settings
        if settings["kind"] == "embedding":
            hidden, mask = given["hidden"], given["attention_mask"]
            return {"embedding": heads.embed(hidden, mask, settings["pooling"], settings["normalize"])}
        if settings["kind"] == "labels":
            scores, best = heads.classify(given["logits"], settings["labels"], settings["several"])
            return {"scores": scores, "label": best}
        scores, labels = heads.tag(given["logits"], settings["labels"])
        return {"scores": scores, "labels": labels}
