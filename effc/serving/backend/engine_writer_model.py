"""Triton model that writes text with TensorRT engines, which it runs itself: see :mod:`effc.compiler.engine_rows`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from effc.compiler.engine_choice import engines_here, what_is_missing
from effc.compiler.engine_device import TorchDevice
from effc.compiler.engine_records import Engines
from effc.compiler.engine_rows import EngineRows
from effc.compiler.engine_runner import EngineRunner
from effc.compiler.rows import Rows
from effc.errors import MissingDependencyError
from effc.serving.backend.writing import Writer


class TritonPythonModel(Writer):
    """See :class:`Writer`."""

    def open(
        self, directory: Path, settings: Mapping[str, Any], arguments: Mapping[str, str]
    ) -> tuple[Rows, Sequence[int]]:
        records = [Engines.from_json(values) for values in settings["engines"]]
        gpu = int(arguments["model_instance_device_id"])
        together = replace(records[0], engines=[engine for record in records for engine in record.engines])
        missing = what_is_missing(together, gpu)
        if missing is not None:
            raise MissingDependencyError(missing)
        record = next(record for record in records if engines_here(record, gpu))
        # The library is registered below. That variable is for Triton's own TensorRT backend.
        os.environ.pop("EFFC_REGISTER_PLUGINS", None)
        runner = EngineRunner(TorchDevice(directory, record, gpu), directory, engines_here(record, gpu))
        rows = EngineRows(runner, settings["max_batch"], record.pads)
        _try(rows)
        return rows, settings["ends"]


def _try(rows: EngineRows) -> None:
    """Run both engines once: what keeps them from running should show before a request does."""
    rows.add(np.zeros(1, np.int64))
    rows.step([0])
    rows.remove(0)
