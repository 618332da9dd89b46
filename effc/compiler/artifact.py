"""The artifact directory: made aside, then moved into place at once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from effc.compiler.artifact_files import MANIFEST_NAME, read_manifest
from effc.compiler.manifest import BenchRecord, FileRecord, Manifest, VerifyRecord
from effc.errors import OutputError

REPORT_NAME = "report.html"


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh directory beside ``output`` that becomes ``output`` if the block ends well, and vanishes if not.

    Raises:
        OutputError: if ``output`` holds something and ``overwrite`` is False, cannot be written, or the disk is full.
    """
    check_output(output, overwrite)
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise _write_error(output, error) from error
    try:
        yield staging
        # mkdtemp makes it private; an artifact is as readable as any directory the user makes.
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        former = None
        if output.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
            output.rename(former / "old")
        staging.rename(output)
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise _write_error(output, error) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds something else, before any work is done."""
    output = output.absolute()
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise OutputError(
                f"'{output}' exists and is not empty.", "Give another directory, or --overwrite to replace an artifact."
            )
        if not (output / MANIFEST_NAME).is_file():
            raise OutputError(
                f"'{output}' is not an artifact of effc, so it is not overwritten.", "Give another directory."
            )
    elif output.exists() and not output.is_dir():
        raise OutputError(f"'{output}' is a file.", "Give a directory.")
    parent = next(p for p in (output.parent, *output.parent.parents) if p.exists())
    try:
        # Only trying tells: permission bits say nothing of read-only mounts and quotas.
        Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=parent)).rmdir()
    except OSError as error:
        raise _write_error(output, error) from error


def record_files(directory: Path) -> dict[str, FileRecord]:
    """Hash and size of every file but the manifest and the report, which are written later."""
    records = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (MANIFEST_NAME, REPORT_NAME):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = FileRecord(sha256=digest, bytes=path.stat().st_size)
    return records


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``effc.json`` and the report that shows it; each appears whole."""
    # Imported here because drawing takes a second to import, and the check of an output path should not.
    from effc.compiler.report import write_report

    try:
        partial = directory / f".{MANIFEST_NAME}.partial"
        partial.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(directory / MANIFEST_NAME)
        write_report(manifest, directory / REPORT_NAME)
    except OSError as error:
        raise _write_error(directory, error) from error


def remeasured(
    directory: Path, *, verification: VerifyRecord | None = None, benchmark: BenchRecord | None = None
) -> Manifest:
    """Store a new measurement in an artifact's ``effc.json`` and report."""
    manifest = read_manifest(directory)
    if verification is not None:
        manifest.verification = verification
    if benchmark is not None:
        manifest.benchmark = benchmark
    # A read-only artifact can still be measured; the figures are the caller's.
    with suppress(OutputError):
        write_manifest(directory, manifest)
    return manifest


def _write_error(output: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk is full while writing '{output}'.", "Free space or give another directory.")
    return OutputError(
        f"'{output}' cannot be written: {error.strerror or error}.", "Give a directory that you may write."
    )
