"""Putting a quantized product in the place of a linear layer, or beside it with a switch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from effc.passes.quantize_find import Columns, Linear
from effc.passes.quantize_graph import Editor, only_consumer, replace_value
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_plan import input_of

FLAGS = "effc.quantized"
"""Input ``[layers]`` bool of a graph with switches: which layers are quantized in this run."""

Build = Callable[[Columns, Floats, Floats | None], ir.Value]
"""Makes the product of some columns from their weight ``[fan_in, width]`` and the bias inside a Gemm."""


class Switches:
    """Keeps every layer in fp32 beside its quantized form; an input of the graph says which one counts.

    One session then measures any choice of layers, with the very kernels that would be deployed.
    """

    def __init__(self, graph: ir.Graph):
        self.names: list[str] = []
        self._editor = Editor(graph)
        self._flags: ir.Value | None = None
        self._graph = graph

    def choose(self, name: str, columns: Columns, product: ir.Value, behind: ir.Node) -> None:
        """Let the switch ``name`` decide between ``columns.output`` and ``product``."""
        if self._flags is None:
            self._flags = ir.Value(name=FLAGS, shape=ir.Shape(["layers"]), type=ir.TensorType(ir.DataType.BOOL))
            self._graph.inputs.append(self._flags)
        if name not in self.names:
            self.names.append(name)
        index = ir.node("Constant", [], {"value_int": self.names.index(name)})
        flag = ir.node("Gather", [self._flags, index.outputs[0]], {"axis": 0})
        chosen = ir.node("Where", [flag.outputs[0], product, columns.output])
        result = chosen.outputs[0]
        result.shape, result.dtype = columns.output.shape, ir.DataType.FLOAT
        flag.outputs[0].dtype = ir.DataType.BOOL
        self._graph.insert_after(behind, [index, flag, chosen])
        old = columns.output
        for use in list(old.uses()):
            if use.node is not chosen:
                use.node.replace_input_with(use.idx, result)
        if old.is_graph_output():
            self._graph.outputs[list(self._graph.outputs).index(old)] = result
            result.name, old.name = old.name, f"{old.name}/fp32"


def replace_linear(
    editor: Editor, linear: Linear, chosen: Sequence[int], build: Build, switches: Switches | None = None
) -> list[str]:
    """Replace a product; of a packed one, the ``chosen`` parts are built anew and the others become fp32 products.

    Args:
        switches: keep the fp32 product beside the new one.

    Returns:
        names of the parts that were built anew.
    """
    weight, bias = linear.weight(), linear.bias()
    changed = []
    for index, columns in enumerate(linear.columns):
        if index not in chosen:
            if switches is None:
                part = editor.initializer(f"{columns.name}.weight", weight[:, columns.start : columns.stop])
                (product,) = editor.insert(linear.node, "MatMul", [input_of(linear), part], like=columns.output)
                replace_value(columns.output, product)
            continue
        product = build(columns, weight[:, columns.start : columns.stop], bias)
        changed.append(columns.name)
        if switches is None:
            replace_value(columns.output, product)
        else:
            switches.choose(columns.name, columns, product, linear.split or linear.node)
    if switches is None:
        editor.graph.remove([linear.split, linear.node] if linear.split else linear.node, safe=True)
    return changed


def bias_adder(columns: Columns) -> ir.Node | None:
    """The Add of a constant that alone reads the product, or None."""
    return only_consumer(columns.output, "Add")
