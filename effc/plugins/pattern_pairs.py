"""Exact number of keys that each query of a pattern sees, in time and memory O(length * terms).

In every row, most terms show a few intervals of keys; ``strided`` and wide ``dilated`` terms show progressions through
the query. Intervals are merged by sorting, progressions counted by inclusion and exclusion: the keys that several
progressions share are again a progression, through the query with the least common multiple of their steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from effc.plugins.forms.terms import (
    RANDOM_BLOCK,
    Block,
    Dense,
    Dilated,
    Global,
    GlobalTokens,
    Local,
    Positions,
    Random,
    Scope,
    Sinks,
    Strided,
    Term,
)

# Rows that are counted at once.
_ROWS = 1 << 16
# Intervals and ends of progressions in every row: first and last key, inclusive.
_Interval = tuple[Positions, Positions]


def visible_keys(terms: Sequence[Term], length: int, causal: bool) -> NDArray[np.int64]:
    """How many keys each of ``length`` queries sees; tokens that ``global:TOKEN`` names are not counted."""
    rows = (np.arange(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS))
    return np.concatenate([np.zeros(0, dtype=np.int64), *(_count(terms, query, length, causal) for query in rows)])


def _count(terms: Sequence[Term], query: Positions, length: int, causal: bool) -> NDArray[np.int64]:
    scope = Scope(length, causal)
    intervals = [interval for term in terms for interval in _intervals(term, query, scope)]
    last = query if causal else np.full_like(query, length - 1)
    merged = _merge([(np.maximum(low, 0), np.minimum(high, last)) for low, high in intervals])
    total = np.zeros_like(query)
    for low, high in merged:
        total += np.maximum(high - low + 1, 0)
    progressions = [
        (step, np.maximum(low, 0), np.minimum(high, last))
        for step, low, high in (
            _progression(term, query, scope) for term in terms if isinstance(term, (Strided, Dilated))
        )
    ]
    for size in range(1, len(progressions) + 1):
        for chosen in combinations(progressions, size):
            step = math.lcm(*(one[0] for one in chosen))
            low, high = np.max([one[1] for one in chosen], axis=0), np.min([one[2] for one in chosen], axis=0)
            new = _multiples(query, step, low, high)
            for first, end in merged:
                new -= _multiples(query, step, np.maximum(low, first), np.minimum(high, end))
            total += new if size % 2 else -new
    return total


def _intervals(term: Term, query: Positions, scope: Scope) -> list[_Interval]:
    """What a term shows of all positions as intervals; progressions are none."""
    everything = np.zeros_like(query), np.full_like(query, scope.length - 1)
    match term:
        case Dense():
            return [everything]
        case Local():
            left, right = term.reach(scope.causal)
            return [(query - left, query + right)]
        case Block():
            own = query // term.block
            return [((own - term.neighbours) * term.block, (own + term.neighbours + 1) * term.block - 1)]
        case Random():
            drawn = (term.draw(query // RANDOM_BLOCK, number, scope) for number in range(term.count))
            return [(block * RANDOM_BLOCK, (block + 1) * RANDOM_BLOCK - 1) for block in drawn]
        case Sinks():
            return [(np.zeros_like(query), np.full_like(query, term.count - 1))]
        case Global():
            return [(np.zeros_like(query), np.where(query < term.count, scope.length, term.count) - 1)]
        case Dilated() | Strided() | GlobalTokens():
            return []


def _progression(term: Strided | Dilated, query: Positions, scope: Scope) -> tuple[int, Positions, Positions]:
    """Step, first and last position; all of them are a multiple of the step away from the query."""
    if isinstance(term, Strided):
        return term.stride, np.zeros_like(query), np.full_like(query, scope.length - 1)
    left, right = term.reach(scope.causal)
    return term.dilation, query - left * term.dilation, query + right * term.dilation


def _merge(intervals: list[_Interval]) -> list[_Interval]:
    """The same positions as disjoint intervals, in every row; empty ones have their first key behind their last."""
    if not intervals:
        return []
    low, high = np.stack([one[0] for one in intervals]), np.stack([one[1] for one in intervals])
    # An empty interval must not end those before it.
    low = np.where(low <= high, low, np.iinfo(np.int64).max // 2)
    order = np.argsort(low, axis=0)
    low, high = np.take_along_axis(low, order, axis=0), np.take_along_axis(high, order, axis=0)
    reached = np.maximum.accumulate(high, axis=0)
    return [
        (low[row] if row == 0 else np.maximum(low[row], reached[row - 1] + 1), high[row])
        for row in range(len(intervals))
    ]


def _multiples(query: Positions, step: int, low: Positions, high: Positions) -> NDArray[np.int64]:
    """How many of ``low ... high`` are a multiple of ``step`` away from ``query``."""
    return np.where(low <= high, (high - query) // step - (low - 1 - query) // step, 0)
