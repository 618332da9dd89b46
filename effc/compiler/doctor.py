"""What this machine can do for effc: ``effc doctor``.

Every package is imported in a process of its own, so that one that is broken (or crashes) is a finding, not the end
of the report. Nothing is guessed: a version, a GPU or an execution provider is listed only if it answered.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effc import __version__
from effc.compiler.cache import cache_directory
from effc.compiler.machine import Machine, describe_machine
from effc.errors import MissingDependencyError
from effc.plugins import native, tensorrt_library

Status = Literal["ok", "missing", "broken", "n/a"]

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

_SECONDS_PER_PROBE = 120
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")


class Check(BaseModel):
    """One thing that effc uses.

    Attributes:
        group: heading it is shown under.
        status: ``ok``; ``missing``; ``broken``: there, but not usable; ``n/a``: of no use on this machine.
        version: what was found, None if nothing or if it does not tell.
        tested: release line that effc is tested with, where there is one.
        purpose: what effc uses it for.
        detail: what was found out, in particular why it is broken or not applicable.
        command: what installs or repairs it.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    group: str
    status: Status
    version: str | None = None
    tested: str | None = None
    purpose: str
    detail: str | None = None
    command: str | None = None

    @property
    def untested_version(self) -> bool:
        """True if another release line than the tested one is installed."""
        if self.version is None or self.tested is None:
            return False
        return self.version.split("+")[0].split(".")[:2] != self.tested.split(".")[:2]


class DoctorReport(BaseModel):
    """Everything ``effc doctor`` found."""

    model_config = ConfigDict(extra="forbid")

    effc_version: str
    machine: Machine
    checks: list[Check]

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)


@dataclass(frozen=True)
class _Package:
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

_PACKAGES = (
    _Package("onnxruntime", "onnxruntime", "Run", "runs artifacts", _BASE,
             "found['providers'] = m.get_available_providers()"),
    _Package("numpy", "numpy", "Run", "inputs and outputs", _BASE),
    _Package("pydantic", "pydantic", "Run", "reads recipes and effc.json", _BASE),
    _Package("torch", "torch", "Compile", "source models and export", _BASE,
             "found['cuda'] = m.version.cuda\n"
             "found['devices'] = [m.cuda.get_device_name(i) for i in range(m.cuda.device_count())]"),
    _Package("transformers", "transformers", "Compile", "source models and export", _BASE),
    _Package("onnx", "onnx", "Compile", "graphs", _BASE),
    _Package("onnx-ir", "onnx_ir", "Compile", "graph passes", _BASE),
    _Package("onnxscript", "onnxscript", "Compile", "export", _BASE),
    _Package("tensorrt", "tensorrt", "TensorRT", "builds and runs engines", _TENSORRT, needs_gpu=True),
    _Package("tensorrt-rtx", "tensorrt_rtx", "TensorRT", "builds engines, on machines without a GPU too", _TENSORRT),
    _Package("tensorrt-lean", "tensorrt_lean", "TensorRT", "runs engines with few megabytes", _TENSORRT,
             needs_gpu=True),
    _Package("torch-tensorrt", "torch_tensorrt", "TensorRT", "runs engines inside PyTorch", _TENSORRT,
             needs_gpu=True),
    _Package("tritonclient", "tritonclient", "Serve", "talks to a Triton server", _SERVE),
)  # fmt: skip


def diagnose() -> DoctorReport:
    """Look at this machine and this Python environment. Takes as long as importing torch does, a few seconds."""
    gpu = _gpu()
    has_gpu = gpu.status == "ok"
    probes: list[Callable[[], Check]] = [
        _native_library,
        _tensorrt_plugin,
        *(partial(_package, package, has_gpu) for package in _PACKAGES),
        partial(_onnxruntime_gpu, has_gpu),
        _triton_server,
    ]
    with ThreadPoolExecutor(max_workers=4) as pool:
        checks = list(pool.map(lambda probe: probe(), probes))
    order = ("Run", "Compile", "GPU", "TensorRT", "Serve")
    checks = sorted([gpu, *checks], key=lambda check: order.index(check.group))
    return DoctorReport(effc_version=__version__, machine=describe_machine(), checks=checks)


