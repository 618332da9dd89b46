"""Several texts in progress at once on prefill and decode engines, each with a length of its own.

The caches of texts that run together lie in one tensor for each layer's keys and one for its values, ``[rows,
positions, kv_heads * head_dim]``, as the engine took and gave them: the outputs of one step are the inputs of the next.
Where texts differ in length, the shorter ones have padding in front, which the key mask hides. They are laid out anew,
on the device, when one joins or leaves. Where padding would move what a pattern counts from the beginning, only texts
of one length share a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.engine_records import longest_text, most_rows
from effc.compiler.engine_runner import EngineRunner
from effc.compiler.rows import Rows

_MASK, _PAST, _PRESENT = "attention_mask", "past_", "present_"
# Of linear attention; nothing in them is a position.
_STATES = ("past_state.", "past_normaliser.")


@dataclass
class _Caches:
    """What a run handed out, by the names of the decode engine's inputs: ``[rows, positions, width]``, or a state.

    What has a row for each block of positions is shared by texts of one length only, and so laid out like the others.

    Attributes:
        count: rows.
    """

    tensors: dict[str, Any]
    count: int


@dataclass(eq=False)
class _Text:
    """One text: how many of its tokens were run, and which row of which caches is its own, at the end of the row."""

    length: int
    caches: _Caches
    place: int


class EngineRows(Rows):
    """Texts on the engines of one GPU.

    Args:
        runner: holds the engines ``prefill`` and ``decode``.
        pads: texts of different lengths may share a run, see :class:`effc.compiler.engine_records.Engines`.
    """

    def __init__(self, runner: EngineRunner, capacity: int, pads: bool):
        prefill, self._decode = runner.graphs["prefill"], runner.graphs["decode"]
        super().__init__(capacity, min(longest_text(prefill), longest_text(self._decode)))
        self._runner, self._pads = runner, pads
        self._dtypes = {tensor.name: tensor.dtype for tensor in runner.inputs("decode")}
        self._texts: list[_Text] = []
        self.runs = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Rows`.

        Raises:
            UsageError: if no profile takes the prompt.
            EffcError: if TensorRT does not take the work.
        """
        self._runner.device.activate()
        length = len(tokens)
        column = np.asarray(tokens, np.int64)[None]
        outputs = self._runner.run("prefill", _feeds(column, np.ones_like(column), np.arange(length)[None]))
        self._texts.append(_Text(length, _handed_out(outputs, 1), 0))
        logits: NDArray[np.float32] = self._logits(outputs)[0]
        return logits

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`Rows`.

        Raises:
            EffcError: if TensorRT does not take the work.
        """
        self._runner.device.activate()
        found: list[NDArray[np.float32] | None] = [None] * len(self)
        for group in self._groups():
            texts = [self._texts[row] for row in group]
            outputs = self._run(texts, np.array([[tokens[row]] for row in group], np.int64))
            for row, logits in zip(group, self._logits(outputs), strict=True):
                found[row] = logits
        return np.stack([logits for logits in found if logits is not None])

    def remove(self, row: int) -> None:
        """See :class:`Rows`."""
        last = self._texts.pop()
        if row < len(self._texts):
            self._texts[row] = last

    def _run(self, texts: list[_Text], tokens: NDArray[np.int64]) -> dict[str, Any]:
        """Run one more token of each of some texts, ``[texts, 1]``, and keep what is handed out."""
        past = self._gather(texts)
        lengths = np.array([[text.length] for text in texts])
        most = int(lengths.max())
        mask = np.arange(most + 1) >= most - lengths
        outputs = self._runner.run("decode", _feeds(tokens, mask.astype(np.int64), lengths) | past)
        kept = _handed_out(outputs, len(texts))
        for place, text in enumerate(texts):
            text.caches, text.place = kept, place
            text.length += 1
        self.runs += 1
        return outputs

    def _groups(self) -> list[list[int]]:
        """Rows that share a run: as many as an engine's profile takes of their length, the shortest first."""
        groups: list[list[int]] = []
        for row in sorted(range(len(self)), key=lambda row: self._texts[row].length):
            length = self._texts[row].length
            if groups:
                group = groups[-1]
                alike = self._pads or self._texts[group[0]].length == length
                if alike and len(group) < most_rows(self._decode, length + 1):
                    group.append(row)
                    continue
            groups.append([row])
        return groups

    def _gather(self, texts: list[_Text]) -> dict[str, Any]:
        """The caches of some texts behind each other; those of the last run themselves where they are just these."""
        first = texts[0].caches
        places = [text.place for text in texts]
        if all(text.caches is first for text in texts) and places == list(range(first.count)):
            return first.tensors
        # Its row has no padding beyond its own length, where the others of its last run have not left.
        longest = max(texts, key=lambda text: text.length)
        return {
            name: self._lay_out(
                name,
                texts,
                tensor.shape[1]
                if name.startswith(_STATES)
                else min(longest.caches.tensors[name].shape[1], longest.length),
            )
            for name, tensor in first.tensors.items()
        }

    def _lay_out(self, name: str, texts: list[_Text], length: int) -> Any:
        """The last ``length`` positions of each text, what it has not being zeros; ``[texts, length, width]``.

        A state has heads in the place of positions, and is taken whole.
        """
        device = self._runner.device
        sizes = texts[0].caches.tensors[name].shape[2:]
        made = device.zeros((len(texts), length, *sizes), self._dtypes[name])
        for begin, end in _blocks(texts):
            source, place = texts[begin].caches.tensors[name], texts[begin].place
            kept = min(length, source.shape[1])
            device.copy(
                made[begin:end, length - kept :],
                source[place : place + end - begin, source.shape[1] - kept :],
            )
        return made

    def _logits(self, outputs: dict[str, Any]) -> NDArray[np.float32]:
        """Of the last position, ``[rows, vocabulary]``."""
        return np.asarray(self._runner.numpy(outputs["logits"])[:, -1], dtype=np.float32)


def _blocks(texts: list[_Text]) -> list[tuple[int, int]]:
    """Ranges of texts that lie behind each other already, so that one copy moves them."""
    starts = [
        number
        for number, text in enumerate(texts)
        if number == 0 or text.caches is not texts[number - 1].caches or text.place != texts[number - 1].place + 1
    ]
    return list(zip(starts, [*starts[1:], len(texts)], strict=True))


def _handed_out(outputs: dict[str, Any], count: int) -> _Caches:
    tensors = {
        _PAST + name.removeprefix(_PRESENT): value for name, value in outputs.items() if name.startswith(_PRESENT)
    }
    return _Caches(tensors, count)


def _feeds(tokens: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]) -> dict[str, Any]:
    return {"input_ids": tokens, _MASK: mask, "position_ids": positions}
