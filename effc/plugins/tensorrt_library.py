"""Where effc's TensorRT plugin is: a library that was built with effc, or one that nvcc builds on first use.

The library is one file for TensorRT 10, 11 and TensorRT-RTX: it links none of them, and declarations of an interface
that all of them share come from the user's own headers or from a package that carries them.

Environment variables: ``EFFC_TENSORRT_LIBRARY`` names a library to use, ``EFFC_TENSORRT_INCLUDE`` the folder of
``NvInfer.h``, ``NVCC`` the compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from effc.errors import MissingDependencyError, PassFailedError

LIBRARY_NAME = "libeffc_tensorrt.so"
LEAST_CAPABILITY = 80
"""The oldest architecture that the kernels are written for."""
_HEADERS_PACKAGE = "kernel-lens"
_HEADERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")
_FOLDERS = ("pattern", "cuda", "tensorrt")
# Lets Python call the kernels, for the benchmark.
_NO_PART = ("c_interface.cpp",)
_FLAGS = ("-std=c++17", "-O3", "--cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden")


@dataclass(frozen=True)
class PluginCompiler:
    """What a library is compiled with: nvcc, the folder of TensorRT's headers and that of effc's sources."""

    nvcc: str
    include: Path
    sources: Path

    def key(self, capabilities: Sequence[int]) -> dict[str, str]:
        """What decides the library that :meth:`compile` makes."""
        content = hashlib.sha256()
        for folder in _FOLDERS:
            for file in sorted((self.sources / folder).iterdir()):
                if file.suffix in (".cpp", ".cu", ".hpp", ".cuh"):
                    content.update(file.name.encode() + file.read_bytes())
        version = self.include / "NvInferVersion.h"
        if version.is_file():
            content.update(version.read_bytes())
        return {
            "sources": content.hexdigest(),
            "compiler": f"{self.nvcc} {_nvcc_version(self.nvcc)}",
            "flags": f"{_FLAGS} {sorted(capabilities)}",
        }

    def compile(self, capabilities: Sequence[int], library: Path) -> None:
        """Write the library with kernels for some architectures; takes minutes.

        Raises:
            PassFailedError: with nvcc's own words.
        """
        targets = []
        for capability in (ordered := sorted(capabilities)):
            code = f"sm_{capability}"
            # The newest one's portable code serves GPUs that come later.
            code = f"[{code},compute_{capability}]" if capability == ordered[-1] else code
            targets += ["-gencode", f"arch=compute_{capability},code={code}"]
        common = [self.nvcc, *_FLAGS, *targets]
        includes = ["-I", str(self.sources), "-isystem", str(self.include)]
        with tempfile.TemporaryDirectory() as folder:
            objects = {file: Path(folder) / f"{file.parent.name}-{file.name}.o" for file in _files(self.sources)}
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                commands = [[*common, *includes, "-c", str(file), "-o", str(made)] for file, made in objects.items()]
                list(pool.map(_run, commands))
            _run([*common, "-shared", *map(str, objects.values()), "-o", str(library)])


def existing_library() -> Path | None:
    """The library that was built beforehand, or None.

    Raises:
        MissingDependencyError: if ``EFFC_TENSORRT_LIBRARY`` names no file.
    """
    given = os.environ.get("EFFC_TENSORRT_LIBRARY")
    if not given:
        shipped = Path(__file__).parent / "lib" / LIBRARY_NAME
        return shipped.resolve() if shipped.is_file() else None
    if not Path(given).is_file():
        raise MissingDependencyError(
            f"EFFC_TENSORRT_LIBRARY names '{given}', which is not a file.", "Correct it or unset it."
        )
    return Path(given).resolve()


def find_compiler() -> PluginCompiler:
    """All that a build needs.

    Raises:
        MissingDependencyError: if something is missing; says what to install.
    """
    nvcc, include, sources = find_nvcc(), find_headers(), find_sources()
    without = "or compile without the plugin: --no-plugin."
    if nvcc is None:
        raise MissingDependencyError(
            "effc's TensorRT plugin is compiled on first use, and there is no CUDA compiler (nvcc).",
            f"Install the CUDA toolkit 12.8 or newer and put nvcc into PATH (or name it in NVCC), {without}",
        )
    if include is None:
        raise MissingDependencyError(
            "effc's TensorRT plugin is compiled on first use, and there is no NvInfer.h.",
            "Name the folder of TensorRT's headers in EFFC_TENSORRT_INCLUDE, or install a package that carries them: "
            f"pip install --no-deps {_HEADERS_PACKAGE}, {without}",
        )
    if sources is None:
        raise MissingDependencyError(
            "This installation of effc lacks the sources of its TensorRT plugin.",
            f"Install effc from a wheel or a checkout, {without}",
        )
    return PluginCompiler(nvcc, include, sources)


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    named = os.environ.get("NVCC")
    return shutil.which(named or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_headers() -> Path | None:
    """The folder of ``NvInfer.h``, or None."""
    named = os.environ.get("EFFC_TENSORRT_INCLUDE")
    places = [Path(named)] if named else [Path(place) for place in _HEADERS]
    spec = importlib.util.find_spec(_HEADERS_PACKAGE.replace("-", "_"))
    if spec is not None and not named:
        places += [Path(place) / "include" / "tensorrt" for place in spec.submodule_search_locations or ()]
    return next((place for place in places if (place / "NvInfer.h").is_file()), None)


def find_sources() -> Path | None:
    """The folder of the kernels' and the plugin's sources: beside the package in a checkout, inside it elsewhere."""
    here = Path(__file__).resolve().parent
    for place in (here.parents[1] / "cpp_plugins", here / "sources"):
        if all((place / folder).is_dir() for folder in _FOLDERS):
            return place
    return None


def _files(sources: Path) -> list[Path]:
    """What is compiled; folders below these hold tests."""
    found = (file for folder in _FOLDERS for file in (sources / folder).iterdir())
    return sorted(file for file in found if file.suffix in (".cpp", ".cu") and file.name not in _NO_PART)


def _nvcc_version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).splitlines()
        reason = next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), "")
        raise PassFailedError(
            f"nvcc could not compile effc's TensorRT plugin: {reason or f'exit status {done.returncode}'}.",
            "CUDA 12.8 or newer is needed for sm_120; --no-plugin does without.",
        )
