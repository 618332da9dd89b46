"""Take one token again and again against caches of a given length, for measuring. numpy and ONNX Runtime only.

Caches are filled with noise: a step takes as long whatever they hold, and no prompt has to run first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.generation import Generator, example_step
from effc.compiler.generation_memory import Memory
from effc.compiler.generation_records import Generation
from effc.plugins.caches import ALL_KEYS, LAST_KEYS

_NUMBERS = ("input_ids", "attention_mask", "position_ids", LAST_KEYS, ALL_KEYS)
_KINDS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}


class Steps(Protocol):
    """One model that writes."""

    def prepare(self, context: int) -> None:
        """Have ``context`` tokens in the caches."""
        ...

    def run(self) -> None:
        """Take the next token of every text."""
        ...


class CompiledSteps:
    """A generating graph of effc, with all that ``generate()`` does for a token but choosing it.

    Args:
        record: what ``effc.json`` says of it.
        batch: texts that are written at once.
    """

    def __init__(self, session: onnxruntime.InferenceSession, record: Mapping[str, Any], batch: int):
        generation: Any = Generation.from_json(record)
        self._generator = Generator(session, generation, None)
        self._tokens = np.zeros(batch, np.int64)

    def prepare(self, context: int) -> None:
        """See :class:`Steps`."""
        shape = (len(self._tokens), context)
        self._context = context
        self._memory = Memory(self._generator.record, np.zeros(shape, np.int64), np.ones(shape, dtype=bool))
        self._memory.fill_with_noise(seed=context)

    def run(self) -> None:
        """See :class:`Steps`."""
        self._memory.rewind(self._context)
        self._generator.step(self._memory, self._tokens)


class SharedCacheSteps:
    """A graph of :mod:`effc.exporters.decode_twin`; new keys and values are written where the old ones lie."""

    def __init__(self, session: onnxruntime.InferenceSession, batch: int):
        self._session, self._batch = session, batch

    def prepare(self, context: int) -> None:
        """See :class:`Steps`."""
        self.reserve(context + 1, np.random.default_rng(context).standard_normal)
        self.place(np.zeros(self._batch, np.int64), context)

    def reserve(self, capacity: int, fill: Any) -> None:
        """Make caches for ``capacity`` tokens, of what ``fill(size=..., dtype=...)`` gives."""
        self._binding = self._session.io_binding()
        for argument in self._session.get_inputs():
            if argument.name not in _NUMBERS:
                _, heads, _, width = argument.shape
                array = fill(size=(self._batch, heads, capacity, width), dtype=np.float32)
                shared = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                self._binding.bind_ortvalue_input(argument.name, shared)
                self._binding.bind_ortvalue_output(argument.name.replace("past_", "present_", 1), shared)
        self._binding.bind_output("logits")

    def place(self, tokens: NDArray[np.int64], context: int) -> None:
        """Let ``run`` take ``tokens [batch]`` behind ``context`` others."""
        numbers = {
            "input_ids": tokens[:, None],
            "attention_mask": np.ones((self._batch, 1)),
            "position_ids": np.full((self._batch, 1), context),
            LAST_KEYS: np.full(self._batch, context),
            ALL_KEYS: np.array(context + 1),
        }
        for argument in self._session.get_inputs():
            if argument.name in _NUMBERS:
                array = numbers[argument.name].astype(_KINDS[argument.type])
                self._binding.bind_ortvalue_input(argument.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

    def run(self) -> None:
        """See :class:`Steps`."""
        self._session.run_with_iobinding(self._binding)

    def logits(self) -> NDArray[np.float32]:
        """Of the last step, ``[batch, 1, vocabulary]``."""
        # In the order in which they were bound.
        found: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()
        return found


def feeds_of_step(record: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Feeds of effc's generating graph for one token, from what ``effc.json`` says of it."""
    generation: Any = Generation.from_json(record)
    return example_step(generation)
