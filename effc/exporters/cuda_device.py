"""Whether this machine has a GPU, and which, asked of the driver itself; nothing is imported for it."""

from __future__ import annotations

import ctypes
import sys

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def device_capability(index: int = 0) -> int | None:
    """Compute capability of a GPU as one number (89 for 8.9), or None where there is none or no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device):
        return None
    return 10 * major.value + minor.value
