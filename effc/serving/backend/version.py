"""One version of a model in a repository: its settings, and the proof that its files are those that were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from effc.errors import OutputError

SETTINGS_NAME = "effc_model.json"
HASHES_NAME = "effc_files.json"

_WRITE_AGAIN = "Write this version again with: effc triton."


def read_version(directory: Path) -> dict[str, Any]:
    """The settings of a model, after all files of the version were compared with their SHA-256.

    Raises:
        OutputError: naming the first file that is missing or changed.
    """
    check_version(directory)
    settings: dict[str, Any] = json.loads((directory / SETTINGS_NAME).read_text(encoding="utf-8"))
    return settings


def check_version(directory: Path) -> None:
    """Compare all files of a version with the hashes that were written beside them.

    Raises:
        OutputError: naming the first file that is missing or changed, or lies outside the directory.
    """
    try:
        hashes = json.loads((directory / HASHES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"'{directory / HASHES_NAME}' cannot be read: {error}.", _WRITE_AGAIN) from None
    for name, expected in hashes.items():
        path = inside(directory, name)
        try:
            actual = sha256(path)
        except OSError:
            raise OutputError(f"The model version '{directory}' lacks its file '{name}'.", _WRITE_AGAIN) from None
        if actual != expected:
            raise OutputError(f"'{path}' was changed: its SHA-256 is not the recorded one.", _WRITE_AGAIN)


def write_hashes(directory: Path) -> None:
    """Record the SHA-256 of every file that a version has now."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != HASHES_NAME)
    hashes = {path.relative_to(directory).as_posix(): sha256(path) for path in files}
    (directory / HASHES_NAME).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def inside(directory: Path, name: str) -> Path:
    """The file ``name`` of a directory.

    Raises:
        OutputError: if the name leads out of it, also by a symbolic link.
    """
    plain = PurePosixPath(name)
    path = directory / plain
    if plain.is_absolute() or ".." in plain.parts or not path.resolve().is_relative_to(directory.resolve()):
        raise OutputError(f"The file name '{name}' leads out of '{directory}'.", "Do not use files of that origin.")
    return path


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def texts(values: Iterable[Any], limit: int) -> list[str]:
    """Text of Triton's byte strings.

    Args:
        limit: bytes that one text may have.

    Raises:
        OutputError: if one is longer, or not UTF-8.
    """
    result = []
    for value in values:
        raw = value if isinstance(value, bytes) else str(value).encode()
        if len(raw) > limit:
            raise OutputError(f"A text has {len(raw):,} bytes; this server takes {limit:,}.", "Send it in parts.")
        try:
            result.append(raw.decode())
        except UnicodeDecodeError:
            raise OutputError("A text is not UTF-8.", "Encode it as UTF-8.") from None
    return result
