"""Triton model: hands each request to the variant that is fastest at its length, or the best that is fast enough."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from effc.errors import EffcError
from effc.serving.backend.route import Budget, Router
from effc.serving.backend.triton import Counters, answer, failure, inputs_of, version_directory
from effc.serving.backend.version import read_version


class TritonPythonModel:
    """See Triton's python backend for when each method is called."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        settings = read_version(version_directory(arguments))["router"]
        times = {name: {int(key): value for key, value in curve.items()} for name, curve in settings["times"].items()}
        budget = settings.get("budget")
        self._router = Router(times, settings["limits"], None if budget is None else Budget(**budget))
        # Milliseconds of computing that were handed out and are not back yet.
        self._waiting = 0.0
        self._models: dict[str, str] = settings["models"]
        labels = [{"model": arguments["model_name"], "variant": name} for name in self._router.variants]
        self._routed = Counters("effc_routed", "Requests that went to each variant", labels)

    async def execute(self, requests: list[Any]) -> list[Any]:
        return list(await asyncio.gather(*(self._forward(request) for request in requests)))

    async def _forward(self, request: Any) -> Any:
        ids = inputs_of(request)["input_ids"]
        if ids.ndim != 2 or not ids.size:
            return failure(EffcError("'input_ids' is empty.", "Give at least one token."))
        # By the padded length: that is what is computed.
        rows, length = ids.shape
        variant = self._router.choose(length, rows, self._waiting)
        expected = rows * self._router.milliseconds(variant, length)
        self._routed.add(1, self._router.variants.index(variant))
        wanted = [name for name in request.requested_output_names() if name != "variant"]
        if wanted:
            inner = pb_utils.InferenceRequest(
                model_name=self._models[variant], inputs=request.inputs(), requested_output_names=wanted
            )
            self._waiting += expected
            try:
                response = await inner.async_exec()
            finally:
                self._waiting -= expected
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            tensors = response.output_tensors()
        else:
            tensors = []
        named = answer(request, {"variant": np.full((len(ids), 1), variant.encode(), dtype=np.object_)})
        return pb_utils.InferenceResponse([*tensors, *named.output_tensors()])
