"""Keys and values in slots, for the layers of one group: arrays that grow as texts do. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effc.plugins.caches import SlotCache, slot_arrays
from effc.plugins.forms.registry import parse_pattern

if TYPE_CHECKING:
    from effc.compiler.manifest import CachedLayerRecord, CacheGroupRecord

Array = NDArray[Any]
# Caches without a bound grow by this many slots: rarely enough for the copy, and few enough to be read for nothing.
GROWTH = 256


class SlotArrays:
    """Arrays ``[rows, kv_heads, capacity, width]``; see :class:`SlotCache`.

    Args:
        group: what its layers keep.
        layers: with their numbers in the graph.
        rows: texts.

    Attributes:
        cache: says which slot holds which position.
        arrays: by the names of the graph's inputs; replaced where they grow.
        capacity: slots that there is room for.
    """

    def __init__(self, group: CacheGroupRecord, layers: Sequence[tuple[int, CachedLayerRecord]], rows: int):
        self.cache = SlotCache(group.sinks, group.recent)
        self.pattern = parse_pattern(group.pattern)
        self._marked = np.array([token for token in self.pattern.tokens if isinstance(token, int)], dtype=np.int64)
        self.capacity = 0
        self.arrays: dict[str, Array] = {
            f"past_{what}.{number}": np.zeros((rows, layer.kv_heads, 0, width), kind)
            for number, layer in layers
            for what, (width, kind) in slot_arrays(layer.head_dim, layer.kept_in).items()
        }

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        if slots <= self.capacity:
            return
        capacity = -(-slots // GROWTH) * GROWTH
        if self.cache.bound is not None:
            capacity = min(capacity, self.cache.bound)
        for name, array in self.arrays.items():
            grown = np.zeros((*array.shape[:2], capacity, array.shape[3]), array.dtype)
            grown[:, :, : self.capacity] = array
            self.arrays[name] = grown
        self.capacity = capacity

    def marks(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Where the tokens of ``global:TOKEN`` stand, in the shape of ``tokens``; None where the pattern has none."""
        return np.isin(tokens, self._marked) if len(self._marked) else None
