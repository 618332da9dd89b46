"""Rows of a user's data file or data set, one after another."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effc.errors import DataError, MissingDependencyError

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
HUB = "hf:"
"""What the name of a data set on the hub begins with: ``hf:NAME@CONFIG:SPLIT``, the last two optional."""
_SPLITS = ("test", "validation", "train")
# Rows of a hub's data set that are shuffled among each other: such sets are often sorted by label.
_SHUFFLED = 10_000


def read_rows(path: str | Path, seed: int = 0) -> Iterator[Any]:
    """Rows of a file, of a saved data set or of one on the hub; what is in a row is not checked.

    Args:
        seed: shuffles data sets of the hub.

    Raises:
        DataError: if the file is missing, not readable or of a format that effc does not read.
        MissingDependencyError: if a data set needs the package ``datasets``, which is not installed.
    """
    if str(path).startswith(HUB):
        yield from _hub_rows(str(path), seed)
        return
    path = Path(path).expanduser()
    if path.is_dir():
        yield from _saved_rows(path)
    elif not path.exists():
        raise DataError(
            f"There is no data file '{path}'.",
            f"Give a file in one of these formats: {', '.join(FORMATS)}; or {HUB}NAME for a data set of the hub.",
        )
    else:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(
            f"The data file '{path}' has a format that effc does not read.", f"Use one of {', '.join(FORMATS)}."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as stream:
            if suffix == ".txt":
                yield from ({"text": line.strip()} for line in stream)
            elif suffix in (".csv", ".tsv"):
                yield from _table_rows(stream, path, "\t" if suffix == ".tsv" else ",")
            elif suffix == ".jsonl":
                yield from _line_rows(stream, path)
            else:
                yield from _list_rows(stream, path)
    except UnicodeDecodeError as error:
        raise DataError(f"The data file '{path}' is not UTF-8 text: {error}.", "Convert it to UTF-8.") from None
    except OSError as error:
        raise DataError(f"The data file '{path}' cannot be read: {error}.", "Check its permissions.") from None


def _table_rows(stream: Any, path: Path, delimiter: str) -> Iterator[Any]:
    # The default limit of 128 KiB per field is shorter than a long document.
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(stream, delimiter=delimiter)
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"'{path}' is not a valid table: line {reader.line_num}: {error}.", "Correct that line."
        ) from None


def _line_rows(stream: Any, path: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"Line {number} of '{path}' is not JSON: {error}.",
                    'Write one object a line, for example {"text": "...", "label": 1}.',
                ) from None


def _list_rows(stream: Any, path: Path) -> Iterator[Any]:
    try:
        value = json.load(stream)
    except ValueError as error:
        raise DataError(f"'{path}' is not JSON: {error}.", "A file with one object a line is named .jsonl.") from None
    if isinstance(value, dict):
        # Some exports wrap the rows: {"data": [...]}.
        value = value.get("data", value)
    if not isinstance(value, list):
        raise DataError(f"'{path}' does not hold a list of objects.", 'Write [{"text": "..."}, ...].')
    yield from value


def _saved_rows(path: Path) -> Iterator[Any]:
    """The rows of a saved ``datasets.Dataset``, or of the most fitting split of a ``DatasetDict``."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"The directory '{path}' is not a data set saved by save_to_disk.",
            f"Give a file in one of these formats: {', '.join(FORMATS)}.",
        )
    datasets = _datasets(str(path))
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[next((name for name in _SPLITS if name in loaded), next(iter(loaded)))]
    yield from (dict(row) for row in loaded)


def _hub_rows(name: str, seed: int) -> Iterator[Any]:
    datasets = _datasets(name)
    where, _, split = name.removeprefix(HUB).partition(":")
    where, _, config = where.partition("@")
    try:
        loaded = datasets.load_dataset(where, config or None, split=split or None, streaming=True)
        if not split:
            loaded = loaded[next((known for known in _SPLITS if known in loaded), next(iter(loaded)))]
        yield from (dict(row) for row in loaded.shuffle(seed=seed, buffer_size=_SHUFFLED))
    except DataError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"The data set '{name}' cannot be read: {reason.strip()[:200]}",
            f"Write {HUB}NAME@CONFIG:SPLIT, for example {HUB}stanfordnlp/imdb:test; a private one needs HF_TOKEN.",
        ) from error


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"Reading the data set '{name}' needs the package datasets.",
            "Install it: pip install 'effc[data]', or pip install datasets",
        ) from None
    return datasets