def render(report: DoctorReport, console: Console) -> None:
    """Print a report as a table per group, followed by the commands that install what is missing."""
    machine = report.machine
    console.print(f"[bold]effc {report.effc_version}[/] · Python {machine.python} · {machine.system}", highlight=False)
    quota = "" if machine.cpu_quota is None else f", cgroup limit {machine.cpu_quota:g}"
    memory = "unknown memory" if machine.memory_gib is None else f"{machine.memory_gib:g} GiB"
    console.print(
        f"{machine.cpu} · {machine.usable_cores} usable cores of {machine.physical_cores or '?'} "
        f"({machine.affinity_cpus} of {machine.logical_cpus} threads{quota}) · {memory}",
        highlight=False,
    )
    console.print(f"vector units: {', '.join(machine.isa) or 'unknown'}\n", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = None
    for check in report.checks:
        if check.group != group:
            if group is not None:
                table.add_row()
            table.add_row(Text(check.group, style="bold"))
            group = check.group
        table.add_row(
            Text(check.status, style={"ok": "green", "missing": "yellow", "broken": "red", "n/a": "dim"}[check.status]),
            check.name,
            Text(check.version or "", style="yellow" if check.untested_version else ""),
            Text(_remark(check)),
        )
    console.print(table)
    commands: dict[str, list[str]] = {}
    for check in report.checks:
        if check.command and check.status in ("missing", "broken"):
            commands.setdefault(check.command, []).append(check.name)
    if commands:
        console.print("\n[bold]To install or repair[/]")
        for command, names in commands.items():
            console.print(Text.assemble("  ", (command, "cyan"), f"   # {', '.join(names)}"), soft_wrap=True)


def _remark(check: Check) -> str:
    parts = [check.purpose]
    if check.untested_version:
        parts.append(f"tested with {check.tested}")
    if check.detail:
        parts.append(check.detail)
    return "; ".join(parts)


def _package(package: _Package, has_gpu: bool) -> Check:
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
    found, error = _import(package)
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


def _import(package: _Package) -> tuple[dict[str, Any] | None, str | None]:
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
    output, error = _run([sys.executable, "-c", code])
    return (json.loads(output), None) if output else (None, error or "it gave no answer")


def _run(command: Sequence[str]) -> tuple[str | None, str | None]:
    """Standard output of a command, or one line on why there is none."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_PER_PROBE,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_SECONDS_PER_PROBE} s"
    except OSError as error:
        return None, str(error)
    if result.returncode == 0:
        return result.stdout.strip(), None
    lines = (result.stderr or result.stdout).strip().splitlines()
    return None, lines[-1].strip() if lines else f"ended with status {result.returncode}"


def _native_library() -> Check:
    check = Check(
        name="native kernels",
        group="Run",
        status="ok",
        purpose="effc's fast attention for ONNX Runtime",
        command="pip install --force-reinstall --no-deps effc",
    )
    slower = "artifacts run on standard operators, slower"
    try:
        library = native.native_library()
    except MissingDependencyError as error:
        check.status, check.detail = "missing", f"{error} Until then {slower}"
        if "EFFC_NATIVE" in error.problem:
            check.command = error.remedy
        return check
    code = (
        "import sys, onnxruntime\n"
        "from effc.plugins.native import isa\n"
        "onnxruntime.SessionOptions().register_custom_ops_library(sys.argv[1])\n"
        "print(isa())"
    )
    kernels, reason = _run([sys.executable, "-c", code, library])
    if kernels:
        check.detail = f"{kernels} kernels, {library}"
    else:
        check.status, check.detail = "broken", f"{library}: {reason or 'it gave no answer'}; {slower}"
    return check


def _tensorrt_plugin() -> Check:
    check = Check(
        name="TensorRT plugin",
        group="TensorRT",
        status="ok",
        purpose="sparse attention inside engines",
        command="install the CUDA toolkit (nvcc), then: pip install --no-deps kernel-lens",
    )
    try:
        library = tensorrt_library.existing_library()
        compiler = None if library is not None else tensorrt_library.find_compiler()
    except MissingDependencyError as error:
        check.status, check.detail = "missing", f"{error.problem} Engines are built without it: --no-plugin"
        if "EFFC_TENSORRT_LIBRARY" in error.problem:
            check.command = error.remedy
        return check
    check.detail = str(library) if compiler is None else f"compiled on first use by {compiler.nvcc}"
    check.command = None
    return check


def _gpu() -> Check:
    check = Check(name="NVIDIA GPU", group="GPU", status="ok", purpose="TensorRT engines, CUDA")
    tool = shutil.which("nvidia-smi")
    present = _nvidia_devices()
    if tool is None and not present:
        check.status, check.detail = "n/a", "there is none in this machine"
        return check
    check.command = "install NVIDIA's driver: https://docs.nvidia.com/datacenter/tesla/driver-installation-guide"
    if tool is None:
        check.status, check.detail = "missing", f"{present} NVIDIA device(s) found, but no driver (nvidia-smi)"
        return check
    query = "name,driver_version,memory.total,compute_cap"
    output, error = _run([tool, f"--query-gpu={query}", "--format=csv,noheader"])
    rows = [[field.strip() for field in line.split(",")] for line in (output or "").splitlines()]
    rows = [row for row in rows if len(row) == query.count(",") + 1]
    if not rows:
        check.status = "broken" if present else "n/a"
        check.detail = f"nvidia-smi finds none: {error or output or 'no output'}"
        return check
    check.version, check.command = f"driver {rows[0][1]}", None
    check.detail = ", ".join(f"{name} ({memory}, compute capability {capable})" for name, _, memory, capable in rows)
    return check


def _nvidia_devices() -> int:
    """NVIDIA display and compute devices on the PCI bus, with or without a driver."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASSES)
    return count


def _onnxruntime_gpu(has_gpu: bool) -> Check:
    check = Check(
        name="onnxruntime-gpu",
        group="GPU",
        status="ok",
        tested=TESTED["onnxruntime-gpu"],
        purpose="runs artifacts on a GPU",
        command="pip install 'effc[gpu]'",
    )
    versions = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    check.version = versions.get("onnxruntime-gpu")
    if check.version is None:
        check.status = "missing" if has_gpu else "n/a"
        check.detail = None if has_gpu else "needs an NVIDIA GPU"
        return check
    found, error = _import(
        _Package("onnxruntime", "onnxruntime", "", "", "", "found['providers'] = m.get_available_providers()")
    )
    if found is None:
        check.status, check.detail = "broken", error
    elif "CUDAExecutionProvider" not in found["providers"]:
        check.status, check.detail = "broken", "it offers no CUDAExecutionProvider"
        if "onnxruntime" in versions:
            # Both packages write the same files, so whichever was installed last is the one there is.
            check.detail += ", because onnxruntime is installed over it"
            check.command = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'effc[gpu]'"
    else:
        check.detail = ", ".join(found["providers"])
        if not has_gpu:
            check.detail += "; there is no GPU to run on"
    return check


def _triton_server() -> Check:
    check = Check(
        name="tritonserver",
        group="Serve",
        status="ok",
        purpose="serves artifacts",
        command="effc serve --install-server",
    )
    places = [Path("/opt/tritonserver/bin/tritonserver")]
    # The packaged server, which `effc serve --install-server` puts into an environment of its own.
    places += (cache_directory() / "servers").glob("*/venv/lib/*/site-packages/pytriton/tritonserver/bin/tritonserver")
    on_path = shutil.which("tritonserver")
    binary = Path(on_path) if on_path else next((place for place in places if place.exists()), None)
    if binary is None:
        check.status = "missing"
        return check
    check.detail = str(binary)
    version_file = binary.parent.parent / "TRITON_VERSION"
    if version_file.exists():
        match = re.match(r"[\d.]+", version_file.read_text(encoding="utf-8"))
        check.version = match.group(0) if match else None
    return check
