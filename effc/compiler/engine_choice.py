"""Which engine of an artifact runs on this machine, and which of its profiles takes some inputs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence

from effc.compiler.manifest import EngineRecord, EnginesRecord
from effc.errors import UsageError
from effc.exporters.cuda_device import device_capability
from effc.exporters.tensorrt_flavours import FLAVOURS


def what_is_missing(engines: EnginesRecord) -> str | None:
    """Why the engines cannot run here, as a sentence with what to do about it; None if they can."""
    flavour = FLAVOURS[engines.flavour]
    built = ", ".join(dict.fromkeys(engine.arch for engine in engines.engines))
    capability = device_capability()
    if capability is None:
        return f"The engines need an NVIDIA GPU ({built}), and this machine has none that its driver knows."
    if f"sm_{capability}" not in {engine.arch for engine in engines.engines}:
        return f"The engines are for {built}, and this GPU is sm_{capability}: compile with --arch=sm_{capability}."
    if importlib.util.find_spec(engines.flavour) is None:
        return f"The engines need {flavour.name}: pip install {flavour.package}=={engines.version}."
    if importlib.util.find_spec("torch") is None:
        return "The engines' tensors are torch's: pip install torch."
    return None


def engines_here(engines: EnginesRecord) -> dict[str, EngineRecord]:
    """The engine of each graph for this machine's GPU."""
    arch = f"sm_{device_capability()}"
    return {engine.graph: engine for engine in engines.engines if engine.arch == arch}


def choose_profile(engine: EngineRecord, shapes: Mapping[str, Sequence[int]]) -> int:
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
