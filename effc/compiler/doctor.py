"""What this machine can do for effc: ``effc doctor``.

Every package is imported in a process of its own, so that one that is broken (or crashes) is a finding, not the end
of the report. Nothing is guessed: a version, a GPU or an execution provider is listed only if it answered.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from effc import __version__
from effc.compiler.doctor_machine import (
    check_gpu,
    check_native_library,
    check_onnxruntime_gpu,
    check_tensorrt_plugin,
    check_triton_server,
)
from effc.compiler.doctor_packages import PACKAGES, check_package
from effc.compiler.doctor_report import Check, DoctorReport
from effc.compiler.machine import describe_machine


def diagnose() -> DoctorReport:
    """Look at this machine and this Python environment. Takes as long as importing torch does, a few seconds."""
    gpu = check_gpu()
    has_gpu = gpu.status == "ok"
    probes: list[Callable[[], Check]] = [
        check_native_library,
        check_tensorrt_plugin,
        *(partial(check_package, package, has_gpu) for package in PACKAGES),
        partial(check_onnxruntime_gpu, has_gpu),
        check_triton_server,
    ]
    with ThreadPoolExecutor(max_workers=4) as pool:
        checks = list(pool.map(lambda probe: probe(), probes))
    order = ("Run", "Compile", "GPU", "TensorRT", "Serve")
    checks = sorted([gpu, *checks], key=lambda check: order.index(check.group))
    return DoctorReport(effc_version=__version__, machine=describe_machine(), checks=checks)
