"""What each channel of an activation does on calibration data: for smoothing, AWQ, GPTQ and bias correction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effc.errors import DataError
from effc.passes.quantize_blocks import Blocks
from effc.passes.quantize_calibrate import (
    Batch,
    Range,
    check_inputs,
    measure_ranges,
    session_with_outputs,
    single_samples,
)
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_settings import CalibrationSection

Array = npt.NDArray[Any]

# Rows kept of every activation, on which the error of a choice is measured.
_ROWS = 192


@dataclass(frozen=True)
class ChannelStats:
    """Figures of an activation over all real tokens.

    Attributes:
        low, high, mean, peak: per channel ``[width]``; ``peak`` is the mean absolute value.
        rows: a sample of its rows ``[n, width]``.
        gram: ``x.T @ x / n`` ``[width, width]``, where it was asked for.
    """

    low: Floats
    high: Floats
    mean: Floats
    peak: Floats
    rows: Floats
    gram: Floats | None = None

    def divided(self, scale: Floats) -> ChannelStats:
        """The same of the activation divided by ``scale [width]``."""
        gram = None if self.gram is None else (self.gram / np.outer(scale, scale)).astype(np.float32)
        low, high, mean, peak, rows = (
            (array / scale).astype(np.float32) for array in (self.low, self.high, self.mean, self.peak, self.rows)
        )
        return ChannelStats(low, high, mean, peak, rows, gram)


@dataclass
class Remembered:
    """What quantizing one graph of a model has found, so that its other graph gets exactly the same.

    Attributes:
        stats: by the name of the first layer that reads the activation, before any smoothing.
        smoothing: the scales chosen, by the same name.
        ranges: of activations as quantized, by the same name.
        weights: those in blocks, by layer and mode.
        fp8: E4M3 weights and their scales, by layer.
    """

    stats: dict[str, ChannelStats] = field(default_factory=dict)
    smoothing: dict[str, Floats] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    weights: dict[tuple[str, str], Blocks] = field(default_factory=dict)
    fp8: dict[str, tuple[Array, Floats]] = field(default_factory=dict)

    def put(self, found: dict[str, ChannelStats]) -> None:
        """Take figures of a graph that may be smoothed."""
        for key, stats in found.items():
            scale = self.smoothing.get(key)
            self.stats[key] = stats if scale is None else stats.divided((1 / scale).astype(np.float32))

    def measured_ranges(
        self, model: ir.Model, keys: Mapping[ir.Value, str], batches: Iterable[Batch], settings: CalibrationSection
    ) -> dict[ir.Value, Range]:
        """The range of each activation of a graph, measured unless another graph's was.

        Args:
            keys: the values and the names of the first layers that read them.
        """
        if missing := [value for value, key in keys.items() if key not in self.ranges]:
            measured = measure_ranges(model, missing, batches, settings)
            self.ranges.update({keys[value]: measured[str(value.name)] for value in missing})
        return {value: self.ranges[key] for value, key in keys.items()}

    def smoothed(self, key: str) -> ChannelStats:
        """The figures of an activation as it is in a smoothed graph."""
        stats = self.stats[key]
        return stats.divided(self.smoothing[key]) if key in self.smoothing else stats


def observe(
    model: ir.Model, keys: dict[ir.Value, str], batches: Iterable[Batch], *, gram: bool = False
) -> dict[str, ChannelStats]:
    """Run the graph on ``batches`` and note the channels of some values.

    Args:
        keys: values of the main graph and the names that the result has for them.
        gram: note second moments too, ``width * width`` floats for each value.

    Raises:
        DataError: if there is no batch, or one does not fit the graph's inputs.
    """
    wanted = {str(value.name): key for value, key in keys.items()}
    sums = {key: _Sums(gram, index) for index, key in enumerate(wanted.values())}
    empty = True
    with session_with_outputs(model, list(keys)) as session:
        inputs = {value.name for value in session.get_inputs()}
        computed = [name for name in wanted if name not in inputs]
        for sample in single_samples(batches):
            empty = False
            check_inputs(inputs, sample)
            feeds = {name: value for name, value in sample.items() if name in inputs}
            found = dict(zip(computed, session.run(computed, feeds) if computed else [], strict=True))
            found.update({name: feeds[name] for name in wanted.keys() & feeds.keys()})
            mask = sample.get("attention_mask")
            for name, array in found.items():
                if mask is not None and array.shape[:2] == mask.shape:
                    array = array[mask != 0]
                sums[wanted[name]].add(array.reshape(-1, array.shape[-1]))
    if empty:
        raise DataError("There is no calibration sample.", "Give calibration data with texts.")
    return {key: value.result() for key, value in sums.items()}


class _Sums:
    def __init__(self, gram: bool, seed: int):
        self._random = np.random.default_rng(seed)
        self._gram: Array | float | None = 0.0 if gram else None
        self._low: Array | None = None
        self._high: Array | None = None
        self._sum: Array | float = 0.0
        self._peak: Array | float = 0.0
        self._count = 0
        self._rows: list[Array] = []

    def add(self, rows: Array) -> None:
        low, high = rows.min(axis=0), rows.max(axis=0)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)
        self._sum = self._sum + rows.sum(axis=0, dtype=np.float64)
        self._peak = self._peak + np.abs(rows).sum(axis=0, dtype=np.float64)
        self._count += len(rows)
        if self._gram is not None:
            self._gram = self._gram + rows.T @ rows
        # A few of every sample; the first and the last tokens are where outliers stand.
        chosen = self._random.choice(len(rows), min(len(rows), 14), replace=False)
        self._rows.append(rows[np.unique([0, len(rows) - 1, *chosen])])

    def result(self) -> ChannelStats:
        assert self._low is not None and self._high is not None
        rows = np.concatenate(self._rows)
        if len(rows) > _ROWS:
            rows = rows[self._random.choice(len(rows), _ROWS, replace=False)]
        mean, peak = (np.asarray(total / self._count, np.float32) for total in (self._sum, self._peak))
        gram = None if self._gram is None else np.asarray(self._gram / self._count, np.float32)
        return ChannelStats(self._low, self._high, mean, peak, rows.astype(np.float32), gram)
