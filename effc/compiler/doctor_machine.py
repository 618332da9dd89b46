"""What is no Python package, as ``effc doctor`` sees it: GPU, native libraries, server."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from effc.compiler.cache import cache_directory
from effc.compiler.doctor_packages import TESTED, Package, import_package, run
from effc.compiler.doctor_report import Check
from effc.errors import MissingDependencyError
from effc.plugins import native, tensorrt_library

_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")


def check_native_library() -> Check:
    """Whether the kernels for ONNX Runtime load, and what they use of the CPU."""
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
    kernels, reason = run([sys.executable, "-c", code, library])
    if kernels:
        check.detail = f"{kernels} kernels, {library}"
    else:
        check.status, check.detail = "broken", f"{library}: {reason or 'it gave no answer'}; {slower}"
    return check


def check_tensorrt_plugin() -> Check:
    """Whether engines can have effc's plugin."""
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


def check_gpu() -> Check:
    """Which NVIDIA GPUs answer."""
    check = Check(name="NVIDIA GPU", group="GPU", status="ok", purpose="TensorRT engines, CUDA")
    tool = shutil.which("nvidia-smi")
    present = nvidia_devices()
    if tool is None and not present:
        check.status, check.detail = "n/a", "there is none in this machine"
        return check
    check.command = "install NVIDIA's driver: https://docs.nvidia.com/datacenter/tesla/driver-installation-guide"
    if tool is None:
        check.status, check.detail = "missing", f"{present} NVIDIA device(s) found, but no driver (nvidia-smi)"
        return check
    query = "name,driver_version,memory.total,compute_cap"
    output, error = run([tool, f"--query-gpu={query}", "--format=csv,noheader"])
    rows = [[field.strip() for field in line.split(",")] for line in (output or "").splitlines()]
    rows = [row for row in rows if len(row) == query.count(",") + 1]
    if not rows:
        check.status = "broken" if present else "n/a"
        check.detail = f"nvidia-smi finds none: {error or output or 'no output'}"
        return check
    check.version, check.command = f"driver {rows[0][1]}", None
    check.detail = ", ".join(f"{name} ({memory}, compute capability {capable})" for name, _, memory, capable in rows)
    return check


def nvidia_devices() -> int:
    """NVIDIA display and compute devices on the PCI bus, with or without a driver."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASSES)
    return count


def check_onnxruntime_gpu(has_gpu: bool) -> Check:
    """Whether artifacts can run on a GPU."""
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
    found, error = import_package(
        Package("onnxruntime", "onnxruntime", "", "", "", "found['providers'] = m.get_available_providers()")
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


def check_triton_server() -> Check:
    """Whether there is a Triton server, and of which version."""
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
