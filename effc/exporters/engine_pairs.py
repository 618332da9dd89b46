"""Pairs of QuantizeLinear and DequantizeLinear as TensorRT takes them, without what stands there for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.passes.quantize_graph import Editor, constant_of


def plain_pairs(model: ir.Model) -> None:
    """Take it out, in place."""
    _plain_fp8_weights(model)
    _single_scales(model)


def _plain_fp8_weights(model: ir.Model) -> None:
    """Take the Reshape out from behind dequantized FP8 weights."""
    editor = Editor(model.graph)
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Reshape" and node.domain == "" else None
        dequantize = None if weight is None else weight.producer()
        if weight is None or dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        tensor = constant_of(dequantize.inputs[0])
        if tensor is None or tensor.dtype != ir.DataType.FLOAT8E4M3FN or len(tensor.shape) != 3:
            continue
        name = str(dequantize.inputs[0].name) if dequantize.inputs[0] is not None else "weight_fp8"
        stored = editor.initializer(f"{name}_matrix", tensor.numpy()[0])
        (plain,) = editor.insert(
            node, "DequantizeLinear", [stored, dequantize.inputs[1]], {"axis": 1}, like=node.outputs[0]
        )
        ir.convenience.replace_all_uses_with(node.outputs[0], plain)
        model.graph.remove(node, safe=True)
        if not weight.uses():
            model.graph.remove(dequantize, safe=True)
    editor.drop_unused_initializers()


def _single_scales(model: ir.Model) -> None:
    """Write the one scale of an activation once, where it stands beside each number of the last axis."""
    editor, singles = Editor(model.graph), dict[ir.Value, ir.Value]()

    def single(value: ir.Value) -> ir.Value:
        if value not in singles:
            tensor = constant_of(value)
            assert tensor is not None
            singles[value] = editor.initializer(f"{value.name}_single", np.array(tensor.numpy()[0]))
        return singles[value]

    for node in list(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or "axis" not in node.attributes:
            continue
        scale, stored = constant_of(node.inputs[1]), constant_of(node.inputs[0])
        if scale is None or stored is not None or scale.size < 2 or np.ptp(scale.numpy()) != 0:
            continue
        for place, value in enumerate(node.inputs[1:], start=1):
            if value is not None:
                node.replace_input_with(place, single(value))
        del node.attributes["axis"]
    editor.drop_unused_initializers()
