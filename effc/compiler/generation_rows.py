"""Several texts in progress at once, each with a length of its own: what a server steps together. numpy only.

Rows come and go between steps (Orca, Yu et al., 2022). Where every layer keeps slots or a state, one run of the graph
takes the next token of all rows, whatever their lengths: the mask of each row says which of its slots are filled.
Other layers need keys at the places of the text, so there each row is run by itself, in turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from effc.compiler.generation import Generator, Prompt
from effc.compiler.generation_memory import HIDDEN, Feeds, Memory
from effc.compiler.generation_slots import GROWTH, Array, SlotArrays
from effc.compiler.rows import Rows
from effc.plugins.caches import slot_arrays, visible_slots

if TYPE_CHECKING:
    from effc.compiler.manifest import CachedLayerRecord, CacheGroupRecord

Tokens = NDArray[np.int64]


def rows_for(generator: Generator, capacity: int) -> Rows:
    """Room for ``capacity`` texts, stepped together where the graph allows it."""
    alike = all(group.kind != "ordered" and not group.distance for group in generator.record.groups)
    return JointRows(generator, capacity) if alike and capacity > 1 else SeparateRows(generator, capacity)


class SeparateRows(Rows):
    """Each row has caches of its own and is run by itself."""

    def __init__(self, generator: Generator, capacity: int):
        super().__init__(capacity)
        self.generator = generator
        self._memories: list[Memory] = []

    def __len__(self) -> int:
        return len(self._memories)

    def add(self, tokens: Tokens) -> NDArray[np.float32]:
        memory, logits = _prefill(self.generator, tokens)
        self._memories.append(memory)
        return logits

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        steps = [
            self.generator.step(memory, np.array([token], np.int64))
            for memory, token in zip(self._memories, tokens, strict=True)
        ]
        return np.concatenate(steps)

    def remove(self, row: int) -> None:
        last = self._memories.pop()
        if row < len(self._memories):
            self._memories[row] = last


class JointRows(Rows):
    """Rows lie behind each other in the caches, so that those in use are handed to the graph without a copy."""

    def __init__(self, generator: Generator, capacity: int):
        super().__init__(capacity)
        self.generator = generator
        record = generator.record
        numbered = list(enumerate(record.layers))
        self._tokens: list[Tokens] = []
        self._lengths: list[int] = []
        self._groups = [
            _SlotRows(number, group, [entry for entry in numbered if entry[1].group == number], capacity)
            for number, group in enumerate(record.groups)
            if group.kind == "slots"
        ]
        self._states: dict[str, Array] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, tokens: Tokens) -> NDArray[np.float32]:
        memory, logits = _prefill(self.generator, tokens)
        arrays, row = memory.arrays(), len(self)
        for group in self._groups:
            group.take(row, arrays, len(tokens))
        slots = {name for group in self._groups for name in group.arrays}
        for name, array in arrays.items():
            if name not in slots:
                self._states[name] = np.concatenate([self._states[name], array]) if row else array
        self._tokens.append(np.array(tokens))
        self._lengths.append(len(tokens))
        return logits

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        count = len(self)
        for row, token in enumerate(tokens):
            self._append(row, token)
        feeds: Feeds = dict(self._states)
        for group in self._groups:
            feeds |= group.feeds([self._tokens[row][: self._lengths[row]] for row in range(count)])
        column = np.array(tokens, np.int64)[:, None]
        positions = np.array(self._lengths, np.int64)[:, None] - 1
        outputs = self.generator.run(column, np.ones((count, 1), bool), positions, feeds)
        for group in self._groups:
            group.keep(outputs, positions[:, 0])
        for name in self._states:
            self._states[name] = outputs[name.replace("past_", "present_", 1)]
        return np.asarray(outputs["logits"][:, -1], dtype=np.float32)

    def remove(self, row: int) -> None:
        last = len(self) - 1
        for group in self._groups:
            group.move(last, row)
        for name, array in self._states.items():
            array[row] = array[last]
            self._states[name] = np.ascontiguousarray(array[:last])
        self._tokens[row], self._lengths[row] = self._tokens[last], self._lengths[last]
        self._tokens.pop()
        self._lengths.pop()

    def _append(self, row: int, token: int) -> None:
        length = self._lengths[row]
        if length == len(self._tokens[row]):
            self._tokens[row] = np.concatenate([self._tokens[row], np.zeros(max(GROWTH, length), np.int64)])
        self._tokens[row][length] = token
        self._lengths[row] += 1


class _SlotRows:
    """The caches of the layers of one group, a row for each text; see :class:`SlotArrays`."""

    def __init__(
        self, number: int, group: CacheGroupRecord, layers: list[tuple[int, CachedLayerRecord]], capacity: int
    ):
        self._number, self._layers = number, layers
        self._slots = SlotArrays(group, layers, capacity)
        self._cache, self.arrays = self._slots.cache, self._slots.arrays

    def take(self, row: int, arrays: dict[str, Array], length: int) -> None:
        """Copy one text's caches into a row."""
        filled = self._cache.slots(length)
        self._slots.reserve(filled)
        for name, array in self.arrays.items():
            array[row, :, :filled] = arrays[name][0, :, :filled]

    def feeds(self, tokens: Sequence[Tokens]) -> Feeds:
        """The graph's inputs for the last token of each text."""
        self._slots.reserve(max(1, *(self._cache.slots(len(text) - 1) for text in tokens)))
        bias = np.full((len(tokens), 1, 1, self._slots.capacity + 1), HIDDEN, np.float32)
        for row, text in enumerate(tokens):
            position = len(text) - 1
            held = self._cache.positions(position)
            marks = self._slots.marks(text[None])
            visible = visible_slots(self._slots.pattern, position, np.append(held, position), marks).reshape(-1)
            bias[row, 0, 0, : len(held)][visible[:-1]] = 0
            if visible[-1]:
                bias[row, 0, 0, -1] = 0
        feeds: Feeds = {f"bias.{self._number}": bias}
        if self._cache.bound is not None:
            feeds[f"kept.{self._number}"] = np.zeros(1, np.int64)
        return feeds | {name: array[: len(tokens)] for name, array in self.arrays.items()}

    def keep(self, outputs: dict[str, Array], positions: Tokens) -> None:
        """Put each row's new key and value into its slot."""
        slots = [self._cache.slot(int(position)) for position in positions]
        self._slots.reserve(max(slots) + 1)
        for layer, record in self._layers:
            for what, (width, _) in slot_arrays(record.head_dim, record.kept_in).items():
                handed = outputs[f"new_{what}.{layer}"].reshape(len(slots), record.kv_heads, width)
                array = self.arrays[f"past_{what}.{layer}"]
                for row, slot in enumerate(slots):
                    array[row, :, slot] = handed[row]

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        if source != target:
            for array in self.arrays.values():
                array[target] = array[source]


def _prefill(generator: Generator, tokens: Tokens) -> tuple[Memory, NDArray[np.float32]]:
    prompt = Prompt(np.asarray(tokens, np.int64)[None], np.ones((1, len(tokens)), bool))
    memory = Memory(generator.record, prompt.tokens, prompt.mask)
    return memory, generator.prefill(memory)[0]
