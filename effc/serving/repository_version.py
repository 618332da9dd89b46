"""Which version of a model in a repository a server loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effc.errors import UsageError
from effc.exporters.triton_config import parse_config
from effc.serving.backend.version import sha256
from effc.serving.repository_record import CONFIG_NAME, locked, replace_text


def use_version(repository: str | Path, name: str, version: int | None) -> list[str]:
    """Let a server load one version only, such as the one before; or the newest ones again if None.

    Returns:
        the models whose configuration was changed. A running server takes note when they are loaded again.

    Raises:
        UsageError: if there is no such model or version.
    """
    repository = Path(repository).absolute()
    with locked(repository, make=False) as record:
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
            replace_text(file, str(message))
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


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
