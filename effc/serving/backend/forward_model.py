"""Triton model: one graph, tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effc.serving.backend.forward import Forward, ForwardSettings
from effc.serving.backend.triton import Counters, LateCounter, answer, inputs_of, providers, threads, version_directory
from effc.serving.backend.version import read_version


class TritonPythonModel:
    """See Triton's python backend for when each method is called."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        directory = version_directory(arguments)
        values = read_version(directory)
        settings = ForwardSettings.from_json(values["forward"])
        self._forward = Forward(directory, settings, threads(arguments, values["threads"]), providers(arguments))
        label = {"model": arguments["model_name"], "version": arguments["model_version"]}
        self._runs = LateCounter(Counters("effc_runs", "Runs of the graph, each for one or more requests", [label]))

    def execute(self, requests: list[Any]) -> list[Any]:
        before = self._forward.runs
        wanted = [request.requested_output_names() for request in requests]
        answers = self._forward.run([inputs_of(request) for request in requests], wanted)
        self._runs.add(self._forward.runs - before)
        return [answer(request, outputs) for request, outputs in zip(requests, answers, strict=True)]

    def finalize(self) -> None:
        self._runs.close()
