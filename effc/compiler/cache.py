"""Results of expensive steps, kept between compiles.

An entry's key is a hash of everything that decides its content: weights and config of the model, the settings and
version of every pass before it, and the versions of the toolchain. Entries are directories that appear at once, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effc.errors import OutputError

# Oldest entries go first when the cache outgrows this.
_LIMIT_BYTES = 20 << 30


def cache_directory() -> Path:
    """``EFFC_CACHE``, or effc's folder in the user's cache directory."""
    override = os.environ.get("EFFC_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "effc"


def cache_key(**parts: Any) -> str:
    """A hash of plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached(kind: str, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """The entry's directory, made by ``make(directory)`` if it is not there yet.

    Returns:
        the directory, and whether it was there already.

    Raises:
        OutputError: if the cache cannot be written, for example on a full disk.
    """
    entry = cache_directory() / kind / key
    if entry.is_dir():
        os.utime(entry)
        return entry, True
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=entry.parent))
    except OSError as error:
        raise _unusable(error) from error
    try:
        make(staging)
        try:
            staging.rename(entry)
        except OSError:
            # Another compile made the same entry meanwhile.
            if not entry.is_dir():
                raise
    except OSError as error:
        raise _unusable(error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _prune(keep=entry)
    return entry, False


def _unusable(error: OSError) -> OutputError:
    return OutputError(
        f"The cache '{cache_directory()}' cannot be written: {error.strerror or error}.",
        "Free some space, or name another directory in EFFC_CACHE.",
    )


def _prune(keep: Path) -> None:
    entries = []
    for entry in cache_directory().glob("*/*"):
        if entry.is_dir() and not entry.name.startswith("."):
            size = sum(file.stat().st_size for file in entry.iterdir() if file.is_file())
            entries.append((entry.stat().st_mtime, size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= _LIMIT_BYTES:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
