"""Where effc's native kernels are and which of them this machine would run.

The kernels live in one shared library of ONNX Runtime custom operators. A session that registers it runs
``effc::SparseAttention``, ``effc::LinearAttention`` and ``effc::BlockTopKAttention`` natively; without it the same
model runs through the operators' function bodies::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(effc.native_library())

A session with ONNX Runtime's CUDA provider registers another library in its place, which holds the same operators for
that provider and is built where nvcc is::

    options.register_custom_ops_library(effc.native_library("CUDAExecutionProvider"))

Environment variables: ``EFFC_NATIVE=0`` pretends that there is no library, ``EFFC_NATIVE_LIBRARY`` names another file,
``EFFC_ISA`` (``avx512``, ``avx2``, ``portable``) forces one instruction set. ``EFFC_PRECISION=bf16`` allows products of
bfloat16 numbers in sparse attention where the CPU has them, and ``EFFC_AMX=0`` leaves AMX out of that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from effc.errors import MissingDependencyError, UsageError

_FILE_NAME = "libeffc_cpu.dylib" if sys.platform == "darwin" else "libeffc_cpu.so"

CUDA_PROVIDER = "CUDAExecutionProvider"
_CUDA_FILE_NAME = "libeffc_cuda.so"


def library_path() -> Path | None:
    """The native library's file, or None if it is disabled or was not built."""
    if os.environ.get("EFFC_NATIVE") == "0":
        return None
    override = os.environ.get("EFFC_NATIVE_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "lib" / _FILE_NAME
    return path.resolve() if path.is_file() else None


def cuda_library_path() -> Path | None:
    """The file of the operators for ONNX Runtime's CUDA provider, or None if it is disabled or was not built."""
    if os.environ.get("EFFC_NATIVE") == "0":
        return None
    override = os.environ.get("EFFC_CUDA_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "lib" / _CUDA_FILE_NAME
    return path.resolve() if path.is_file() else None


def native_library(provider: str = "CPUExecutionProvider") -> str:
    """The native library's file, for ``SessionOptions.register_custom_ops_library``.

    Args:
        provider: the execution provider that the session has: the CPU's or ``CUDAExecutionProvider``. A session takes
            one of the two libraries.

    Raises:
        MissingDependencyError: if there is none; the message says how to get one.
        UsageError: if effc has no kernels for the provider.
    """
    if provider == CUDA_PROVIDER:
        return _cuda_library()
    if provider != "CPUExecutionProvider":
        raise UsageError(
            f"effc has no kernels for '{provider}'.", f"Name CPUExecutionProvider or {CUDA_PROVIDER}, or do without."
        )
    path = library_path()
    if path is not None:
        return str(path)
    if os.environ.get("EFFC_NATIVE") == "0":
        raise MissingDependencyError(
            "effc's native kernels are disabled by EFFC_NATIVE=0.", "Unset that variable to use them."
        )
    override = os.environ.get("EFFC_NATIVE_LIBRARY")
    if override:
        raise MissingDependencyError(
            f"EFFC_NATIVE_LIBRARY names '{override}', which is not a file.", "Correct it or unset it."
        )
    raise MissingDependencyError(
        "effc's native kernels are not installed.",
        "Reinstall effc where g++ or clang and CMake are available: pip install --force-reinstall effc.",
    )


def _cuda_library() -> str:
    path = cuda_library_path()
    if path is not None:
        return str(path)
    override = os.environ.get("EFFC_CUDA_LIBRARY")
    if os.environ.get("EFFC_NATIVE") == "0":
        raise MissingDependencyError(
            "effc's native kernels are disabled by EFFC_NATIVE=0.", "Unset that variable to use them."
        )
    if override:
        raise MissingDependencyError(
            f"EFFC_CUDA_LIBRARY names '{override}', which is not a file.", "Correct it or unset it."
        )
    raise MissingDependencyError(
        "effc's operators for ONNX Runtime's CUDA provider were not built.",
        "Where nvcc is: cmake -S . -B build -DEFFC_CUDA=ON && cmake --build build --target effc_cuda, and name the "
        "file in EFFC_CUDA_LIBRARY.",
    )


def isa() -> str:
    """The instruction set whose kernels would run here: ``avx512``, ``avx2`` or ``portable``.

    Raises:
        MissingDependencyError: if there is no native library, or ``EFFC_ISA`` names an instruction set that cannot run.
    """
    library = ctypes.CDLL(native_library())
    library.effc_isa.restype = ctypes.c_char_p
    name: str = library.effc_isa().decode()
    if not name:
        raise MissingDependencyError(
            f"EFFC_ISA asks for '{os.environ.get('EFFC_ISA')}', which is unknown or beyond this CPU.",
            "Set it to avx512, avx2 or portable, or unset it for the fastest that runs here.",
        )
    return name
