"""Small edits of an onnx_ir graph that quantization makes again and again."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


class Editor:
    """Inserts nodes before a given one, and initializers under free names."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph

    def initializer(self, name: str, array: npt.NDArray[Any] | np.generic) -> ir.Value:
        """Register ``array`` under ``name``, or ``name_1``, ``name_2``... where that is taken."""
        free, tries = name, 0
        while free in self.graph.initializers:
            tries += 1
            free = f"{name}_{tries}"
        tensor = ir.tensor(np.asarray(array), name=free)
        value = ir.Value(
            name=free, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Iterable[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        num_outputs: int = 1,
        origin: ir.Node | None = None,
    ) -> list[ir.Value]:
        """Insert a node of the default domain; its outputs.

        Args:
            before: the node to stand before.
            like: a value whose shape the first output has.
            dtype: type of the first output, float32 if not given.
            origin: the node whose metadata (module names) the new one inherits.
        """
        node = ir.node(op_type, list(inputs), attributes=dict(attributes or {}), num_outputs=num_outputs)
        if origin is not None:
            node.metadata_props.update(origin.metadata_props)
        if like is not None:
            node.outputs[0].shape = like.shape
        node.outputs[0].dtype = dtype or ir.DataType.FLOAT
        self.graph.insert_before(before, node)
        return list(node.outputs)

    def drop_unused_initializers(self) -> None:
        """Unregister initializers that no node reads any more."""
        outputs = set(self.graph.outputs)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs:
                del self.graph.initializers[name]


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node, or None for a value computed at run time."""
    return None if value is None else ir.convenience.get_const_tensor(value)


def module_of(node: ir.Node) -> str | None:
    """The torch module whose forward call made ``node``, as the exporter noted it."""
    noted = node.metadata_props.get(SCOPES)
    scopes = ast.literal_eval(noted) if noted else []
    return str(scopes[-2]) if len(scopes) >= 2 and scopes[-2] else None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` stand for ``old`` everywhere, under its name, also as a model output."""
    name, old.name = old.name, None
    new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def only_consumer(value: ir.Value, op_type: str | None = None) -> ir.Node | None:
    """The one node that reads ``value`` (and is an ``op_type``), None if there are others or it is a model output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if op_type is None or (node.op_type == op_type and node.domain == "") else None


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all weights and other constants that are stored beside the graph."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
