"""Facts on the machine at hand, and how much of it this process may use.

A container sees all cores of its host, so CPU affinity and cgroup limits are read too: more threads than that only
wait for each other. Needs nothing but the standard library, since :func:`effc.load` and models inside a Triton server
ask it for the number of threads.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Flag as /proc/cpuinfo spells it -> name shown. Those that decide which int8, bf16 and fp32 kernels can run.
ISA_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}

_EXACT_INT8 = {"avx_vnni", "avx512_vnni", "amx_int8"}


@dataclass(frozen=True)
class Machine:
    """What a timing was measured on.

    Attributes:
        cpu: model name, as the system gives it.
        isa: vector extensions that kernels choose by; empty where the system does not tell.
        physical_cores: cores of the machine, hyper-threads not counted; None where unknown.
        logical_cpus: hardware threads of the machine.
        affinity_cpus: hardware threads that this process may run on.
        cpu_quota: CPUs' worth of time that the cgroup grants; None where it is not limited.
        usable_cores: what is left for computing threads, see :func:`usable_cores`.
        memory_gib: memory of the machine or, where smaller, of the cgroup; None where unknown.
    """

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    physical_cores: int | None
    logical_cpus: int
    affinity_cpus: int
    cpu_quota: float | None
    usable_cores: int
    memory_gib: float | None
    system: str
    python: str


@lru_cache(maxsize=1)
def describe_machine() -> Machine:
    """Read all facts; the answer does not change while a process lives."""
    memory = _memory_bytes()
    return Machine(
        cpu=_cpu_name(),
        architecture=platform.machine(),
        isa=_isa(),
        physical_cores=_physical_cores(range(os.cpu_count() or 1)),
        logical_cpus=os.cpu_count() or 1,
        affinity_cpus=len(_affinity()),
        cpu_quota=_cpu_quota(),
        usable_cores=usable_cores(),
        memory_gib=round(memory / 2**30, 2) if memory else None,
        system=platform.platform(),
        python=platform.python_version(),
    )


def int8_saturates(isa: Collection[str]) -> bool:
    """Whether a CPU with these vector extensions adds pairs of 8-bit products in 16 bits: AVX2 without VNNI."""
    return "avx2" in isa and not _EXACT_INT8.intersection(isa)


def usable_cores() -> int:
    """Physical cores that this process may really use: the least of affinity and cgroup quota, at least 1.

    One computing thread per physical core is what matrix kernels want; a second one per core only shares its units.
    """
    affinity = _affinity()
    cores = _physical_cores(affinity) or len(affinity)
    quota = _cpu_quota()
    return max(1, min(cores, math.floor(quota)) if quota is not None else cores)


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _physical_cores(cpus: range | list[int]) -> int | None:
    """Distinct cores behind hardware threads; threads of one core name the same set of siblings."""
    cores = set()
    for cpu in cpus:
        siblings = _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        if siblings is None:
            return None
        cores.add(siblings)
    return len(cores) or None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty on other systems."""
    entries: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if not line.strip():
            break
        key, _, value = line.partition(":")
        entries[key.strip()] = value.strip()
    return entries


def _cpu_name() -> str:
    return _cpuinfo().get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown"


def _isa() -> tuple[str, ...]:
    entries = _cpuinfo()
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    if not flags and platform.system() == "Darwin":
        flags = (_sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features")).lower().split()
    return tuple(name for flag, name in ISA_FLAGS.items() if flag in flags)


def _sysctl(key: str) -> str:
    if platform.system() != "Darwin":
        return ""
    result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cgroup_values(version2: str, version1: tuple[str, str]) -> Iterator[str]:
    """A cgroup setting of this process's group and of all groups above it, which limit it as well."""
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, name = Path("/sys/fs/cgroup"), version2
        elif version1[0] in controllers.split(","):
            root, name = Path("/sys/fs/cgroup") / version1[0], version1[1]
        else:
            continue
        inside = Path(group.lstrip("/"))
        for folder in (inside, *inside.parents):
            value = _read(root / folder / name)
            if value:
                yield value


def _cpu_quota() -> float | None:
    limits = []
    for value in _cgroup_values("cpu.max", ("cpu", "cpu.cfs_quota_us")):
        quota, _, period = value.partition(" ")
        if quota.isdigit():
            # cgroup v1 keeps the period in a file of its own; everyone leaves it at 100 ms.
            limits.append(int(quota) / int(period or 100_000))
    return round(min(limits), 2) if limits else None


def _memory_bytes() -> int | None:
    limits = [int(v) for v in _cgroup_values("memory.max", ("memory", "memory.limit_in_bytes")) if v.isdigit()]
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    if not limits and _sysctl("hw.memsize"):
        limits.append(int(_sysctl("hw.memsize")))
    return min(limits) if limits else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
