"""The files of an artifact: their names, ``effc.json``, and whether they are those that were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from effc.compiler.manifest import Manifest
from effc.errors import OutputError

MANIFEST_NAME = "effc.json"
MODEL_NAME = "model.onnx"
GENERATION_NAME = "generation.onnx"
SCHEMA_VERSION = 1

COMPILE_AGAIN = "Compile the model again, or copy the whole artifact directory again."


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check the ``effc.json`` of an artifact directory.

    Raises:
        OutputError: if there is none, it is damaged, or a newer effc wrote it.
    """
    directory = Path(directory)
    file = directory / MANIFEST_NAME
    if not directory.exists():
        raise OutputError(f"There is no artifact at '{directory}'.", "Check the path, or make one: effc compile MODEL.")
    if not directory.is_dir():
        raise OutputError(f"'{directory}' is a file, not an artifact.", "Give the directory that holds effc.json.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(
            f"'{directory}' is not an effc artifact: it has no {MANIFEST_NAME}.",
            f"Give the directory that `effc compile MODEL -o DIRECTORY` wrote, or run: effc compile {directory}.",
        ) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"'{file}' cannot be read: {error}.", COMPILE_AGAIN) from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise OutputError(
            f"'{file}' was written by effc {values.get('effc_version', '(unknown)')} in format {version}; this effc "
            f"reads format {SCHEMA_VERSION}.",
            "Upgrade: pip install --upgrade effc.",
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"]) or "the file"
        raise OutputError(
            f"'{file}' is not what effc writes: {where}: {detail['msg']}.",
            f"{COMPILE_AGAIN} If a newer effc wrote it, upgrade: pip install --upgrade effc.",
        ) from None


def check_files(
    directory: Path, manifest: Manifest, names: Sequence[str] | None = None, *, hashes: bool = True
) -> None:
    """Compare files of an artifact with ``effc.json``: presence and size, and the SHA-256 where ``hashes`` is set.

    Args:
        names: which files; all of them when None.

    Raises:
        OutputError: naming the first file that is missing, truncated or changed.
    """
    for name in manifest.files if names is None else names:
        record, file = manifest.files[name], directory / name
        try:
            size = file.stat().st_size
        except OSError:
            raise OutputError(f"The artifact '{directory}' lacks its file '{name}'.", COMPILE_AGAIN) from None
        if size != record.bytes:
            what = "truncated" if size < record.bytes else "changed"
            raise OutputError(
                f"'{file}' is {what}: it has {size:,} bytes, {MANIFEST_NAME} says {record.bytes:,}.", COMPILE_AGAIN
            )
        if hashes:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != record.sha256:
                raise OutputError(
                    f"'{file}' is damaged or was changed: its SHA-256 is not the one in {MANIFEST_NAME}.",
                    COMPILE_AGAIN,
                )


def model_files(manifest: Manifest) -> list[str]:
    """The graph and its external data: what a run depends on. A report, say, may be edited.

    Raises:
        OutputError: if the manifest lists no graph.
    """
    names = [name for name in manifest.files if name == MODEL_NAME or name.startswith(f"{MODEL_NAME}.")]
    if MODEL_NAME not in names:
        raise OutputError(f"{MANIFEST_NAME} lists no {MODEL_NAME}.", COMPILE_AGAIN)
    return names
