"""Whether a session gets effc's native kernels, and which."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from effc.compiler.session import first_line
from effc.errors import MissingDependencyError
from effc.plugins import native as native_kernels


def library_for(providers: Sequence[Any]) -> Path | None:
    """The kernels for a session with these providers: it takes those for the CPU or those for CUDA.

    With the CUDA provider and no kernels for it, attention runs there through its function bodies: kernels for the CPU
    would take it away from the GPU.
    """
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if native_kernels.CUDA_PROVIDER not in names:
        return loadable_native_library()
    library = native_kernels.library_path(native_kernels.CUDA_PROVIDER)
    if library is None and os.environ.get("EFFC_NATIVE") != "0":
        try:
            native_kernels.native_library(native_kernels.CUDA_PROVIDER)
        except MissingDependencyError as missing:
            warnings.warn(f"{missing} Standard operators run instead.", RuntimeWarning, stacklevel=3)
    return None if library is None else _loadable(library)


def loadable_native_library() -> Path | None:
    """effc's native kernels, or None, with a warning where they are there but cannot be loaded.

    Raises:
        MissingDependencyError: if ``EFFC_NATIVE_LIBRARY`` names no file.
    """
    library = native_kernels.library_path()
    if library is None:
        if os.environ.get("EFFC_NATIVE") != "0" and os.environ.get("EFFC_NATIVE_LIBRARY"):
            native_kernels.native_library()  # says what is wrong with that variable
        return None
    return _loadable(library)


def _loadable(library: Path) -> Path | None:
    try:
        # Tried on options of its own, because a failure would leave the caller's half registered.
        onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:
        warnings.warn(
            f"effc's native kernels ({library}) cannot be loaded: {first_line(error)}. Slower standard operators run "
            "instead; `effc doctor` says more.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return library
