"""Checkpoints of a training run that a kill can cut off at any time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from effc.errors import PassFailedError

WEIGHTS = "trained.safetensors"
# Written last: a checkpoint without it was cut off by whatever ended the process.
COMPLETE = "complete.json"


def put_back(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters of the same names.

    Raises:
        PassFailedError: if names or shapes differ.
    """
    if {name: value.shape for name, value in parameters.items()} != {
        name: value.shape for name, value in values.items()
    }:
        raise PassFailedError(
            "The checkpoint of the training belongs to another model.", "Remove it, so that training starts anew."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint; those that were cut off are removed."""
    whole = []
    for path in directory.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def write_whole(path: Path, value: Any) -> None:
    staging = path.with_suffix(".part")
    staging.write_text(json.dumps(value))
    os.replace(staging, path)
