"""Ranges of activations, measured by running the fp32 graph on samples."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from effc.errors import DataError
from effc.passes.quantize_numbers import activation_range
from effc.passes.quantize_settings import CalibrationSection

Batch = Mapping[str, npt.NDArray[Any]]
Range = tuple[float, float]

# A histogram of every activation would take longer than the model's own run.
_VALUES_PER_HISTOGRAM = 1 << 16
_SHRUNK = tuple(np.linspace(1, 0.2, 9).tolist())
_HISTOGRAM_BINS = {"percentile": 2048, "entropy": 512}


def measure_ranges(
    model: ir.Model, values: Iterable[ir.Value], batches: Iterable[Batch], settings: CalibrationSection
) -> dict[str, Range]:
    """Find the range that each of ``values`` takes, by name.

    onnxruntime's calibrators keep every activation of every sample in memory until the end; here one sample's
    activations are held at a time, and only onnxruntime's histogram arithmetic is used.

    Args:
        model: the fp32 graph; unchanged afterwards.
        values: values of its main graph.
        batches: model inputs by name, at least one batch.
        settings: how ranges are chosen.

    Raises:
        DataError: if there is no batch, or one does not fit the graph's inputs.
    """
    wanted = {str(value.name): value for value in values}
    collector: _MinMax | _Histograms | _LeastSquares
    if settings.method == "minmax":
        collector = _MinMax()
    else:
        collector = _LeastSquares() if settings.method == "mse" else _Histograms(settings)
    with session_with_outputs(model, list(wanted.values())) as session:
        inputs = {value.name for value in session.get_inputs()}
        computed = [name for name in wanted if name not in inputs]
        empty = True
        for sample in single_samples(batches):
            empty = False
            check_inputs(inputs, sample)
            feeds = {name: value for name, value in sample.items() if name in inputs}
            # Asked for nothing, a session returns everything.
            arrays = session.run(computed, feeds) if computed else []
            for name, array in zip(computed, arrays, strict=True):
                collector.add(name, array)
            for name in wanted.keys() & feeds.keys():
                collector.add(name, feeds[name])
    if empty:
        raise DataError(
            "There is no calibration sample.", "Give calibration data, or none at all for dynamic quantization."
        )
    ranges = collector.ranges()
    if bad := sorted(name for name, edges in ranges.items() if not np.all(np.isfinite(edges))):
        raise DataError(
            f"The activation '{bad[0]}' is not finite on the calibration data.",
            "Check that the samples are real inputs of this model.",
        )
    return ranges


def check_inputs(inputs: Iterable[str], sample: Batch) -> None:
    """Check that a sample has every input of the graph.

    Raises:
        DataError: naming the input.
    """
    if missing := sorted(set(inputs) - sample.keys()):
        raise DataError(
            f"Calibration samples lack the model input '{missing[0]}'.",
            f"Give every sample all of: {', '.join(sorted(inputs))}.",
        )


class _MinMax:
    def __init__(self) -> None:
        self._ranges: dict[str, Range] = {}

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        low, high = self._ranges.get(name, (np.inf, -np.inf))
        self._ranges[name] = min(low, float(array.min())), max(high, float(array.max()))

    def ranges(self) -> dict[str, Range]:
        return self._ranges


class _Histograms:
    def __init__(self, settings: CalibrationSection):
        from onnxruntime.quantization.calibrate import HistogramCollector

        self._collector = HistogramCollector(
            method=settings.method,
            symmetric=False,
            num_bins=_HISTOGRAM_BINS[settings.method],
            num_quantized_bins=128,
            percentile=settings.percentile,
            scenario="same",
        )

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        flat = array.reshape(-1)
        # An odd step, so that it does not visit the same channels in every row.
        step = max(1, flat.size // _VALUES_PER_HISTOGRAM) | 1
        values = np.concatenate([flat[::step], [flat.min(), flat.max()]]).astype(np.float32)
        with contextlib.redirect_stdout(io.StringIO()):
            self._collector.collect({name: values})

    def ranges(self) -> dict[str, Range]:
        with contextlib.redirect_stdout(io.StringIO()):
            result = self._collector.compute_collection_result()
        return {name: (float(edges[0]), float(edges[1])) for name, edges in result.items()}


class _LeastSquares:
    """Ranges at which rounding and clipping together change the values least, over shrunk whole ranges."""

    def __init__(self) -> None:
        self._whole = _MinMax()
        self._values: dict[str, list[npt.NDArray[np.float32]]] = {}

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        self._whole.add(name, array)
        flat = array.reshape(-1)
        step = max(1, flat.size // _VALUES_PER_HISTOGRAM) | 1
        self._values.setdefault(name, []).append(flat[::step].astype(np.float32))

    def ranges(self) -> dict[str, Range]:
        return {name: self._best(name, whole) for name, whole in self._whole.ranges().items()}

    def _best(self, name: str, whole: Range) -> Range:
        values = np.concatenate(self._values[name])
        values = values[:: max(1, values.size // _VALUES_PER_HISTOGRAM)]
        # The ends are rare and may have been stepped over, yet they are what clipping costs.
        values = np.concatenate([values, np.array(whole, np.float32)])
        tried = [(low * whole[0], high * whole[1]) for low in _SHRUNK for high in _SHRUNK]
        errors = [_rounding_error(values, *edges) for edges in tried]
        return tried[int(np.argmin(errors))]


def _rounding_error(values: npt.NDArray[np.float32], low: float, high: float) -> float:
    scale, zero = activation_range(low, high)
    integers = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float(np.square((integers - zero) * scale - values).sum(dtype=np.float64))


def single_samples(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Cut batches into samples where every input has the same first axis, to hold fewer activations at a time."""
    for batch in batches:
        sizes = {array.shape[0] for array in batch.values() if array.ndim}
        if len(sizes) == 1 and all(array.ndim for array in batch.values()):
            for index in range(sizes.pop()):
                yield {name: array[index : index + 1] for name, array in batch.items()}
        else:
            yield batch


@contextlib.contextmanager
def session_with_outputs(model: ir.Model, values: list[ir.Value]) -> Any:
    """A session of ``model`` that also returns ``values``. Weights go through a file, which has no 2 GB limit."""
    outputs = model.graph.outputs
    kept = list(outputs)
    known = set(kept) | set(model.graph.inputs)
    with tempfile.TemporaryDirectory(prefix="effc-calibrate-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            outputs.extend(value for value in values if value not in known)
            ir.save(model, path, external_data="model.onnx.data")
        finally:
            outputs.clear()
            outputs.extend(kept)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        yield ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
