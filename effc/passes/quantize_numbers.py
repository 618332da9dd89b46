"""The arithmetic of INT8: which integers and scales stand for which floats.

onnxruntime.quantization computes the same figures one channel at a time in Python and for whole ``TensorProto``s; here
they are array operations on memory-mapped weights, so that a large model is never held twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# What is smaller is as good as zero, and the product of two scales stays a normal float.
LEAST_SCALE = 1e-18


@dataclass(frozen=True)
class QuantizedTensor:
    """``values * scale`` is close to the floats it stands for.

    Attributes:
        values: int8, shaped like the floats.
        scale: float32, one for each slice of the axis that has its own.
    """

    values: npt.NDArray[np.int8]
    scale: Floats


def quantize_columns(
    weight: Floats, *, reduce_range: bool = False, least_scale: Floats | None = None
) -> QuantizedTensor:
    """Quantize a weight ``[fan_in, fan_out]`` symmetrically with one scale ``[fan_out]`` per output channel.

    Args:
        weight: the floats.
        reduce_range: keep to -63..63, so that a pair of products with u8 activations fits 16 bits.
        least_scale: lower bounds ``[fan_out]`` of the scales.
    """
    top = 63 if reduce_range else 127
    peak = np.maximum(weight.max(axis=0), -weight.min(axis=0))
    scale = _scale(peak, top)
    if least_scale is not None:
        scale = np.maximum(scale, least_scale).astype(np.float32)
    return QuantizedTensor(np.rint(weight / scale).astype(np.int8), scale)


def quantize_rows(table: Floats) -> QuantizedTensor:
    """Quantize an embedding table ``[rows, width]`` symmetrically with one scale ``[rows, 1]`` per row."""
    peak = np.maximum(table.max(axis=1), -table.min(axis=1))
    scale = _scale(peak, 127)[:, None]
    return QuantizedTensor(np.rint(table / scale).astype(np.int8), scale)


def activation_range(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point that map ``low..high``, widened to hold 0 exactly, to 0..255."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / 255, LEAST_SCALE))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


def quantize_bias(bias: Floats, scale: Floats) -> npt.NDArray[np.int32]:
    """A bias ``[fan_out]`` in units of the products it is added to: activation scale times weight scale."""
    return np.rint(bias.astype(np.float64) / scale).astype(np.int32)


def least_scale_for_bias(bias: Floats, activation_scale: np.float32) -> Floats:
    """The smallest weight scale ``[fan_out]`` at which :func:`quantize_bias` stays within 31 bits."""
    return (np.abs(bias) / (2.0**30 * activation_scale)).astype(np.float32)


def _scale(peak: Floats, top: int) -> Floats:
    return np.maximum(peak / top, LEAST_SCALE).astype(np.float32)
