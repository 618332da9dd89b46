"""Where effc's native kernels are and which of them this machine would run.

The kernels live in one shared library of ONNX Runtime custom operators. A session that registers it runs
``effc::SparseAttention``, ``effc::LinearAttention``, ``effc::BlockTopKAttention`` and ``effc::CachedAttention``
natively; without it the same model runs through the operators' function bodies::

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
from dataclasses import dataclass
from pathlib import Path

from effc.errors import MissingDependencyError, UsageError

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
_DIRECTORY = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class _Library:
    """Effc's operators for one execution provider.

    Attributes:
        file_name: in the package.
        variable: of the environment, which names another file.
        missing, remedy: what is said where there is none.
    """

    file_name: str
    variable: str
    missing: str
    remedy: str

    def path(self) -> Path | None:
        if _disabled():
            return None
        override = os.environ.get(self.variable)
        path = Path(override) if override else _DIRECTORY / self.file_name
        return path.resolve() if path.is_file() else None


_LIBRARIES = {
    CPU_PROVIDER: _Library(
        "libeffc_cpu.dylib" if sys.platform == "darwin" else "libeffc_cpu.so",
        "EFFC_NATIVE_LIBRARY",
        "effc's native kernels are not installed.",
        "Reinstall effc where g++ or clang and CMake are available: pip install --force-reinstall effc.",
    ),
    CUDA_PROVIDER: _Library(
        "libeffc_cuda.so",
        "EFFC_CUDA_LIBRARY",
        "effc's operators for ONNX Runtime's CUDA provider were not built.",
        "Where nvcc is: cmake -S . -B build -DEFFC_CUDA=ON && cmake --build build --target effc_cuda, and name the "
        "file in EFFC_CUDA_LIBRARY.",
    ),
}


def library_path(provider: str = CPU_PROVIDER) -> Path | None:
    """The native library's file, or None if it is disabled or was not built."""
    return _LIBRARIES[provider].path()


def native_library(provider: str = CPU_PROVIDER) -> str:
    """The native library's file, for ``SessionOptions.register_custom_ops_library``.

    Args:
        provider: the execution provider that the session has: the CPU's or ``CUDAExecutionProvider``. A session takes
            one of the two libraries.

    Raises:
        MissingDependencyError: if there is none; the message says how to get one.
        UsageError: if effc has no kernels for the provider.
    """
    library = _LIBRARIES.get(provider)
    if library is None:
        raise UsageError(f"effc has no kernels for '{provider}'.", f"Name {' or '.join(_LIBRARIES)}, or do without.")
    path = library.path()
    if path is not None:
        return str(path)
    if _disabled():
        raise MissingDependencyError(
            "effc's native kernels are disabled by EFFC_NATIVE=0.", "Unset that variable to use them."
        )
    override = os.environ.get(library.variable)
    if override:
        raise MissingDependencyError(
            f"{library.variable} names '{override}', which is not a file.", "Correct it or unset it."
        )
    raise MissingDependencyError(library.missing, library.remedy)


def _disabled() -> bool:
    return os.environ.get("EFFC_NATIVE") == "0"


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
