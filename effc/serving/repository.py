"""Write models into a Triton model repository: all of an artifact's or none, and new versions beside old ones.

A repository holds one directory per model, with ``config.pbtxt`` and a directory per version. Files are written aside
and renamed, so that a server that starts meanwhile sees a model whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import __version__
from effc.errors import OutputError, UsageError
from effc.exporters.triton_config import config_text, parse_config
from effc.serving.backend.version import check_version, sha256, write_hashes
from effc.serving.deployment import plan_artifact
from effc.serving.launch import LAUNCH_NAME, launch_script, tensorrt_flags
from effc.serving.options import ServingOptions, check_name
from effc.serving.plan import Plan
from effc.serving.requirements import (
    REQUIREMENTS_NAME,
    backends_on_gpus,
    check_packages,
    remembered,
    requirements_text,
)

RECORD_NAME = "effc-repository.json"
CONFIG_NAME = "config.pbtxt"


@dataclass(frozen=True)
class Deployed:
    """What was written.

    Attributes:
        name: what clients ask.
        version: of all its models.
        models: their names, ``name`` last.
        notes: what the user should know, as full sentences.
    """

    repository: Path
    name: str
    version: int
    models: tuple[str, ...]
    notes: tuple[str, ...]


def write_repository(artifact: str | Path, repository: str | Path, options: ServingOptions | None = None) -> Deployed:
    """Add an artifact to a repository, which is made if it is not there.

    Where the repository has a model of that name already, the artifact becomes its next version; see
    :func:`use_version` for going back.

    Raises:
        OutputError: if the artifact is damaged, or the repository cannot be written or is none of effc's.
        UsageError: if an option does not fit, or the model of that name takes other inputs.
        MissingDependencyError: if tritonclient is not installed.
    """
    options = options or ServingOptions()
    return write_plan(plan_artifact(Path(artifact), options), repository, options)


def write_plan(plan: Plan, repository: str | Path, options: ServingOptions) -> Deployed:
    """Add planned models to a repository.

    Triton loads TensorRT plugins for the whole backend, so those of a newer version take the place of older ones in the
    launch script.

    Raises:
        OutputError, UsageError: see :func:`write_repository`.
    """
    repository = Path(repository).absolute()
    try:
        with _locked(repository) as record:
            known = record["deployments"].get(plan.name)
            version = 1 + max(known["versions"], default=0) if known else 1
            _check_free(repository, plan, record, bool(known))
            check_packages(plan, record.get("packages", {}))
            _add(repository, plan, version, options)
            _remember(record, repository, plan, version, options)
    except OSError as error:
        raise OutputError(
            f"'{repository}' cannot be written: {error}.", "Give a directory that you may write."
        ) from error
    return Deployed(repository, plan.name, version, tuple(model.config.name for model in plan.models), plan.notes)


def use_version(repository: str | Path, name: str, version: int | None) -> list[str]:
    """Let a server load one version only, such as the one before; or the newest ones again if None.

    Returns:
        the models whose configuration was changed. A running server takes note when they are loaded again.

    Raises:
        UsageError: if there is no such model or version.
    """
    repository = Path(repository).absolute()
    with _locked(repository, make=False) as record:
        entry = record["deployments"].get(name)
        if entry is None:
            raise UsageError(f"'{repository}' has no model '{name}'.", f"It has: {', '.join(record['deployments'])}.")
        if version is not None and version not in entry["versions"]:
            raise UsageError(f"'{name}' has no version {version}.", f"It has: {_join(entry['versions'])}.")
        for model in entry["models"]:
            file = repository / model / CONFIG_NAME
            message = parse_config(file.read_text(encoding="utf-8"))
            message.ClearField("version_policy")
            if version is None:
                message.version_policy.latest.num_versions = entry["keep"]
            else:
                message.version_policy.specific.versions.append(version)
            _replace(file, str(message))
            record["configs"][model] = sha256(file)
        entry["active"] = version
        return list(entry["models"])


def use_version_text(repository: str | Path, name: str | None, version: str | None) -> list[str]:
    """:func:`use_version` of what a user wrote: a number, or ``newest``.

    Raises:
        UsageError: if it is neither, or no model is named.
    """
    if name is None or version is None:
        raise UsageError("A version belongs to a model.", "Name it with --name.")
    if version != "newest" and not version.isdecimal():
        raise UsageError(f"'{version}' is no version.", "Give a number, or newest.")
    return use_version(repository, name, None if version == "newest" else int(version))


def check_repository(repository: str | Path) -> list[str]:
    """Compare every file that effc wrote with its recorded hash.

    Returns:
        the models that clients can ask.

    Raises:
        OutputError: naming the first file that is missing or changed.
    """
    repository = Path(repository)
    record = _read_record(repository)
    for model, digest in record["configs"].items():
        file = repository / check_name(model) / CONFIG_NAME
        if not file.is_file() or sha256(file) != digest:
            raise OutputError(f"'{file}' is missing or was changed.", "Write the model again with: effc triton.")
    for entry in record["deployments"].values():
        for model in entry["models"]:
            for version in entry["versions"]:
                check_version(repository / model / str(version))
    return list(record["deployments"])


def deployment(repository: Path, name: str) -> dict[str, Any]:
    """What a repository's record says of one model that clients can ask."""
    entry: dict[str, Any] = _read_record(repository)["deployments"][name]
    return entry


def wants_cache(repository: Path) -> bool:
    """Whether a model of a repository was written with the response cache."""
    return bool(_read_record(repository).get("cache", False))


def engine_flags(repository: Path) -> tuple[str, ...]:
    """What a server has to be told of the TensorRT plugins that a repository holds."""
    record = _read_record(repository)
    return tuple(tensorrt_flags([str(repository / library) for library in _plugins(record)], _host_code(record)))


def _plugins(record: dict[str, Any]) -> list[str]:
    return [library for own in record.get("plugins", {}).values() for library in own]


def _host_code(record: dict[str, Any]) -> bool:
    return any(record.get("host_code", {}).values())


def _add(repository: Path, plan: Plan, version: int, options: ServingOptions) -> None:
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


def _write_version(directory: Path, files: Any) -> None:
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


def _check_free(repository: Path, plan: Plan, record: dict[str, Any], known: bool) -> None:
    """A new version must take what the old one does, and a new model must not replace a foreign one."""
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


def _remember(
    record: dict[str, Any],
    repository: Path,
    plan: Plan,
    version: int,
    options: ServingOptions,
) -> None:
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
    _replace(script, text)
    script.chmod(0o755)
    _replace(repository / REQUIREMENTS_NAME, requirements_text(record["packages"]))


@contextmanager
def _locked(repository: Path, make: bool = True) -> Iterator[dict[str, Any]]:
    """The record, to be changed by one process at a time; stored if the block ends well."""
    fresh = make and not repository.exists()
    if fresh:
        repository.mkdir(parents=True)
    record: dict[str, Any] = {"format": 1, "deployments": {}, "configs": {}}
    if make and not (repository / RECORD_NAME).exists():
        if any(repository.iterdir()):
            raise OutputError(f"'{repository}' is no repository that effc wrote.", "Give an empty or a new directory.")
    else:
        record = _read_record(repository)
    handle = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have written while this one waited.
        if (repository / RECORD_NAME).exists():
            record = _read_record(repository)
        yield record
        record["effc_version"] = __version__
        _replace(repository / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    except BaseException:
        if fresh:
            with suppress(OSError):
                repository.rmdir()
        raise
    finally:
        os.close(handle)


def _read_record(repository: Path) -> dict[str, Any]:
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


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
