"""Python packages as ``effc doctor`` sees them, each imported in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from effc.compiler.doctor_report import Check

TESTED = {
    "torch": "2.13",
    "transformers": "5.23",
    "numpy": "2.4",
    "onnx": "1.23",
    "onnx-ir": "1.1",
    "onnxscript": "0.7",
    "onnxruntime": "1.31",
    "onnxruntime-gpu": "1.31",
    "pydantic": "2.14",
    "tensorrt-rtx": "1.7",
}
"""Release lines that effc's tests run with. Others may well work; the report says that they are others."""

SECONDS_PER_PROBE = 120


@dataclass(frozen=True)
class Package:
    """A Python package to import.

    Attributes:
        name: of the distribution.
        probe: statements that may refine ``found``, a dict that becomes the answer, with the module as ``m``.
        needs_gpu: of no use without an NVIDIA GPU.
    """

    name: str
    module: str
    group: str
    purpose: str
    command: str
    probe: str = ""
    needs_gpu: bool = False


_BASE, _SERVE, _TENSORRT = "pip install --upgrade effc", "pip install 'effc[serve]'", "pip install 'effc[tensorrt]'"

PACKAGES = (
    Package("onnxruntime", "onnxruntime", "Run", "runs artifacts", _BASE,
             "found['providers'] = m.get_available_providers()"),
    Package("numpy", "numpy", "Run", "inputs and outputs", _BASE),
    Package("pydantic", "pydantic", "Run", "reads recipes and effc.json", _BASE),
    Package("torch", "torch", "Compile", "source models and export", _BASE,
             "found['cuda'] = m.version.cuda\n"
             "found['devices'] = [m.cuda.get_device_name(i) for i in range(m.cuda.device_count())]"),
    Package("transformers", "transformers", "Compile", "source models and export", _BASE),
    Package("onnx", "onnx", "Compile", "graphs", _BASE),
    Package("onnx-ir", "onnx_ir", "Compile", "graph passes", _BASE),
    Package("onnxscript", "onnxscript", "Compile", "export", _BASE),
    Package("tensorrt", "tensorrt", "TensorRT", "builds and runs engines", _TENSORRT, needs_gpu=True),
    Package("tensorrt-rtx", "tensorrt_rtx", "TensorRT", "builds engines, on machines without a GPU too", _TENSORRT),
    Package("tensorrt-lean", "tensorrt_lean", "TensorRT", "runs engines with few megabytes", _TENSORRT,
             needs_gpu=True),
    Package("torch-tensorrt", "torch_tensorrt", "TensorRT", "runs engines inside PyTorch", _TENSORRT,
             needs_gpu=True),
    Package("tritonclient", "tritonclient", "Serve", "talks to a Triton server", _SERVE),
)  # fmt: skip


def check_package(package: Package, has_gpu: bool) -> Check:
    """Whether a package is there and can be imported."""
    check = Check(
        name=package.name,
        group=package.group,
        status="ok",
        tested=TESTED.get(package.name),
        purpose=package.purpose,
        command=package.command,
    )
    if not _installed(package.module):
        check.status = "missing" if has_gpu or not package.needs_gpu else "n/a"
        check.detail = "needs an NVIDIA GPU" if check.status == "n/a" else None
        return check
    found, error = import_package(package)
    if found is None:
        # Some packages refuse to be imported where there is no GPU: that is no fault to repair.
        check.status = "broken" if has_gpu or not package.needs_gpu else "n/a"
        check.detail = error if check.status == "broken" else f"installed, but needs an NVIDIA GPU: {error}"
        return check
    check.version = found["version"]
    if "providers" in found:
        check.detail = ", ".join(found["providers"])
    if "devices" in found:
        check.detail = f"CUDA {found['cuda']}" if found["cuda"] else "CPU build"
        check.detail += f", sees {', '.join(found['devices'])}" if found["devices"] else ", sees no GPU"
    if package.needs_gpu and not has_gpu:
        check.detail = "installed, but needs an NVIDIA GPU to run"
    return check


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a module of that name is loaded and has no spec, or its parent is broken
        return False


def import_package(package: Package) -> tuple[dict[str, Any] | None, str | None]:
    """Import in a new process; the answer of its probe, or what went wrong."""
    code = (
        "import importlib, importlib.metadata, json, os, sys\n"
        # Libraries print what they like while they load; only the last line is the answer.
        "answers = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1)\n"
        f"m = importlib.import_module({package.module!r})\n"
        "version = getattr(m, '__version__', None)\n"
        "if not isinstance(version, str):\n"
        "    try:\n"
        f"        version = importlib.metadata.version({package.name!r})\n"
        "    except importlib.metadata.PackageNotFoundError:\n"
        "        version = None\n"
        "found = {'version': version}\n"
        f"{package.probe}\n"
        "answers.write(json.dumps(found)); answers.flush(); os._exit(0)\n"
    )
    output, error = run([sys.executable, "-c", code])
    return (json.loads(output), None) if output else (None, error or "it gave no answer")


def run(command: Sequence[str]) -> tuple[str | None, str | None]:
    """Standard output of a command, or one line on why there is none."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_PER_PROBE,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {SECONDS_PER_PROBE} s"
    except OSError as error:
        return None, str(error)
    if result.returncode == 0:
        return result.stdout.strip(), None
    lines = (result.stderr or result.stdout).strip().splitlines()
    return None, lines[-1].strip() if lines else f"ended with status {result.returncode}"
