"""Builds the native library once for all tests of this directory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

# The helper modules beside this file, whatever pytest's import mode is.
sys.path.insert(0, str(Path(__file__).parent))

from native_build import release_build


@pytest.fixture(scope="session")
def library() -> Path:
    """The native library: the one that EFFC_NATIVE_LIBRARY names, or one built from this checkout."""
    override = os.environ.get("EFFC_NATIVE_LIBRARY")
    if override:
        return Path(override)
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    return release_build() / "libeffc_cpu.so"
