"""Hierarchical attention: exact nearby, means of blocks farther away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm, Cost, parameters
from effc.plugins.forms.entry import FormEntry

FANOUT = 4
"""Blocks of one level that make one block of the next."""
_DEFAULTS = (64, 2)


@dataclass(frozen=True)
class Hierarchical(AttentionForm):
    """Softmax attention over keys nearby and over means of key blocks farther away.

    Level 0 are the keys themselves; a block of level l >= 1 holds ``size(l) = block * FANOUT ** (l - 1)`` keys. A query
    sees the keys of its own and both neighbouring blocks of level 1 exactly. Of every other key it sees the block of
    one level: the lowest level whose parents still neighbour the query's own parent, the topmost level at last. These
    are the near field and the interaction lists of the fast multipole method (Greengard and Rokhlin, 1987), as
    H-Transformer-1D (Zhu and Soricut, 2021) brought them to attention. Every key is counted exactly once.

    A block b with the visible keys J_b enters the softmax as one key ``mean(k_j)`` with the value ``mean(v_j)`` and the
    score ``q . mean(k_j) * scale + log |J_b|``. That is what the log-sum-exp merge of the block's own attention gives
    where the block's keys are equal, so the form is exact there; it is exact for any keys within two blocks. Unlike
    H-Transformer-1D, queries are not coarsened: a row's far field has the full resolution of its query.

    A block without visible key contributes nothing. Causal rows see only blocks that end before their own begins.

    With two levels a row costs ``3 * block + length / block`` scores, O(length ** 1.5) in all where ``block`` is near
    ``sqrt(length / 3)``; every further level divides the second term by ``FANOUT``.

    Raises:
        UsageError: with fewer than two levels, or blocks of the topmost level of more than 2 ** 40 keys.
    """

    block: int
    levels: int
    op_type: ClassVar[str] = "HierarchicalAttention"

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise UsageError(f"'{self}' needs at least two levels.", "Write, for example, hierarchical:64:2.")
        if self.levels > 40 or self.size(self.levels - 1) > 2**40:
            raise UsageError(
                f"'{self}' has more levels than any sequence needs.", "Write, for example, hierarchical:64:3."
            )

    def __str__(self) -> str:
        return f"hierarchical:{self.block}:{self.levels}"

    def size(self, level: int) -> int:
        """Keys in one block of ``level`` (from 1)."""
        return self.block * int(FANOUT ** (level - 1))

    def sees(
        self, level: int, query_block: NDArray[np.int64], node: NDArray[np.int64], causal: bool
    ) -> NDArray[np.bool_]:
        """Whether queries in a block of level 1 see a block of ``level`` as one mean; both broadcast."""
        own = query_block // FANOUT ** (level - 1)
        result = np.abs(own - node) > 1
        if level < self.levels - 1:
            result = result & (np.abs(own // FANOUT - node // FANOUT) <= 1)
        return np.asarray(result & (node < own) if causal else result, dtype=bool)

    def level_of(self, length: int, causal: bool) -> NDArray[np.int64]:
        """``[length, length]``: the level at which each query sees each key, -1 where it does not."""
        position = np.arange(length)
        query, key = position[:, None], position[None, :]
        result = np.full((length, length), -1)
        near = np.abs(query // self.block - key // self.block) <= 1
        result[near & (key <= query) if causal else near] = 0
        for level in range(1, self.levels):
            result[self.sees(level, query // self.block, key // self.size(level), causal)] = level
        return result

    def scores(self, length: int, causal: bool) -> int:
        """Exact number of scores: visible pairs of the near field and means seen, over all rows."""
        position = np.arange(length)
        own = position // self.block
        first = np.maximum(own - 1, 0) * self.block
        end = position + 1 if causal else np.minimum((own + 2) * self.block, length)
        total = int((end - first).sum())
        rows = np.bincount(own)
        for level in range(1, self.levels):
            nodes = np.arange(-(-length // self.size(level)))[None, :]
            for start in range(0, len(rows), 512):
                blocks = np.arange(start, min(start + 512, len(rows)))
                total += int((self.sees(level, blocks[:, None], nodes, causal).sum(axis=1) * rows[blocks]).sum())
        return total

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Two matrix products over the scores, and the means of keys and values."""
        scores = self.scores(length, causal)
        return Cost(4 * (scores + length) * head_dim, self.block * (3 * self.block + -(-length // self.block)))

    def picture(self, length: int, causal: bool) -> NDArray[np.float64]:
        """One where a pair is exact, one over the number of keys where a mean stands for them."""
        levels = self.level_of(length, causal)
        result: NDArray[np.float64] = (levels == 0).astype(np.float64)
        for level in range(1, self.levels):
            start = np.arange(length) // self.size(level) * self.size(level)
            count = np.minimum(start + self.size(level), length) - start
            result += (levels == level) / count[None, :]
        return result


def _parse(text: str, arguments: list[str], syntax: str) -> Hierarchical:
    block, levels = parameters(text, arguments, syntax, _DEFAULTS)
    return Hierarchical(block, levels)


HIERARCHICAL_FORMS: dict[str, FormEntry] = {
    "hierarchical": FormEntry(
        "hierarchical[:BLOCK[:LEVELS]]",
        f"exact within blocks of BLOCK tokens ({_DEFAULTS[0]}) and their neighbours, means of blocks beyond, which "
        f"grow {FANOUT}-fold with each further of LEVELS levels ({_DEFAULTS[1]})",
        "hierarchical and chunked",
        _parse,
        "H-Transformer-1D, Zhu and Soricut, 2021",
    ),
}
