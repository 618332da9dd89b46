"""The files of planned models in a repository: all of them or none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effc.errors import UsageError
from effc.exporters.triton_config import config_text, parse_config
from effc.serving.backend.version import write_hashes
from effc.serving.options import ServingOptions
from effc.serving.plan import Plan
from effc.serving.repository_record import CONFIG_NAME


def check_free(repository: Path, plan: Plan, record: dict[str, Any], known: bool) -> None:
    """A new version must take what the old one does, and a new model must not replace a foreign one.

    Raises:
        UsageError: if it does not.
    """
    former = record["deployments"].get(plan.name, {}).get("models")
    names = [model.config.name for model in plan.models]
    if known and former != names:
        raise UsageError(
            f"'{plan.name}' in '{repository}' consists of {', '.join(former)}, not of {', '.join(names)}.",
            "Give the new one another --name.",
        )
    for model in plan.models:
        file = repository / model.config.name / CONFIG_NAME
        if not file.parent.exists():
            continue
        if not known:
            raise UsageError(f"'{repository}' has a model '{model.config.name}' already.", "Give another --name.")
        old = parse_config(file.read_text(encoding="utf-8"))
        new = parse_config(config_text(model.config))
        if (list(old.input), list(old.output)) != (list(new.input), list(new.output)):
            raise UsageError(
                f"The version of '{model.config.name}' in '{repository}' takes or gives other tensors, and Triton has "
                "one description for all versions.",
                "Give the new one another --name.",
            )


def add_files(repository: Path, plan: Plan, version: int, options: ServingOptions) -> None:
    """Write all files aside, then rename: new versions first, since a configuration may name them."""
    # Beside the repository and not in it, because a server takes every directory in it for a model.
    staging = Path(tempfile.mkdtemp(prefix=f".{repository.name}-", dir=repository.parent))
    moved: list[Path] = []
    try:
        for model in plan.models:
            _write_version(staging / model.config.name / str(version), model.files)
            text = config_text(model.config, keep=options.keep)
            (staging / model.config.name / CONFIG_NAME).write_text(text, encoding="utf-8")
        for model in plan.models:
            name = model.config.name
            target = repository / name
            if target.exists():
                (staging / name / str(version)).rename(target / str(version))
                moved.append(target / str(version))
            else:
                (staging / name).rename(target)
                moved.append(target)
        for model in plan.models:
            fresh = staging / model.config.name / CONFIG_NAME
            if fresh.exists():
                fresh.replace(repository / model.config.name / CONFIG_NAME)
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_version(directory: Path, files: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif callable(content):
            content(path)
        else:
            shutil.copyfile(content, path)
    write_hashes(directory)
