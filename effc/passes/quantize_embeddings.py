"""Embedding tables in INT8."""

from __future__ import annotations

import onnx_ir as ir

from effc.passes.quantize_find import Embedding
from effc.passes.quantize_graph import Editor
from effc.passes.quantize_numbers import quantize_rows


def quantize_embedding(
    editor: Editor, embedding: Embedding, tables: dict[ir.Value, tuple[ir.Value, ir.Value]]
) -> ir.Value:
    """A lookup of int8 rows and their scales, before the one of fp32 rows.

    Args:
        tables: those that are quantized already, with their integers and scales; takes this one.

    Returns:
        the floats that were looked up.
    """
    node, table = embedding.node, embedding.node.inputs[0]
    assert table is not None
    if table not in tables:
        quantized = quantize_rows(embedding.tensor().numpy())
        tables[table] = (
            editor.initializer(f"{embedding.name}.weight_int8", quantized.values),
            editor.initializer(f"{embedding.name}.weight_scale", quantized.scale),
        )
    values, scales = tables[table]
    insert, output = editor.insert, node.outputs[0]
    rows = insert(node, "Gather", [values, node.inputs[1]], {"axis": 0}, dtype=ir.DataType.INT8, origin=node)
    scale = insert(node, "Gather", [scales, node.inputs[1]], {"axis": 0}, origin=node)
    floats = insert(node, "Cast", rows, {"to": ir.DataType.FLOAT}, like=output, origin=node)
    return insert(node, "Mul", floats + scale, like=output, origin=node)[0]
