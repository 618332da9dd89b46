"""What one run of ``generate`` remembers of its text: the caches of all layers, as numpy arrays. numpy only.

Arrays are handed to ONNX Runtime in place, so a step copies the new token's keys and values and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from effc.compiler.generation_slots import Array, SlotArrays
from effc.plugins.caches import slot_arrays, visible_slots

if TYPE_CHECKING:
    from effc.compiler.manifest import CachedLayerRecord, CacheGroupRecord, GenerationRecord

HIDDEN = np.float32(-1e30)
Feeds = dict[str, NDArray[np.generic]]
Mask = NDArray[np.bool_]


class Memory:
    """The caches of a batch.

    Args:
        record: what the graph's layers keep.
        tokens: ``[batch, length]``, the prompt, padded on the left.
        mask: ``[batch, length]``, False for padding.
    """

    def __init__(self, record: GenerationRecord, tokens: NDArray[np.int64], mask: Mask):
        numbered = list(enumerate(record.layers))
        self._parts: list[_Part] = []
        for group, entry in enumerate(record.groups):
            layers = [(number, layer) for number, layer in numbered if layer.group == group]
            self._parts.append(_PARTS[entry.kind](group, entry, layers, len(tokens)))
        self.tokens, self.mask = tokens, mask

    @property
    def nbytes(self) -> int:
        """Bytes that all caches hold."""
        return sum(part.nbytes for part in self._parts)

    def arrays(self) -> dict[str, Array]:
        """All caches by the names of the graph's inputs, ``[batch, ...]``; those of slots may have room to spare."""
        return {name: array for part in self._parts for name, array in part.arrays.items()}

    def prompt_feeds(self) -> Feeds:
        """The caches' inputs of a run over the whole prompt."""
        return self._feeds([part.prompt_feeds(self.tokens.shape[1]) for part in self._parts])

    def keep_prompt(self, outputs: Mapping[str, Array]) -> None:
        """Keep what the run over the prompt has handed out."""
        for part in self._parts:
            part.keep_prompt(outputs, self.tokens.shape[1])

    def fill_with_noise(self, seed: int) -> None:
        """Fill the caches as if the prompt had run, for measuring what a step costs."""
        generator = np.random.default_rng(seed)
        for part in self._parts:
            part.fill_with_noise(generator, self.tokens.shape[1])

    def rewind(self, length: int) -> None:
        """Forget the tokens behind the first ``length``, for measuring: changes in a ring or a state stays."""
        self.tokens, self.mask = self.tokens[:, :length], self.mask[:, :length]
        for part in self._parts:
            part.rewind(length)

    def step_feeds(self, tokens: NDArray[np.int64]) -> Feeds:
        """The caches' inputs of a run over the next token of each sequence, ``[batch]``."""
        self.tokens = np.concatenate([self.tokens, tokens[:, None]], axis=1)
        self.mask = np.concatenate([self.mask, np.ones((len(tokens), 1), dtype=bool)], axis=1)
        return self.last_feeds()

    def last_feeds(self) -> Feeds:
        """The caches' inputs of a run over the last token that was taken in."""
        return self._feeds([part.step_feeds(self.tokens, self.mask) for part in self._parts])

    def keep_step(self, outputs: Mapping[str, Array]) -> None:
        """Keep what the run over one token has handed out."""
        for part in self._parts:
            part.keep_step(outputs, self.tokens.shape[1] - 1)

    def _feeds(self, parts: list[Feeds]) -> Feeds:
        feeds: Feeds = {}
        for part in parts:
            feeds |= part
        if any(isinstance(part, _Ordered) for part in self._parts):
            feeds["whole_mask"] = self.mask
        return feeds


class _Part(ABC):
    """The caches of the layers of one group."""

    def __init__(self, group: int, record: CacheGroupRecord, layers: list[tuple[int, CachedLayerRecord]], batch: int):
        self.group, self.record, self.layers, self.batch = group, record, layers, batch
        self.arrays: dict[str, Array] = {}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @abstractmethod
    def fill_with_noise(self, generator: np.random.Generator, length: int) -> None: ...

    def rewind(self, length: int) -> None:
        """See :meth:`Memory.rewind`."""
        return  # Places are written over.

    @abstractmethod
    def prompt_feeds(self, length: int) -> Feeds: ...

    @abstractmethod
    def keep_prompt(self, outputs: Mapping[str, Array], length: int) -> None: ...

    @abstractmethod
    def step_feeds(self, tokens: NDArray[np.int64], mask: Mask) -> Feeds: ...

    @abstractmethod
    def keep_step(self, outputs: Mapping[str, Array], position: int) -> None: ...


