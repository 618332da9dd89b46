"""Text to token ids, with the ``tokenizer.json`` of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from effc.errors import UsageError

_COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


@dataclass(frozen=True)
class TokenizerSettings:
    """What the writer says of a tokenizer.

    Attributes:
        inputs: what the graph takes, of ``input_ids``, ``attention_mask`` and ``token_type_ids``.
        max_length: tokens that a text may have, special ones included; None if nothing bounds them.
        truncate: cut longer texts; refuse them if False.
        padding: what fills ``input_ids`` behind a text.
        masked: the graph takes ``attention_mask``, so that texts may be padded.
        max_bytes: of one text.
    """

    inputs: tuple[str, ...]
    max_length: int | None
    truncate: bool
    padding: int
    masked: bool
    max_bytes: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TokenizerSettings:
        """From what ``vars`` gives, as JSON."""
        return cls(**{**values, "inputs": tuple(values["inputs"])})


class TextEncoder:
    """Encodes batches of texts."""

    def __init__(self, directory: Path, settings: TokenizerSettings):
        self.settings = settings
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        # A checkpoint may bring settings of its own for both.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.truncate and settings.max_length is not None:
            self._tokenizer.enable_truncation(settings.max_length)

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Token ids and what goes with them, padded behind each text.

        Returns:
            the graph's inputs, int64 ``[batch, length]``; ``offsets``, int64 ``[batch, length, 2]``, the characters
            of each token, ``(0, 0)`` for those that stand for none; ``truncated``, bool ``[batch, 1]``.

        Raises:
            UsageError: if a text gives no token, or too many.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        for encoding in encodings:
            self._check(encoding)
        lengths = {len(encoding.ids) for encoding in encodings}
        if len(lengths) > 1 and not self.settings.masked:
            raise UsageError(
                "This model takes no mask, so texts of different lengths cannot share a request.", "Send each alone."
            )
        length = max(lengths)
        result: dict[str, NDArray[Any]] = {}
        for name in self.settings.inputs:
            filler = self.settings.padding if name == "input_ids" else 0
            result[name] = np.full((len(encodings), length), filler, np.int64)
            for row, encoding in zip(result[name], encodings, strict=True):
                row[: len(encoding.ids)] = getattr(encoding, _COLUMNS[name])
        result["offsets"] = np.zeros((len(encodings), length, 2), np.int64)
        for row, encoding in zip(result["offsets"], encodings, strict=True):
            row[: len(encoding.ids)] = encoding.offsets
        result["truncated"] = np.array([[bool(encoding.overflowing)] for encoding in encodings])
        return result

    def _check(self, encoding: Encoding) -> None:
        count, limit = len(encoding.ids), self.settings.max_length
        if count == 0:
            raise UsageError("A text is empty.", "Leave it out.")
        if limit is not None and count > limit:
            raise UsageError(f"A text has {count} tokens; the model takes {limit}.", "Send it in parts.")
