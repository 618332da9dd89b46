"""Building the native library and its self-test from this checkout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def cmake_build(name: str, *options: str, target: str | None = None) -> Path:
    """Configure and build in a directory kept between runs, so that only changed files are compiled again."""
    key = hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:12]
    directory = Path(tempfile.gettempdir()) / f"effc-native-{key}-{os.getuid()}" / name
    commands = [
        ["cmake", "-S", str(REPOSITORY), "-B", str(directory), *options],
        ["cmake", "--build", str(directory), "-j", "2", *(["--target", target] if target else [])],
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return directory
