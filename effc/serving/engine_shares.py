"""Engines of several GPUs that compute together, as Triton's tensorrt backend starts them: one instance for all.

The backend reads what is written here since Triton 2.70, where it was built with TensorRT's multi-device support. Rank
r runs ``model.plan.rank<r>``; ``model.plan`` is there because Triton looks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effc.errors import UsageError
from effc.exporters.triton_config import Instances

LEAST_TRITON = "2.70"
_FILE = "model.plan"


@dataclass(frozen=True)
class Shares:
    """What a model of several ranks has in the place of one engine for each GPU.

    Attributes:
        files: engines by their names in the model's version.
        parameters: of the backend.
    """

    files: dict[str, Path]
    instances: Instances
    parameters: dict[str, str]


def shares(ranks: Sequence[Path], instances: Instances) -> Shares:
    """How engines, in the order of their ranks, run on as many GPUs.

    Args:
        instances: the GPUs, in that order; the first ones if it names none.

    Raises:
        UsageError: if it names more or fewer.
    """
    gpus = instances.gpus or tuple(range(len(ranks)))
    if len(gpus) != len(ranks):
        places = ",".join(str(number) for number in range(len(ranks)))
        raise UsageError(
            f"{len(ranks)} GPUs compute these engines together, and --instances names {len(gpus)}.",
            f"Name {len(ranks)}, such as gpu:{places}.",
        )
    return Shares(
        {_FILE: ranks[0], **{f"{_FILE}.rank{number}": path for number, path in enumerate(ranks)}},
        Instances("model"),
        {
            "enable_multi_device": "true",
            "multi_device_gpus": ",".join(str(number) for number in gpus),
            "multi_device_per_rank_engines": "true",
        },
    )
