"""Triton model that writes text with a generating graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effc.compiler.generation import Generator
from effc.compiler.generation_records import Generation
from effc.compiler.generation_rows import rows_for
from effc.compiler.rows import Rows
from effc.serving.backend.forward import open_session
from effc.serving.backend.triton import providers, threads
from effc.serving.backend.writing import Writer


class TritonPythonModel(Writer):
    """See :class:`Writer`."""

    def open(
        self, directory: Path, settings: Mapping[str, Any], arguments: Mapping[str, str]
    ) -> tuple[Rows, Sequence[int]]:
        record = Generation.from_json(settings["generation"])
        session = open_session(
            directory, record.file, settings["library"], threads(arguments, settings["threads"]), providers(arguments)
        )
        generator: Any = Generator(session, record, settings["max_length"])  # type: ignore[arg-type]
        return rows_for(generator, settings["max_batch"]), record.eos_token_ids
