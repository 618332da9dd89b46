"""An activation that is rounded to INT8 or E4M3 with one symmetric scale, as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effc.passes.quantize_graph import Editor
from effc.passes.quantize_numbers import LEAST_SCALE


@dataclass(frozen=True)
class NumberFormat:
    """Numbers of 8 bits.

    Attributes:
        name: as in the names of initializers.
        largest: the scale maps the largest magnitude of an activation to this number.
        dtype: the type in the graph.
        zero: zero of that type, which tells QuantizeLinear the type.
        least_scale: what is smaller is as good as zero.
        headroom: a fixed scale maps so many times the largest magnitude seen to :attr:`largest`.
        zero_when_back: give the zero to DequantizeLinear too. ONNX Runtime fuses INT8 products only then.
    """

    name: str
    largest: float
    dtype: ir.DataType
    zero: np.generic | np.ndarray[Any, Any]
    least_scale: float = LEAST_SCALE
    headroom: float = 1.0
    zero_when_back: bool = False


# fp16 holds no smaller number without losing digits, and the scale becomes one in engines.
LEAST_HALF = float(np.finfo(np.float16).tiny)
# What is larger than anything seen in calibration would be cut off, which costs far more than FP8's smallest numbers.
E4M3 = NumberFormat("fp8", 448.0, ir.DataType.FLOAT8E4M3FN, np.zeros((), ml_dtypes.float8_e4m3fn), headroom=2.0)
INT8 = NumberFormat("int8", 127.0, ir.DataType.INT8, np.int8(0), LEAST_HALF, zero_when_back=True)
FORMATS = {form.name: form for form in (E4M3, INT8)}


def rounded(
    editor: Editor,
    before: ir.Node,
    value: ir.Value,
    form: NumberFormat,
    peak: float | None,
    repeats: int | None = None,
) -> ir.Value:
    """``value`` as it is after rounding, in nodes before a given one.

    Args:
        peak: the largest magnitude seen, which fixes the scale; found in every run if None.
        repeats: write a fixed scale so many times, once for each number of the last axis.
    """
    shape = () if peak is None or repeats is None else (repeats,)
    zero = editor.initializer(f"{form.name}_zero_point", np.full(shape, form.zero))
    if peak is None:
        (scale,) = _found_scale(editor, before, value, form)
    else:
        step = np.full(shape, max(form.headroom * peak / form.largest, form.least_scale), np.float32)
        scale = editor.initializer(f"{value.name}_scale", step)
    axis = {"axis": -1} if shape else {}
    codes = editor.insert(before, "QuantizeLinear", [value, scale, zero], axis, like=value, dtype=form.dtype)
    back = [*codes, scale, zero] if form.zero_when_back else [*codes, scale]
    return editor.insert(before, "DequantizeLinear", back, axis, like=value)[0]


def _found_scale(editor: Editor, before: ir.Node, value: ir.Value, form: NumberFormat) -> list[ir.Value]:
    # Over all axes, which gives a scalar.
    peak = editor.insert(before, "ReduceMax", editor.insert(before, "Abs", [value], like=value), {"keepdims": 0})
    step = editor.initializer(f"{form.name}_step", np.float32(1 / form.largest))
    least = editor.initializer(f"{form.name}_least", np.float32(form.least_scale))
    return editor.insert(before, "Max", [*editor.insert(before, "Mul", [*peak, step]), least])
