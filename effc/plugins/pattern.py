"""Attention patterns: which (query i, key j) pairs are visible.

A :class:`Pattern` is a union of terms, written ``local:256`` or, with several terms, ``local:256|...``. It is the one
definition that the torch reference, the ONNX function body and the native kernels are tested against. Causality and
padding restrict a pattern from outside; they are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.suggest import did_you_mean


@dataclass(frozen=True)
class Dense:
    """Every key is visible: ordinary softmax attention (Vaswani et al., 2017)."""

    form: ClassVar[str] = "dense"
    syntax: ClassVar[str] = "dense"

    def __str__(self) -> str:
        return "dense"

    def visible(self, query: NDArray[np.int64], key: NDArray[np.int64], causal: bool) -> NDArray[np.bool_]:
        """True where ``key`` may be attended from ``query``, before causality is applied."""
        return np.ones(np.broadcast_shapes(query.shape, key.shape), dtype=bool)

    def reach(self, causal: bool) -> None:
        """No bound on the distance."""
        return None


@dataclass(frozen=True)
class Local:
    """Sliding window of total width ``window`` (Longformer, Beltagy et al., 2020; Mistral for the causal form).

    Bidirectional attention sees ``|i - j| <= window // 2``; causal attention sees ``i - window < j <= i``.
    """

    window: int
    form: ClassVar[str] = "local"
    syntax: ClassVar[str] = "local:WINDOW"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(
                f"The window of 'local:{self.window}' must be at least 1.",
                "Give the total number of visible positions, for example local:256.",
            )

    def __str__(self) -> str:
        return f"local:{self.window}"

    def reach(self, causal: bool) -> tuple[int, int]:
        """How many positions before and after the query are visible: ``(left, right)``."""
        return (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)

    def visible(self, query: NDArray[np.int64], key: NDArray[np.int64], causal: bool) -> NDArray[np.bool_]:
        """True where ``key`` may be attended from ``query``, before causality is applied."""
        left, right = self.reach(causal)
        distance = key - query
        return (distance >= -left) & (distance <= right)


Term = Dense | Local


@dataclass(frozen=True)
class Pattern:
    """A union of terms, immutable and hashable; ``str(pattern)`` is its canonical text form.

    Raises:
        UsageError: if there is no term.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise UsageError("A pattern needs at least one term.", "Write, for example, local:256.")

    def __str__(self) -> str:
        return "|".join(str(term) for term in self.terms)

    def __or__(self, other: Pattern) -> Pattern:
        return _canonical((*self.terms, *other.terms))

    @property
    def is_dense(self) -> bool:
        """True if every pair is visible."""
        return any(isinstance(term, Dense) for term in self.terms)

    def interval(self, causal: bool) -> tuple[int, int] | None:
        """``(left, right)`` if exactly the keys ``i - left <= j <= i + right`` are visible, None if all are."""
        reaches = [term.reach(causal) for term in self.terms]
        if any(reach is None for reach in reaches):
            return None
        return max(reach[0] for reach in reaches if reach), max(reach[1] for reach in reaches if reach)

    def visible(
        self, query: NDArray[np.int64] | int, key: NDArray[np.int64] | int, causal: bool = False
    ) -> NDArray[np.bool_]:
        """True where position ``key`` may be attended from position ``query``; both broadcast."""
        query, key = np.asarray(query, dtype=np.int64), np.asarray(key, dtype=np.int64)
        result = np.zeros(np.broadcast_shapes(query.shape, key.shape), dtype=bool)
        for term in self.terms:
            result |= term.visible(query, key, causal)
        return result & (key <= query) if causal else result

    def mask(self, query_length: int, key_length: int, causal: bool = False) -> NDArray[np.bool_]:
        """The whole ``[query_length, key_length]`` visibility, for references and pictures, never for kernels.

        The queries are the last ``query_length`` of the ``key_length`` positions.
        """
        query = np.arange(key_length - query_length, key_length)[:, None]
        return self.visible(query, np.arange(key_length)[None, :], causal)

    def visible_pairs(self, length: int, causal: bool = False) -> int:
        """Exact number of visible (query, key) pairs of a sequence of ``length`` tokens, O(length) time or better."""
        interval = self.interval(causal)
        if interval is None:
            return length * (length + 1) // 2 if causal else length * length
        query = np.arange(length)
        first, last = np.maximum(query - interval[0], 0), np.minimum(query + interval[1], length - 1)
        return int((last - first + 1).sum())

    def density(self, length: int, causal: bool = False) -> float:
        """Visible pairs as a share of those that dense attention of the same causality computes."""
        return self.visible_pairs(length, causal) / DENSE.visible_pairs(length, causal)


def _canonical(terms: tuple[Term, ...]) -> Pattern:
    """Drop terms that others contain, so that equal unions are written the same way."""
    if any(isinstance(term, Dense) for term in terms):
        return DENSE
    return Pattern((max((t for t in terms if isinstance(t, Local)), key=lambda t: t.window),))


DENSE = Pattern((Dense(),))


def _integer(text: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UsageError(
            f"'{value}' in the pattern '{text}' is not a whole number.", f"Write {FORMS[text.split(':')[0]].syntax}."
        ) from None


def _parse_dense(text: str, arguments: list[str]) -> Term:
    if arguments:
        raise UsageError(f"The pattern '{text}' takes no parameters.", "Write dense.")
    return Dense()


def _parse_local(text: str, arguments: list[str]) -> Term:
    if len(arguments) > 1:
        raise UsageError(f"The pattern '{text}' has too many parameters.", "Write local:WINDOW, for example local:256.")
    return Local(_integer(text, arguments[0]) if arguments else DEFAULT_WINDOW)


@dataclass(frozen=True)
class Form:
    """A kind of term as the user meets it."""

    syntax: str
    parse: Callable[[str, list[str]], Term]
    summary: str


DEFAULT_WINDOW = 256
FORMS: dict[str, Form] = {
    "dense": Form("dense", _parse_dense, "ordinary attention: every key"),
    "local": Form(
        "local:WINDOW", _parse_local, f"sliding window of WINDOW positions in all (default {DEFAULT_WINDOW})"
    ),
}


def parse_pattern(text: str) -> Pattern:
    """Read a pattern from its text form, for example ``local:256``.

    Raises:
        UsageError: on an unknown form (naming the nearest known one) or a parameter out of range.
    """
    terms = []
    for part in text.split("|"):
        name, *arguments = part.strip().split(":")
        form = FORMS.get(name)
        if form is None:
            raise UsageError(f"'{name}' is not an attention pattern.", did_you_mean(name, FORMS))
        terms.append(form.parse(part.strip(), arguments))
    return _canonical(tuple(terms)) if terms else DENSE
