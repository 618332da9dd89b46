"""Run the requests that arrived together through one ONNX Runtime session.

Requests of about the same length are padded and run as one batch: padding is work, so lengths far apart are not mixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.feeds import MASKS, TensorSpec, prepare_inputs
from effc.compiler.session import session_options
from effc.errors import EffcError

# A sequence is padded by at most this share of its length, and this many tokens that are always cheap.
_PADDING_SHARE, _PADDING_TOKENS = 0.25, 8

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ForwardSettings:
    """What the writer says of a graph.

    Attributes:
        file: the graph's file name.
        library: file name of effc's native kernels, or None.
        inputs, outputs: of the graph.
        max_length: tokens that a sequence may have; None if nothing bounds them.
        max_batch: rows of one run.
        padding: what fills an input behind its sequence; 0 where it is not named.
        pads: requests of different lengths may be padded to share a run.
    """

    file: str
    library: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_length: int | None
    max_batch: int
    padding: Mapping[str, int]
    pads: bool = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ForwardSettings:
        """The inverse of :meth:`to_json`."""
        specs = {key: tuple(TensorSpec.from_json(entry) for entry in values[key]) for key in ("inputs", "outputs")}
        return cls(**{**values, **specs})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        specs = {key: [spec.to_json() for spec in getattr(self, key)] for key in ("inputs", "outputs")}
        return {**vars(self), **specs, "padding": dict(self.padding)}


class _Request(NamedTuple):
    number: int
    feeds: Arrays
    wanted: Collection[str]


class Forward:
    """A session and the rules by which requests share its runs."""

    def __init__(self, directory: Path, settings: ForwardSettings, threads: int, providers: Sequence[Any]):
        self.settings = settings
        self.session = open_session(directory, settings.file, settings.library, threads, providers)
        self._length_name = self._padded_dimension()
        self._output_names = [spec.name for spec in settings.outputs]
        self.runs = 0

    def run(
        self,
        requests: Sequence[Mapping[str, NDArray[Any]]],
        wanted: Sequence[Collection[str]] | None = None,
    ) -> list[Arrays | EffcError]:
        """Answer requests, each with its outputs or with what is wrong with it.

        Args:
            requests: the inputs of each, ``[rows, ...]``. Masks and the like may be missing.
            wanted: names of the outputs that each request asks for; all of them when not given. An answer may hold
                more, where requests with other wishes shared the run.
        """
        answers: list[Arrays | EffcError] = [EffcError("No answer.")] * len(requests)
        ready: list[_Request] = []
        for number, given in enumerate(requests):
            try:
                feeds = prepare_inputs(given, self.settings.inputs, self.settings.max_length)
            except EffcError as error:
                answers[number] = error
                continue
            ready.append(_Request(number, feeds, self._output_names if wanted is None else wanted[number]))
        for group in self._groups(ready):
            for request, answer in zip(group, self._answers(group), strict=True):
                answers[request.number] = answer
        return answers

    def _answers(self, group: list[_Request]) -> Sequence[Arrays | EffcError]:
        try:
            return self._run_together(group)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own.
            if len(group) > 1:
                return [answer for request in group for answer in self._answers([request])]
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            return [EffcError(f"ONNX Runtime failed: {first}.", "Send fewer or shorter sequences.")]

    def _run_together(self, group: list[_Request]) -> list[Arrays]:
        # What nobody wants stays in the session: hidden states are long to copy.
        outputs = [spec for spec in self.settings.outputs if any(spec.name in request.wanted for request in group)]
        names = [spec.name for spec in outputs]
        if len(group) == 1:
            return [dict(zip(names, self._values(names, group[0].feeds), strict=True))]
        rows = [len(next(iter(request.feeds.values()))) for request in group]
        lengths = [self._length(request.feeds) for request in group]
        longest = max(lengths)
        feeds = {
            spec.name: np.concatenate([self._padded(request.feeds[spec.name], spec, longest) for request in group])
            for spec in self.settings.inputs
        }
        values = self._values(names, feeds)
        ends = np.cumsum(rows)
        answers = []
        for end, count, length in zip(ends, rows, lengths, strict=True):
            answers.append(
                {
                    spec.name: self._cut(value[end - count : end], spec, length)
                    for spec, value in zip(outputs, values, strict=True)
                }
            )
        return answers

    def _values(self, names: list[str], feeds: Arrays) -> Sequence[NDArray[Any]]:
        self.runs += 1
        # No name at all would mean every output.
        values: Sequence[NDArray[Any]] = self.session.run(names, feeds) if names else ()
        return values

    def _groups(self, ready: list[_Request]) -> Iterator[list[_Request]]:
        """Requests that may share a run, the shortest first."""
        group: list[_Request] = []
        rows = 0
        for request in sorted(ready, key=lambda entry: self._length(entry.feeds)):
            own = len(next(iter(request.feeds.values())))
            if group and (rows + own > self.settings.max_batch or not self._fit(group[0].feeds, request.feeds)):
                yield group
                group, rows = [], 0
            group.append(request)
            rows += own
        if group:
            yield group

    def _fit(self, shorter: Arrays, longer: Arrays) -> bool:
        if self._length_name is None:
            return all(shorter[name].shape[1:] == value.shape[1:] for name, value in longer.items())
        length = self._length(shorter)
        return self._length(longer) <= length * (1 + _PADDING_SHARE) + _PADDING_TOKENS

    def _padded_dimension(self) -> str | None:
        """The dimension that padding may extend; None where that would change the result."""
        if not self.settings.pads:
            return None
        symbols = {size for spec in self.settings.inputs for size in spec.shape[1:] if isinstance(size, str)}
        known = all(
            not isinstance(size, str) or size in symbols for spec in self.settings.outputs for size in spec.shape[1:]
        )
        masked = any(spec.name in MASKS for spec in self.settings.inputs)
        return symbols.pop() if len(symbols) == 1 and known and masked else None

    def _length(self, feeds: Arrays) -> int:
        sizes = (
            value.shape[axis]
            for spec in self.settings.inputs
            for value in (feeds[spec.name],)
            for axis, size in enumerate(spec.shape)
            if axis and isinstance(size, str)
        )
        return max(sizes, default=1)

    def _padded(self, array: NDArray[Any], spec: TensorSpec, length: int) -> NDArray[Any]:
        if self._length_name is None:
            return array
        widths = [
            (0, length - actual if axis and size == self._length_name else 0)
            for axis, (actual, size) in enumerate(zip(array.shape, spec.shape, strict=True))
        ]
        return np.pad(array, widths, constant_values=self.settings.padding.get(spec.name, 0))

    def _cut(self, array: NDArray[Any], spec: TensorSpec, length: int) -> NDArray[Any]:
        if self._length_name is None or self._length_name not in spec.shape[1:]:
            return array
        return array[tuple(slice(length) if size == self._length_name else slice(None) for size in spec.shape)]


def open_session(
    directory: Path, file: str, library: str | None, threads: int, providers: Sequence[Any]
) -> onnxruntime.InferenceSession:
    """A session with effc's native kernels where they can be loaded; without them the same graph is slower."""
    # Idle threads do not spin: other models of the server want the cores.
    options = session_options(threads, spinning=False)
    if library is not None:
        try:
            # Tried on options of its own, because a failure would leave the others half registered.
            onnxruntime.SessionOptions().register_custom_ops_library(str(directory / library))
            options.register_custom_ops_library(str(directory / library))
        except Exception as error:
            warnings.warn(f"effc's native kernels cannot be loaded here: {error}", RuntimeWarning, stacklevel=2)
    return onnxruntime.InferenceSession(str(directory / file), options, providers=list(providers))
