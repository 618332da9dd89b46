"""Taking the few channels of a gated activation that hold its outliers out of a product that is to become INT8.

The two factors of a gate peak together now and then, always in the same channels: of the 1536 in front of a
``down_proj`` of SmolLM2-135M two reach 3034 and 1077 on reviews, and no other 14. One scale for the tensor would round
all else to nothing. LLM.int8() (Dettmers et al., 2022) multiplies such channels in half precision and the others in
INT8, and finds them in every run. Here they are those that peak highest on calibration data, because the products of an
engine are fixed:

    x @ W  becomes  (x * m) @ (W / m) + x[channels] @ W[channels]

where ``m`` is zero at those channels, and so is the weight. Elsewhere ``m`` divides by SmoothQuant's scales
(Xiao et al., 2022), which costs nothing more. The first product is then a layer like any other.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_exclude import Exclusion, is_gated
from effc.passes.quantize_find import PART, Linear
from effc.passes.quantize_fold import scale_rows
from effc.passes.quantize_graph import Editor
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_observe import ChannelStats, Remembered, observe
from effc.passes.quantize_plan import input_of, make_plan

# A hundredth of the channels, in the steps that tensor cores multiply.
_SHARE, _STEP = 100, 8
_LEAST = 1e-5


def split_gated(
    model: ir.Model, exclusion: Exclusion, calibration: Iterable[Batch], remembered: Remembered
) -> list[str]:
    """Split the products behind gates, in place; their names.

    Args:
        exclusion: leaves out what is not to become INT8.
        remembered: what another graph of the same model has found, so that this one has the same channels.

    Raises:
        DataError: if calibration samples do not fit the graph.
    """
    linears = [
        linear
        for linear, chosen in make_plan(model.graph, exclusion, embeddings=False).linears
        if is_gated(linear.node.inputs[0])
        and len(chosen) == len(linear.columns)
        and not linear.node.outputs[0].is_graph_output()
    ]
    # Not the layers' own names: those are for what they read behind this.
    keys = {input_of(linear): f"{linear.columns[0].name}, whole" for linear in linears}
    known = remembered.stats
    if missing := {value: key for value, key in keys.items() if key not in known}:
        known.update(observe(model, missing, calibration))
    editor = Editor(model.graph)
    for linear in linears:
        _split(editor, linear, known[keys[input_of(linear)]])
    editor.drop_unused_initializers()
    return [linear.columns[0].name for linear in linears]


def _split(editor: Editor, linear: Linear, stats: ChannelStats) -> None:
    node, value, name = linear.node, input_of(linear), linear.columns[0].name
    output, weight = node.outputs[0], linear.weight()
    peaks = np.maximum(np.abs(stats.low), np.abs(stats.high))
    channels = _highest(peaks)
    rows = np.ascontiguousarray(weight[channels], np.float32)
    scale = _smoothing(peaks, np.abs(weight).max(axis=1))
    factors = 1 / scale
    scale[channels] = factors[channels] = 0
    scale_rows(editor, linear, scale)
    (usual,) = editor.insert(
        node, "Mul", [value, editor.initializer(f"{name}.usual", factors)], like=value, origin=node
    )
    node.replace_input_with(0, usual)
    (rare,) = editor.insert(node, "Gather", [value, editor.initializer(f"{name}.outliers", channels)], {"axis": -1})
    (rest,) = editor.insert(
        node, "MatMul", [rare, editor.initializer(f"{name}.outlier_weight", rows)], like=output, origin=node
    )
    product = rest.producer()
    assert product is not None
    product.metadata_props[PART] = name
    addition = ir.node("Add", [output, rest])
    (total,) = addition.outputs
    total.dtype, total.shape = ir.DataType.FLOAT, output.shape
    editor.graph.insert_after(node, addition)
    for use in [use for use in output.uses() if use.node is not addition]:
        use.node.replace_input_with(use.idx, total)


def _highest(peaks: Floats) -> npt.NDArray[np.int64]:
    """The channels that peak highest, in the order in which they stand."""
    count = -(-len(peaks) // (_SHARE * _STEP)) * _STEP
    return np.sort(np.argsort(-peaks, kind="stable")[:count]).astype(np.int64)


def _smoothing(peaks: Floats, peaks_of_weight: Floats) -> Floats:
    scale = np.sqrt(np.maximum(peaks, _LEAST) / np.maximum(peaks_of_weight, _LEAST)).astype(np.float32)
    return np.asarray(scale / np.median(scale), np.float32)
