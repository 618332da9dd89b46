"""What each attention form has to remember of the past while a causal model writes token by token.

A form decides which earlier positions a new query may still see, and with that which keys and values have to stay:

* :class:`SlotCache`: position-based patterns. A pattern that looks back a bounded way (``local``, ``sinks``, ``block``,
  ``dilated``, ``global`` and their unions) keeps its first ``sinks`` positions and a ring of the last ``recent`` ones
  (StreamingLLM, Xiao et al., 2023), whatever the length of the context. Others keep every position. Softmax does not
  ask for the order of its keys, and keys carry their rotary position already, so the ring is never put in order: a
  mask made from the pattern says which slots the new query sees.
* :class:`OrderedCache`: forms that need keys at their places (content-based, hierarchical). Every position is kept in
  order, and the form's own operator reads them.
* :class:`StateCache`: linear forms. A recurrent state of fixed size takes the place of keys and values (Katharopoulos
  et al., 2020).

Imports numpy only: ``effc.load`` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.content import BlockTopK
from effc.plugins.forms.linear import EMPTY_STABILISER, LinearForm
from effc.plugins.forms.terms import Block, Dense, Dilated, Global, Local, Sinks, Strided, Term
from effc.plugins.pattern import Pattern

CACHED_ATTENTION = "CachedAttention"
"""The operator of one new token and slots."""
CACHE_TYPES = ("fp32", "fp16", "int8")
"""What keys and values in slots are kept in. ``int8`` has a scale for each position and head."""

LAST_KEYS = "seqlens_k"
"""Input of ONNX Runtime's own attention, ``[batch]`` int32: keys of each text, the new token included, less one."""
ALL_KEYS = "total_sequence_length"
"""Its other one, int32: keys of the longest text, the new token included."""


def slot_arrays(head_dim: int, kept_in: str) -> dict[str, tuple[int, np.dtype[Any]]]:
    """Width and type of what is kept of one position and key/value head, by the names of a graph's inputs.

    Args:
        head_dim: of the layer.
        kept_in: one of :data:`CACHE_TYPES`.
    """
    kind = np.dtype({"fp32": np.float32, "fp16": np.float16, "int8": np.int8}[kept_in])
    arrays = {what: (head_dim, kind) for what in ("key", "value")}
    if kept_in == "int8":
        arrays |= {f"{what}_scale": (1, np.dtype(np.float32)) for what in ("key", "value")}
    return arrays


@dataclass(frozen=True)
class SlotCache:
    """Slots for the first ``sinks`` positions, then a ring of ``recent`` slots, or one slot per position if None.

    Position ``p`` lies in slot ``p`` below ``sinks``, else in ``sinks + (p - sinks) % recent``.
    """

    sinks: int = 0
    recent: int | None = None

    @property
    def bound(self) -> int | None:
        """Most slots that are ever used, or None."""
        return None if self.recent is None else self.sinks + self.recent

    def slots(self, length: int) -> int:
        """How many slots ``length`` positions fill."""
        return length if self.bound is None else min(length, self.bound)

    def slot(self, position: int) -> int:
        """Where a position is kept."""
        if self.recent is None or position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.recent

    def positions(self, length: int) -> NDArray[np.int64]:
        """``[slots(length)]``: the position that each slot holds once ``length`` positions were written."""
        if self.recent is None or length <= self.sinks + self.recent:
            return np.arange(length)
        ring = np.arange(self.recent)
        newest = (length - 1 - self.sinks) % self.recent
        return np.concatenate([np.arange(self.sinks), length - 1 - (newest - ring) % self.recent])


@dataclass(frozen=True)
class OrderedCache:
    """Every key and value at its place.

    Attributes:
        queries: how many of the last queries, the new one included, the operator must be given for the new one's row
            to be what it is in a whole sequence.
    """

    queries: int = 1


@dataclass(frozen=True)
class StateCache:
    """A recurrent state of tensors ``[batch, *shape]`` by name, in the order of the operator's inputs.

    Attributes:
        shapes: without the batch.
        initial: the value each starts from.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    initial: tuple[float, ...]


Cache: TypeAlias = SlotCache | OrderedCache | StateCache


@singledispatch
def cache_of(form: AttentionForm, kv_heads: int, head_dim: int) -> Cache:
    """What a causal layer of this form keeps."""
    return OrderedCache()


@cache_of.register
def _(form: Pattern, kv_heads: int, head_dim: int) -> Cache:
    sinks = max((term.count for term in form.terms if isinstance(term, (Sinks, Global))), default=0)
    reaches = [_reach(term) for term in form.terms]
    if None in reaches:
        return SlotCache()
    # One slot at least: graphs take no empty caches.
    return SlotCache(sinks, max(1, *(reach or 0 for reach in reaches)))


@cache_of.register
def _(form: BlockTopK, kv_heads: int, head_dim: int) -> Cache:
    # The queries from which a block of queries chooses its keys: those of the block that ends with its first one.
    return OrderedCache(queries=2 * form.block)


@cache_of.register
def _(form: LinearForm, kv_heads: int, head_dim: int) -> Cache:
    shapes = form.state_shapes(kv_heads, head_dim)
    return StateCache(tuple(shapes.items()), tuple(_initial(name) for name in shapes))


def _initial(name: str) -> float:
    return EMPTY_STABILISER if name == "stabiliser" else 0.0


def _reach(term: Term) -> int | None:
    """How far behind a query its farthest visible key lies, leaving out the first keys that all see; None: no bound."""
    match term:
        case Local():
            return term.reach(causal=True)[0]
        case Dilated():
            return term.reach(causal=True)[0] * term.dilation
        case Block():
            return (term.neighbours + 1) * term.block - 1
        case Sinks() | Global():
            # The first tokens, which see all that lies before them, see nothing but first tokens.
            return 0
        case _:
            return None


def visible_slots(
    pattern: Pattern, position: int, positions: NDArray[np.int64], marks: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Which of some positions the query at ``position`` sees: ``[count]``, or ``[batch, count]`` with marks.

    Args:
        marks: ``[batch, position + 1]``: where the tokens stand that ``global:TOKEN`` names.
    """
    return pattern.visible(np.array([position]), positions, causal=True, length=position + 1, marks=marks)


def sees_itself(pattern: Pattern) -> bool:
    """Whether a query always sees its own key, so that no row can be empty."""
    return any(isinstance(term, (Dense, Local, Dilated, Block, Strided)) for term in pattern.terms)
