"""The record of a model repository: which models effc wrote into it, and what a server has to be told of them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from effc import __version__
from effc.errors import OutputError
from effc.serving.backend.version import sha256
from effc.serving.launch import LAUNCH_NAME, launch_script, tensorrt_flags
from effc.serving.options import ServingOptions
from effc.serving.plan import Plan
from effc.serving.requirements import REQUIREMENTS_NAME, backends_on_gpus, remembered, requirements_text

RECORD_NAME = "effc-repository.json"
CONFIG_NAME = "config.pbtxt"


@contextmanager
def locked(repository: Path, make: bool = True) -> Iterator[dict[str, Any]]:
    """The record, to be changed by one process at a time; stored if the block ends well."""
    fresh = make and not repository.exists()
    if fresh:
        repository.mkdir(parents=True)
    record: dict[str, Any] = {"format": 1, "deployments": {}, "configs": {}}
    if make and not (repository / RECORD_NAME).exists():
        if any(repository.iterdir()):
            raise OutputError(f"'{repository}' is no repository that effc wrote.", "Give an empty or a new directory.")
    else:
        record = read_record(repository)
    handle = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have written while this one waited.
        if (repository / RECORD_NAME).exists():
            record = read_record(repository)
        yield record
        record["effc_version"] = __version__
        replace_text(repository / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    except BaseException:
        if fresh:
            with suppress(OSError):
                repository.rmdir()
        raise
    finally:
        os.close(handle)


def read_record(repository: Path) -> dict[str, Any]:
    """What ``effc-repository.json`` says.

    Raises:
        OutputError: if it is missing, damaged or of a newer effc.
    """
    file = repository / RECORD_NAME
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise OutputError(f"'{repository}' is no repository that effc wrote.", "Make one with: effc triton.") from None
    except ValueError as error:
        raise OutputError(f"'{file}' cannot be read: {error}.", "Write the repository again.") from None
    if record.get("format") != 1:
        raise OutputError(f"'{file}' was written by a newer effc.", "Upgrade: pip install --upgrade effc.")
    return record


def remember(
    record: dict[str, Any],
    repository: Path,
    plan: Plan,
    version: int,
    options: ServingOptions,
) -> None:
    """Put a new version of a plan's models into the record, and write what follows from it: how to start a server."""
    entry = record["deployments"].setdefault(plan.name, {"task": plan.task, "models": [], "versions": []})
    entry["models"] = [model.config.name for model in plan.models]
    entry["versions"] = [*entry["versions"], version]
    entry["keep"], entry["active"] = options.keep, None
    record["cache"] = record.get("cache", False) or options.response_cache
    record.setdefault("plugins", {})[plan.name] = [f"{model}/{version}/{library}" for model, library in plan.plugins]
    record.setdefault("host_code", {})[plan.name] = plan.host_code
    record.setdefault("gpus", {})[plan.name] = bool(backends_on_gpus(plan))
    record.setdefault("packages", {})[plan.name] = remembered(plan, record)
    for model in plan.models:
        record["configs"][model.config.name] = sha256(repository / model.config.name / CONFIG_NAME)
    script = repository / LAUNCH_NAME
    text = launch_script(
        cache=record["cache"],
        plugins=_plugins(record),
        host_code=_host_code(record),
        gpus=any(record["gpus"].values()),
    )
    replace_text(script, text)
    script.chmod(0o755)
    replace_text(repository / REQUIREMENTS_NAME, requirements_text(record["packages"]))


def deployment(repository: Path, name: str) -> dict[str, Any]:
    """What a repository's record says of one model that clients can ask."""
    entry: dict[str, Any] = read_record(repository)["deployments"][name]
    return entry


def wants_cache(repository: Path) -> bool:
    """Whether a model of a repository was written with the response cache."""
    return bool(read_record(repository).get("cache", False))


def engine_flags(repository: Path) -> tuple[str, ...]:
    """What a server has to be told of the TensorRT plugins that a repository holds."""
    record = read_record(repository)
    return tuple(tensorrt_flags([str(repository / library) for library in _plugins(record)], _host_code(record)))


def _plugins(record: dict[str, Any]) -> list[str]:
    return [library for own in record.get("plugins", {}).values() for library in own]


def _host_code(record: dict[str, Any]) -> bool:
    return any(record.get("host_code", {}).values())


def replace_text(file: Path, text: str) -> None:
    """Write a file so that it appears whole."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
