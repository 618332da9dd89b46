"""Building the native library and its self-test from this checkout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]


MADE_BY_SETUP = REPOSITORY / "build" / "native"


def release_build() -> Path:
    """The library as it is shipped, in the directory where ``make setup`` has built it, if it has."""
    directory = MADE_BY_SETUP if (MADE_BY_SETUP / "CMakeCache.txt").exists() else _own_directory("release")
    return _build(directory, (), "effc_cpu")


def cmake_build(name: str, *options: str, target: str | None = None) -> Path:
    """Configure and build in a directory kept between runs, so that only changed files are compiled again."""
    return _build(_own_directory(name), options, target)


def _own_directory(name: str) -> Path:
    key = hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"effc-native-{key}-{os.getuid()}" / name


def _build(directory: Path, options: Sequence[str], target: str | None) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    commands = [
        ["cmake", "-S", str(REPOSITORY), "-B", str(directory), *options],
        ["cmake", "--build", str(directory), "-j", "2", *(["--target", target] if target else [])],
    ]
    # Test processes that run side by side share the directory.
    with FileLock(directory.with_suffix(".lock")):
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return directory
