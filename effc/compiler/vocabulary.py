"""A pruned vocabulary as an artifact keeps it: which token of the source model each new id stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from effc.compiler.manifest import Manifest, VocabularyRecord
from effc.errors import OutputError

VOCABULARY_NAME = "vocabulary.json"


def save_vocabulary(directory: Path, source_ids: Sequence[int], source_tokens: int) -> VocabularyRecord:
    """Write the list of source ids, in the order of the new ones."""
    text = json.dumps({"source_ids": list(source_ids)}, separators=(",", ":"))
    (directory / VOCABULARY_NAME).write_text(text, encoding="utf-8")
    return VocabularyRecord(file=VOCABULARY_NAME, tokens=len(source_ids), source_tokens=source_tokens)


def load_vocabulary(directory: Path, manifest: Manifest) -> list[int] | None:
    """The source's id of every token of an artifact, or None where the vocabulary was not pruned.

    Raises:
        OutputError: if the list is damaged.
    """
    record = None if manifest.compression is None else manifest.compression.vocabulary
    if record is None:
        return None
    try:
        found = json.loads((directory / record.file).read_text(encoding="utf-8"))["source_ids"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"'{directory / record.file}' cannot be read: {error}.", "Copy the whole artifact directory again."
        ) from None
    if not isinstance(found, list) or len(found) != record.tokens:
        raise OutputError(
            f"'{directory / record.file}' does not list {record.tokens} tokens.", "Copy the whole directory again."
        )
    return found
