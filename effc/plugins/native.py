"""Where effc's native kernels are and which of them this machine would run.

The kernels live in one shared library of ONNX Runtime custom operators. A session that registers it runs
``effc::SparseAttention`` and ``effc::LinearAttention`` natively; without it the same model runs through the operators'
function bodies::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(effc.native_library())

Environment variables: ``EFFC_NATIVE=0`` pretends that there is no library, ``EFFC_NATIVE_LIBRARY`` names another file,
``EFFC_ISA`` (``avx512``, ``avx2``, ``portable``) forces one instruction set. ``EFFC_PRECISION=bf16`` allows products of
bfloat16 numbers in sparse attention where the CPU has them, and ``EFFC_AMX=0`` leaves AMX out of that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from effc.errors import MissingDependencyError

_FILE_NAME = "libeffc_cpu.dylib" if sys.platform == "darwin" else "libeffc_cpu.so"


def library_path() -> Path | None:
    """The native library's file, or None if it is disabled or was not built."""
    if os.environ.get("EFFC_NATIVE") == "0":
        return None
    override = os.environ.get("EFFC_NATIVE_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "lib" / _FILE_NAME
    return path.resolve() if path.is_file() else None


def native_library() -> str:
    """The native library's file, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        MissingDependencyError: if there is none; the message says how to get one.
    """
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
