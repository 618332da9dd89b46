"""The two TensorRTs: full TensorRT, which builds on the GPU it builds for, and TensorRT-RTX, which builds anywhere.

Nothing is imported until an engine is built, and then in a process of its own (:mod:`effc.exporters.engine_worker`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from effc.errors import MissingDependencyError, UsageError
from effc.exporters.cuda_device import device_capability


@dataclass(frozen=True)
class Flavour:
    """One of them.

    Attributes:
        target: its name as a target, and the module to import.
        package: what pip installs.
        capabilities: architectures that it builds for without having them; empty where it needs the GPU itself.
        libraries: module that holds the shared libraries, where they come as a package.
    """

    target: str
    package: str
    name: str
    capabilities: tuple[int, ...]
    libraries: str

    @property
    def anywhere(self) -> bool:
        """Whether engines can be built without a GPU."""
        return bool(self.capabilities)


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "TensorRT", (), "tensorrt_libs"),
    "tensorrt_rtx": Flavour(
        "tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX", (75, 80, 86, 89, 120, 121), "tensorrt_rtx_libs"
    ),
}


def require_flavour(target: str) -> Flavour:
    """The flavour of a target, installed.

    Raises:
        MissingDependencyError: if its package is not installed; names it.
    """
    flavour = FLAVOURS[target]
    if importlib.util.find_spec(target) is None:
        raise MissingDependencyError(
            f"The target '{target}' needs {flavour.name}, which is not installed.",
            f"Install it: pip install {flavour.package}.",
        )
    return flavour


def version_of(flavour: Flavour) -> str | None:
    """The installed version."""
    try:
        return metadata.version(flavour.package)
    except metadata.PackageNotFoundError:
        return None


def library_folder(flavour: Flavour) -> Path | None:
    """Where the flavour's shared libraries lie, if they came as a Python package."""
    spec = importlib.util.find_spec(flavour.libraries)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def choose_capabilities(flavour: Flavour, asked: tuple[int, ...], least: int) -> tuple[int, ...]:
    """The architectures to build for.

    Args:
        asked: those that the recipe names; if none, the GPU of this machine, or else all common ones that are at
            least ``least``.

    Raises:
        UsageError: if the flavour cannot build for one of them here.
    """
    here = device_capability()
    if not flavour.anywhere:
        if here is None:
            raise UsageError(
                f"{flavour.name} builds engines on the GPU that they are for, and this machine has none.",
                "Compile on that machine, or build with --target=tensorrt_rtx, which needs no GPU.",
            )
        if wrong := [capability for capability in asked if capability != here]:
            raise UsageError(
                f"{flavour.name} builds for the GPU of this machine, sm_{here}, and not for sm_{wrong[0]}.",
                "Leave --arch out, or build with --target=tensorrt_rtx.",
            )
        return (here,)
    for capability in asked:
        if capability not in flavour.capabilities:
            known = ", ".join(f"sm_{number}" for number in flavour.capabilities)
            raise UsageError(f"{flavour.name} does not build for sm_{capability}.", f"It builds for {known}.")
    if asked:
        return asked
    if here in flavour.capabilities:
        return (here,)
    return tuple(capability for capability in (86, 89, 120) if capability >= least)
