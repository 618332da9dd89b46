"""Which engine of an artifact runs on this machine, and which of its profiles takes some inputs."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence

from effc.compiler.engine_records import BuiltEngine, BuiltEngines
from effc.errors import PreconditionError, UsageError
from effc.exporters.cuda_device import device_capability
from effc.exporters.tensorrt_flavours import FLAVOURS


def what_is_missing(engines: BuiltEngines, gpu: int = 0) -> str | None:
    """Why the engines cannot run here, as a sentence with what to do about it; None if they can.

    Args:
        gpu: number of the GPU that is to run them.
    """
    if engines.tensor_parallel > 1:
        return (
            f"{engines.tensor_parallel} GPUs compute these engines together, which takes a server that starts all of "
            "them at once: effc triton writes what Triton needs for it."
        )
    flavour = FLAVOURS[engines.flavour]
    built = ", ".join(dict.fromkeys(engine.arch for engine in engines.engines))
    capability = device_capability(gpu)
    if capability is None:
        which = "none that its driver knows" if gpu == 0 else f"no GPU {gpu}"
        return f"The engines need an NVIDIA GPU ({built}), and this machine has {which}."
    if f"sm_{capability}" not in {engine.arch for engine in engines.engines}:
        here = "this GPU" if gpu == 0 else f"GPU {gpu}"
        return f"The engines are for {built}, and {here} is sm_{capability}: compile with --arch=sm_{capability}."
    if importlib.util.find_spec(engines.flavour) is None:
        return f"The engines need {flavour.name}: pip install {flavour.package}=={engines.version}."
    if importlib.util.find_spec("torch") is None:
        return "The engines' tensors are torch's: pip install torch."
    return None


def engines_here(engines: BuiltEngines, gpu: int = 0) -> dict[str, BuiltEngine]:
    """The engine of each graph for a GPU of this machine."""
    arch = f"sm_{device_capability(gpu)}"
    return {engine.graph: engine for engine in engines.engines if engine.arch == arch}


def check_version(engines: BuiltEngines, installed: str) -> None:
    """Compare the version of TensorRT that is imported with that which the engines were built with.

    Raises:
        PreconditionError: if they cannot run in it.
    """
    if not runs_in(engines.version, installed, engines.version_compatible):
        flavour = FLAVOURS[engines.flavour]
        raise PreconditionError(
            f"The engines were built with {flavour.name} {engines.version}, and {installed} is installed here.",
            f"Install theirs: pip install {flavour.package}=={engines.version}. Or compile again with this one.",
        )


def runs_in(built: str, installed: str, newer: bool) -> bool:
    """Whether engines of one version of TensorRT run in another; the build number counts where both say it.

    Args:
        newer: they were built to run in newer releases of their major version.
    """
    ours, there = ([int(part) for part in re.findall(r"\d+", text)] for text in (built, installed))
    count = min(len(ours), len(there))
    if newer:
        return ours[:1] == there[:1] and there[:count] >= ours[:count]
    return ours[:count] == there[:count]


def choose_profile(engine: BuiltEngine, shapes: Mapping[str, Sequence[int]]) -> int:
    """The profile tuned for the least that holds inputs of these shapes.

    Raises:
        UsageError: if none does; names the largest.
    """
    fitting = [
        (sum(math.prod(most) for _, _, most in profile.values()), number)
        for number, profile in enumerate(engine.profiles)
        if all(_fits(shape, *profile[name]) for name, shape in shapes.items())
    ]
    if not fitting:
        name, shape = next(iter(shapes.items()))
        largest = max((profile[name][2] for profile in engine.profiles), key=math.prod)
        raise UsageError(
            f"The engine '{engine.file}' takes '{name}' up to {list(largest)}, and {list(shape)} was given.",
            "Give fewer or shorter texts, or compile with larger --shapes.",
        )
    return min(fitting)[1]


def _fits(shape: Sequence[int], least: Sequence[int], _: Sequence[int], most: Sequence[int]) -> bool:
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )
