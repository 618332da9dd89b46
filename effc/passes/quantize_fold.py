"""Dividing an activation by a scale per channel where that costs nothing at run time: in the weights in front of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from effc.passes.quantize_find import Columns, Linear
from effc.passes.quantize_graph import Editor, constant_of, only_consumer
from effc.passes.quantize_numbers import Floats

Fold = Callable[[Floats], None]
"""Divides an activation by a scale ``[width]``, in place."""

# Norms and where their gain and shift stand among the inputs.
_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "SkipSimplifiedLayerNormalization": (2, None),
    "SkipLayerNormalization": (2, 3),
}


def find_fold(editor: Editor, value: ir.Value, columns: dict[ir.Value, tuple[Linear, Columns]]) -> Fold | None:
    """How ``value`` can be divided without a node of its own, or None.

    It comes out of a norm with a gain, of a product with a constant, or of a gate whose other factor is a linear layer.
    All that reads it must be scaled the other way by the caller.

    Args:
        columns: the output of every linear layer's part.
    """
    node = value.producer()
    if node is None or value.is_graph_output():
        return None
    if node.op_type in _NORMS and value is node.outputs[0]:
        places = [place for place in _NORMS[node.op_type] if place is not None and place < len(node.inputs)]
        places = [place for place in places if node.inputs[place] is not None]
        if all(_is_row(node.inputs[place]) for place in places) and places:
            return partial(_divide_inputs, editor, node, places)
    if node.op_type == "Mul" and node.domain == "":
        for place, factor in enumerate(node.inputs):
            if _is_row(factor):
                return partial(_divide_inputs, editor, node, [place])
        for factor in node.inputs:
            if factor is not None and (found := _linear_behind(factor, columns)) is not None:
                return partial(_divide_columns, editor, *found)
    return None


def scale_rows(editor: Editor, linear: Linear, scale: Floats) -> None:
    """Multiply the weight of a linear layer so that it fits an input that was divided by ``scale [fan_in]``."""
    _set_weight(editor, linear, np.ascontiguousarray(linear.weight() * scale[:, None], np.float32))


def _divide_columns(editor: Editor, linear: Linear, columns: Columns, adder: ir.Node | None, scale: Floats) -> None:
    weight = np.array(linear.weight(), np.float32)
    weight[:, columns.start : columns.stop] /= scale
    bias = linear.bias()
    if bias is not None:
        bias = np.array(bias, np.float32)
        bias[columns.start : columns.stop] /= scale
        linear.node.replace_input_with(2, editor.initializer(f"{columns.name}.bias_smoothed", bias))
    _set_weight(editor, linear, weight)
    if adder is not None:
        place = 1 if constant_of(adder.inputs[1]) is not None else 0
        _divide_input(editor, adder, place, scale)


def _set_weight(editor: Editor, linear: Linear, weight: Floats) -> None:
    node = linear.node
    node.replace_input_with(1, editor.initializer(f"{linear.weight_name}_smoothed", weight))
    if node.attributes.get_int("transB", 0):
        node.attributes["transB"] = ir.AttrInt64("transB", 0)


def _divide_inputs(editor: Editor, node: ir.Node, places: list[int], scale: Floats) -> None:
    for place in places:
        _divide_input(editor, node, place, scale)


def _divide_input(editor: Editor, node: ir.Node, place: int, scale: Floats) -> None:
    value = node.inputs[place]
    tensor = constant_of(value)
    assert value is not None and tensor is not None
    divided = (tensor.numpy().reshape(-1) / scale).astype(np.float32).reshape(tensor.shape.numpy())
    node.replace_input_with(place, editor.initializer(f"{value.name}_smoothed", divided))


def _linear_behind(
    value: ir.Value, columns: dict[ir.Value, tuple[Linear, Columns]]
) -> tuple[Linear, Columns, ir.Node | None] | None:
    """The part of a linear layer, with its Add, that makes ``value`` and nothing else."""
    if len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    if value in columns:
        return (*columns[value], None)
    adder = value.producer()
    if adder is None or adder.op_type != "Add" or adder.domain != "":
        return None
    for place, other in ((0, 1), (1, 0)):
        product = adder.inputs[place]
        if product in columns and _is_row(adder.inputs[other]) and only_consumer(product) is adder:
            return (*columns[product], adder)
    return None


def _is_row(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant with one figure per channel."""
    tensor = constant_of(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    shape = tuple(tensor.shape.numpy())
    return len(shape) >= 1 and shape[-1] > 1 and all(size == 1 for size in shape[:-1])
