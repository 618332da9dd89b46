"""What the models of a repository import inside the server, as a requirements file that lies in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effc.errors import UsageError
from effc.exporters.triton_config import ModelConfig

if TYPE_CHECKING:
    from effc.serving.plan import Plan

REQUIREMENTS_NAME = "requirements.txt"
PACKAGES = ("numpy", "onnxruntime", "tokenizers")
"""What effc's models import where a graph is run by ONNX Runtime."""

_FOR_GPUS = {"onnxruntime": "onnxruntime-gpu"}


def backends_on_gpus(plan: Plan) -> set[str]:
    """Backends of the models that run on GPUs."""
    configs = [model.config for model in plan.models if isinstance(model.config, ModelConfig)]
    return {config.backend for config in configs if config.instances.kind in ("gpu", "model")}


def packages_of(plan: Plan) -> set[str]:
    """What a plan's models import, as pip names it."""
    on_gpus = "python" in backends_on_gpus(plan)
    return {_FOR_GPUS.get(package, package) if on_gpus else package for package in plan.packages}


def check_packages(plan: Plan, known: Mapping[str, Sequence[str]]) -> None:
    """Models of the python backend share one Python, which holds one release of a package.

    Args:
        known: what the models that are in the repository import.

    Raises:
        UsageError: if it would have to hold two.
    """
    for name, packages in known.items():
        for ours, theirs in ((ours, theirs) for ours in packages_of(plan) for theirs in packages):
            if ours != theirs and _package(ours) == _package(theirs):
                raise UsageError(
                    f"'{plan.name}' needs {ours}, and '{name}' in this repository needs {theirs}, in one server.",
                    "Write it into another repository, or compile both with one version.",
                )


def requirements_text(packages: Mapping[str, Sequence[str]]) -> str:
    """The requirements file of all models."""
    everything = {package for own in packages.values() for package in own}
    # Both would write the same files; that for GPUs runs on CPUs as well.
    everything -= {package for package, other in _FOR_GPUS.items() if other in everything}
    return "".join(f"{package}\n" for package in sorted(everything))


def remembered(plan: Plan, record: Mapping[str, Any]) -> list[str]:
    """What a plan's models import, older versions included, which are still loaded."""
    return sorted({*record.get("packages", {}).get(plan.name, ()), *packages_of(plan)})


def _package(requirement: str) -> str:
    return re.split(r"[<>=]", requirement)[0]
