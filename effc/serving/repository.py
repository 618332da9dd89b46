"""Write models into a Triton model repository: all of an artifact's or none, and new versions beside old ones.

A repository holds one directory per model, with ``config.pbtxt`` and a directory per version. Files are written aside
and renamed, so that a server that starts meanwhile sees a model whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effc.errors import OutputError
from effc.serving.backend.version import check_version, sha256
from effc.serving.deployment import plan_artifact
from effc.serving.options import ServingOptions, check_name
from effc.serving.plan import Plan
from effc.serving.repository_files import add_files, check_free
from effc.serving.repository_record import CONFIG_NAME, locked, read_record, remember
from effc.serving.requirements import check_packages


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
        with locked(repository) as record:
            known = record["deployments"].get(plan.name)
            version = 1 + max(known["versions"], default=0) if known else 1
            check_free(repository, plan, record, bool(known))
            check_packages(plan, record.get("packages", {}))
            add_files(repository, plan, version, options)
            remember(record, repository, plan, version, options)
    except OSError as error:
        raise OutputError(
            f"'{repository}' cannot be written: {error}.", "Give a directory that you may write."
        ) from error
    return Deployed(repository, plan.name, version, tuple(model.config.name for model in plan.models), plan.notes)


def check_repository(repository: str | Path) -> list[str]:
    """Compare every file that effc wrote with its recorded hash.

    Returns:
        the models that clients can ask.

    Raises:
        OutputError: naming the first file that is missing or changed.
    """
    repository = Path(repository)
    record = read_record(repository)
    for model, digest in record["configs"].items():
        file = repository / check_name(model) / CONFIG_NAME
        if not file.is_file() or sha256(file) != digest:
            raise OutputError(f"'{file}' is missing or was changed.", "Write the model again with: effc triton.")
    for entry in record["deployments"].values():
        for model in entry["models"]:
            for version in entry["versions"]:
                check_version(repository / model / str(version))
    return list(record["deployments"])
