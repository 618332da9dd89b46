"""Position-based attention patterns: which (query i, key j) pairs are visible.

A :class:`Pattern` is a union of terms, written ``local:256`` or, with several terms, ``local:256|sinks:4``. It is the
one definition that the torch reference, the ONNX function body and the native kernels are tested against. Causality
and padding restrict a pattern from outside; they are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm, Cost
from effc.plugins.forms.terms import Dense, Global, GlobalTokens, Local, Scope, Sinks, Term
from effc.plugins.pattern_pairs import visible_keys


@dataclass(frozen=True)
class Pattern(AttentionForm):
    """A union of terms.

    Its operator's extra inputs: ``marks [batch, key_length]`` bool (for ``global:TOKEN``), ``distance_bias
    [heads, 2 * r + 1]`` added to the scores at distances -r ... r and, beyond, as at the nearer end (T5), and
    ``distance_slope [heads]``, times the distance ``j - i`` (ALiBi).

    Raises:
        UsageError: if there is no term.
    """

    terms: tuple[Term, ...]
    op_type: ClassVar[str] = "SparseAttention"
    extra_inputs: ClassVar[tuple[str, ...]] = ("marks", "distance_bias", "distance_slope")

    def __post_init__(self) -> None:
        if not self.terms:
            raise UsageError("A pattern needs at least one term.", "Write, for example, local:256.")

    def __str__(self) -> str:
        return "|".join(str(term) for term in self.terms)

    def __or__(self, other: Pattern) -> Pattern:
        return union((*self.terms, *other.terms))

    @property
    def is_dense(self) -> bool:
        """True if every pair is visible."""
        return any(isinstance(term, Dense) for term in self.terms)

    @property
    def tokens(self) -> tuple[int | str, ...]:
        """The token ids or names whose positions are global."""
        return next((term.tokens for term in self.terms if isinstance(term, GlobalTokens)), ())

    def interval(self, causal: bool) -> tuple[int, int] | None:
        """``(left, right)`` if exactly the keys ``i - left <= j <= i + right`` are visible, None otherwise."""
        if len(self.terms) == 1 and isinstance(self.terms[0], Local):
            return self.terms[0].reach(causal)
        return None

    def visible(
        self,
        query: NDArray[np.int64] | int,
        key: NDArray[np.int64] | int,
        causal: bool = False,
        length: int | None = None,
        marks: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.bool_]:
        """True where position ``key`` may be attended from position ``query``; both broadcast.

        Args:
            length: number of keys, which ``random`` draws from; one more than the largest position if None.
            marks: ``[..., length]`` where the tokens of ``global:TOKEN`` stand; adds its leading axes to the result.
        """
        query, key = np.asarray(query, dtype=np.int64), np.asarray(key, dtype=np.int64)
        if length is None:
            length = int(max(query.max(initial=0), key.max(initial=0))) + 1
        scope = Scope(length, causal, marks)
        result = np.zeros(np.broadcast_shapes(query.shape, key.shape), dtype=bool)
        for term in self.terms:
            result = result | term.visible(query, key, scope)
        return result & (key <= query) if causal else result

    def mask(
        self, query_length: int, key_length: int, causal: bool = False, marks: NDArray[np.bool_] | None = None
    ) -> NDArray[np.bool_]:
        """The whole ``[..., query_length, key_length]`` visibility, for references and pictures, never for kernels.

        The queries are the last ``query_length`` of the ``key_length`` positions.
        """
        query = np.arange(key_length - query_length, key_length)[:, None]
        return self.visible(query, np.arange(key_length)[None, :], causal, key_length, marks)

    def visible_pairs(self, length: int, causal: bool = False) -> int:
        """Exact number of visible (query, key) pairs of a sequence of ``length`` tokens, in O(length) time and memory.

        Tokens that ``global:TOKEN`` names are not counted: the input decides how many there are.
        """
        if self.is_dense:
            return length * (length + 1) // 2 if causal else length * length
        return int(visible_keys(self.terms, length, causal).sum())

    def density(self, length: int, causal: bool = False) -> float:
        """Visible pairs as a share of those that dense attention of the same causality computes."""
        return self.visible_pairs(length, causal) / DENSE.visible_pairs(length, causal)

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Two matrix products over the visible pairs; scratch is one row block's scores."""
        pairs = self.visible_pairs(length, causal)
        return Cost(4 * pairs * head_dim, 64 * min(length, -(-pairs // max(length, 1)) + 64))

    def picture(self, length: int, causal: bool) -> NDArray[np.float64]:
        """One where a pair is visible."""
        return self.mask(length, length, causal).astype(np.float64)


def union(terms: tuple[Term, ...]) -> Pattern:
    """The pattern of several terms, written one way only: no term that another contains, in a fixed order."""
    if any(isinstance(term, Dense) for term in terms):
        return DENSE
    kept = [
        term
        for number, term in enumerate(terms)
        if term not in terms[:number] and not any(_contains(other, term) for other in terms if other != term)
    ]
    named = [term for term in kept if isinstance(term, GlobalTokens)]
    if len(named) > 1:
        tokens = sorted({token for term in named for token in term.tokens}, key=str)
        kept = [*(term for term in kept if term not in named), GlobalTokens(tuple(tokens))]
    return Pattern(tuple(sorted(kept, key=lambda term: (term.rank, str(term)))))


def _contains(outer: Term, inner: Term) -> bool:
    """Whether every pair of ``inner`` is one of ``outer``, in either direction."""
    if isinstance(outer, Local) and isinstance(inner, Local):
        return all(
            o >= i for causal in (False, True) for o, i in zip(outer.reach(causal), inner.reach(causal), strict=True)
        ) and (outer.reach(False), outer.reach(True)) != (inner.reach(False), inner.reach(True))
    if isinstance(outer, Global) and isinstance(inner, (Global, Sinks)):
        return outer.count >= inner.count
    return isinstance(outer, Sinks) and isinstance(inner, Sinks) and outer.count > inner.count


DENSE = Pattern((Dense(),))
