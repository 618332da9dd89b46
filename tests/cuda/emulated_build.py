"""Building the CUDA kernels from this checkout: for the emulator, or with nvcc."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
from native_build import cmake_build

PROGRAM = "effc_cuda_emulated"
LINEAR = "effc_cuda_emulated_linear"
INTERFACE = "libeffc_cuda_c_emulated.so"
SELFTEST = "effc_cuda_emulator_selftest"
COUNT = "effc_cuda_count"


def emulated_build(name: str, *options: str) -> Path:
    """The directory with the programs that run kernels under the emulator, built with these CMake options."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator's fibers are written for x86-64")
    return cmake_build(name, "-DEFFC_CUDA_EMULATOR=ON", *options, target="effc_cuda_tests")
