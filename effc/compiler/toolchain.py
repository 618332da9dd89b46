"""Versions of everything whose change may change a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import effc

PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def toolchain() -> dict[str, str]:
    """Package name to version; python and effc included."""
    versions = {"effc": effc.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
