"""Putting a quantized product in the place of a linear layer, or beside it, to see what it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effc.passes.quantize_find import Columns, Linear
from effc.passes.quantize_graph import Editor, replace_value
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_plan import input_of

Build = Callable[[Columns, Floats, Floats | None], ir.Value]
"""Makes the product of some columns from their weight ``[fan_in, width]`` and the bias inside a Gemm."""


@dataclass(frozen=True)
class Compared:
    """A layer in fp32 and quantized, on the same input.

    Attributes:
        name: of the layer.
        output: of the fp32 product.
        change: what quantizing adds to it.
    """

    name: str
    output: ir.Value
    change: ir.Value


class Beside:
    """Keeps every layer in fp32 and puts its quantized form, and the difference of both outputs, beside it.

    So one run tells what quantizing changes in each layer, with the very kernels that would be deployed.
    """

    def __init__(self, graph: ir.Graph):
        self.layers: list[Compared] = []
        self._graph = graph

    def compare(self, columns: Columns, product: ir.Value, behind: ir.Node) -> None:
        """Compute ``product - columns.output`` behind a node."""
        node = ir.node("Sub", [product, columns.output])
        change, number = node.outputs[0], len(self.layers)
        change.name, change.shape, change.dtype = f"effc.change.{number}", columns.output.shape, ir.DataType.FLOAT
        columns.output.name = columns.output.name or f"effc.output.{number}"
        self._graph.insert_after(behind, node)
        self.layers.append(Compared(columns.name, columns.output, change))


def replace_linear(
    editor: Editor, linear: Linear, chosen: Sequence[int], build: Build, beside: Beside | None = None
) -> list[str]:
    """Replace a product; of a packed one, the ``chosen`` parts are built anew and the others become fp32 products.

    Args:
        beside: leave the graph as it is and compare the fp32 product with the new one.

    Returns:
        names of the parts that were built anew.
    """
    weight, bias = linear.weight(), linear.bias()
    changed = []
    for index, columns in enumerate(linear.columns):
        if index not in chosen:
            if beside is None:
                part = editor.initializer(f"{columns.name}.weight", weight[:, columns.start : columns.stop])
                (product,) = editor.insert(linear.node, "MatMul", [input_of(linear), part], like=columns.output)
                replace_value(columns.output, product)
            continue
        product = build(columns, weight[:, columns.start : columns.stop], bias)
        changed.append(columns.name)
        if beside is None:
            replace_value(columns.output, product)
        else:
            beside.compare(columns, product, linear.split or linear.node)
    if beside is None:
        editor.graph.remove([linear.split, linear.node] if linear.split else linear.node, safe=True)
    return changed