class _Slots(_Part):
    """Keys and values in slots; see :class:`SlotArrays`."""

    def __init__(self, group: int, record: CacheGroupRecord, layers: list[tuple[int, CachedLayerRecord]], batch: int):
        super().__init__(group, record, layers, batch)
        self._slots = SlotArrays(record, layers, batch)
        self._cache, self.arrays = self._slots.cache, self._slots.arrays

    def fill_with_noise(self, generator: np.random.Generator, length: int) -> None:
        self._slots.reserve(self._cache.slots(length))
        for array in self.arrays.values():
            noise = generator.standard_normal(array.shape, dtype=np.float32)
            array[:] = noise if array.dtype.kind == "f" else np.rint(40 * noise).clip(-127, 127)

    def prompt_feeds(self, length: int) -> Feeds:
        # The branch that runs over a prompt reads no cache, but a graph wants its inputs.
        feeds: Feeds = {
            f"past_{what}.{number}": np.zeros((self.batch, layer.kv_heads, 1, width), kind)
            for number, layer in self.layers
            for what, (width, kind) in slot_arrays(layer.head_dim, layer.kept_in).items()
        }
        columns = np.zeros(2, np.int64)
        feeds |= self._group_feeds(np.ones((self.batch, 2), dtype=bool), columns, self._cache.positions(length))
        return feeds

    def keep_prompt(self, outputs: Mapping[str, Array], length: int) -> None:
        filled = self._cache.slots(length)
        self._slots.reserve(filled)
        for number, layer in self.layers:
            for what, (width, _) in slot_arrays(layer.head_dim, layer.kept_in).items():
                handed = outputs[f"new_{what}.{number}"].reshape(self.batch, filled, layer.kv_heads, width)
                self.arrays[f"past_{what}.{number}"][:, :, :filled] = handed.transpose(0, 2, 1, 3)

    def step_feeds(self, tokens: NDArray[np.int64], mask: Mask) -> Feeds:
        position = tokens.shape[1] - 1
        self._slots.reserve(max(1, self._cache.slots(position)))
        held = self._cache.positions(position)
        columns = np.append(held, position)
        visible = visible_slots(self._slots.pattern, position, columns, self._slots.marks(tokens)) & mask[:, columns]
        padded = np.zeros((self.batch, self._slots.capacity + 1), dtype=bool)
        padded[:, : len(held)], padded[:, -1] = visible[:, :-1], visible[:, -1]
        distance = np.zeros(self._slots.capacity + 1, np.int64)
        distance[: len(held)] = held - position
        return self._group_feeds(padded, distance, np.zeros(1, np.int64)) | self.arrays

    def keep_step(self, outputs: Mapping[str, Array], position: int) -> None:
        slot = self._cache.slot(position)
        self._slots.reserve(slot + 1)
        for number, layer in self.layers:
            for what, (width, _) in slot_arrays(layer.head_dim, layer.kept_in).items():
                handed = outputs[f"new_{what}.{number}"].reshape(self.batch, layer.kv_heads, width)
                self.arrays[f"past_{what}.{number}"][:, :, slot] = handed

    def _group_feeds(self, visible: Mask, distance: NDArray[np.int64], kept: NDArray[np.int64]) -> Feeds:
        bias = np.where(visible, np.float32(0), HIDDEN)[:, None, None, :]
        feeds: Feeds = {f"bias.{self.group}": bias}
        if self._cache.bound is not None:
            feeds[f"kept.{self.group}"] = kept
        if self.record.distance:
            feeds[f"distance.{self.group}"] = distance
        return feeds


class _Carried(_Part):
    """Arrays that each run takes as ``past_*`` and gives as ``present_*``."""

    def fill_with_noise(self, generator: np.random.Generator, length: int) -> None:
        for name, array in self.arrays.items():
            self.arrays[name] = generator.random(self._shape(array.shape, length), dtype=np.float32)

    def _shape(self, shape: tuple[int, ...], length: int) -> tuple[int, ...]:
        """The shape of an array after ``length`` tokens, from that of the empty one."""
        return shape

    def prompt_feeds(self, length: int) -> Feeds:
        return dict(self.arrays)

    def keep_prompt(self, outputs: Mapping[str, Array], length: int) -> None:
        self.keep_step(outputs, length)

    def step_feeds(self, tokens: NDArray[np.int64], mask: Mask) -> Feeds:
        return dict(self.arrays)

    def keep_step(self, outputs: Mapping[str, Array], position: int) -> None:
        self.arrays = {name: outputs[name.replace("past_", "present_", 1)] for name in self.arrays}


class _Ordered(_Carried):
    """Arrays ``[batch, length, width]`` in the order of the text."""

    def __init__(self, group: int, record: CacheGroupRecord, layers: list[tuple[int, CachedLayerRecord]], batch: int):
        super().__init__(group, record, layers, batch)
        for number, layer in layers:
            widths = {"key": layer.kv_heads, "value": layer.kv_heads}
            if record.queries > 1:
                widths["query"] = layer.num_heads
            for what, heads in widths.items():
                self.arrays[f"past_{what}.{number}"] = np.zeros((batch, 0, heads * layer.head_dim), np.float32)

    def _shape(self, shape: tuple[int, ...], length: int) -> tuple[int, ...]:
        return shape[0], length, shape[2]

    def rewind(self, length: int) -> None:
        for name, array in self.arrays.items():
            if not name.startswith("past_query."):
                self.arrays[name] = array[:, :length]

    def keep_step(self, outputs: Mapping[str, Array], position: int) -> None:
        super().keep_step(outputs, position)
        for name, array in self.arrays.items():
            if name.startswith("past_query."):
                self.arrays[name] = np.ascontiguousarray(array[:, -(self.record.queries - 1) :])


class _State(_Carried):
    """The state of linear forms."""

    def __init__(self, group: int, record: CacheGroupRecord, layers: list[tuple[int, CachedLayerRecord]], batch: int):
        super().__init__(group, record, layers, batch)
        for number, _ in layers:
            for name, shape in record.state.items():
                initial = np.float32(record.initial[name])
                self.arrays[f"past_{name}.{number}"] = np.full((batch, *shape), initial, dtype=np.float32)


_PARTS: dict[str, type[_Part]] = {"slots": _Slots, "ordered": _Ordered, "state": _State}
