"""Tokens to text as they come, up to where a stop text begins."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Bytes that do not make a character yet are shown as this.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer.

    Args:
        stop: texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._decoded, self._given = "", 0
        self._tokens: list[int] = []
        self.stopped = False

    def put(self, token: int) -> str:
        """Take a token; the text that is certain to belong to the answer now and was not given yet."""
        self._tokens.append(token)
        self._decoded += self._decoder.step(self._tokenizer, token) or ""
        self._look_for_stop()
        return self._give(len(self._decoded) if self.stopped else len(self._decoded) - self._held_back())

    def end(self) -> str:
        """What is left once no more tokens come: a character that was cut off, the beginning of a stop text."""
        if not self.stopped:
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            # A decoder that goes token by token may differ from the whole in its first space.
            if whole.startswith(self._decoded):
                self._decoded = whole
                self._look_for_stop()
        return self._give(len(self._decoded))

    def _give(self, end: int) -> str:
        piece = self._decoded[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _look_for_stop(self) -> None:
        places = [place for text in self._stop for place in [self._decoded.find(text)] if place >= 0]
        if places:
            self._decoded, self.stopped = self._decoded[: min(places)], True

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for count in range(min(longest, len(self._decoded)), 0, -1):
            if any(text.startswith(self._decoded[-count:]) for text in self._stop):
                return count
        return 0
