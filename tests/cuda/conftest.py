"""Builds the CUDA kernels for the emulator, once for all tests of this directory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The helper modules beside this file and those of the native kernels' tests, whatever pytest's import mode is.
sys.path.insert(0, str(Path(__file__).parents[1] / "native"))
sys.path.insert(0, str(Path(__file__).parent))

from emulated_build import COUNT, LINEAR, PROGRAM, SELFTEST, emulated_build


@pytest.fixture(scope="session")
def emulated_directory() -> Path:
    return emulated_build("cuda-emulated")


@pytest.fixture
def emulated(emulated_directory: Path) -> Path:
    """The program that runs a problem under the emulator."""
    return emulated_directory / PROGRAM


@pytest.fixture
def emulated_linear(emulated_directory: Path) -> Path:
    """The same for linear attention."""
    return emulated_directory / LINEAR


@pytest.fixture
def selftest(emulated_directory: Path) -> Path:
    """The emulator's own small kernels."""
    return emulated_directory / SELFTEST


@pytest.fixture
def count(emulated_directory: Path) -> Path:
    """The program that counts a problem's work."""
    return emulated_directory / COUNT
