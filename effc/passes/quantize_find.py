"""Find what can be quantized in an ONNX graph: linear layers and embedding tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.passes.quantize_graph import constant_of, module_of, only_consumer
from effc.passes.quantize_numbers import Floats

PART = "effc.part_of_quantized"
"""Metadata of a product that belongs to a quantized layer."""
PRODUCTS = frozenset({("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")})


@dataclass
class Columns:
    """Output columns of a linear layer that belong to one torch module, e.g. the query part of a packed projection.

    Attributes:
        name: the module, or the best substitute the graph offers.
        start, stop: the columns.
        output: what reads as this module's product.
    """

    name: str
    start: int
    stop: int
    output: ir.Value


@dataclass
class Linear:
    """A MatMul, Gemm or FusedMatMul with constant weights.

    Attributes:
        node: the product.
        columns: more than one where a Split takes a packed projection apart.
        split: that Split.
    """

    node: ir.Node
    columns: list[Columns]
    split: ir.Node | None = None

    @property
    def fan_in(self) -> int:
        """Width of the input."""
        return self._shape()[0]

    @property
    def fan_out(self) -> int:
        """Width of the output."""
        return self._shape()[1]

    @property
    def weight_name(self) -> str:
        """Name of the weight in the graph."""
        weight = self.node.inputs[1]
        assert weight is not None
        return str(weight.name)

    @property
    def dtype(self) -> ir.DataType:
        """Type of the weight."""
        return self._tensor().dtype

    def weight(self) -> Floats:
        """The weight as ``[fan_in, fan_out]``; a view of the stored one where possible."""
        array = self._tensor().numpy()
        return array.T if self._transposed() else array

    def bias(self) -> Floats | None:
        """The bias ``[fan_out]`` inside a Gemm; a MatMul has none."""
        if self.node.op_type != "Gemm" or len(self.node.inputs) < 3:
            return None
        tensor = constant_of(self.node.inputs[2])
        return None if tensor is None else np.broadcast_to(tensor.numpy().reshape(-1), (self.fan_out,))

    def _tensor(self) -> ir.TensorProtocol:
        tensor = _weight_tensor(self.node)
        assert tensor is not None
        return tensor

    def _transposed(self) -> bool:
        turned = _transpose_behind(self.node.inputs[1]) is not None
        return turned != (self.node.attributes.get_int("transB", 0) != 0)

    def _shape(self) -> tuple[int, int]:
        rows, columns = (int(size) for size in self._tensor().shape.numpy())
        return (columns, rows) if self._transposed() else (rows, columns)


@dataclass
class Embedding:
    """A Gather of rows of a constant table."""

    node: ir.Node
    name: str

    @property
    def table_name(self) -> str:
        """Name of the table in the graph."""
        table = self.node.inputs[0]
        assert table is not None
        return str(table.name)

    def tensor(self) -> ir.TensorProtocol:
        """The table ``[rows, width]``."""
        tensor = constant_of(self.node.inputs[0])
        assert tensor is not None
        return tensor


def find_linears(graph: ir.Graph) -> Iterator[Linear]:
    """Every product of the graph whose second input is a constant matrix, in graph order.

    Those that are a quantized layer's own are not among them.
    """
    for node in graph:
        if PART in node.metadata_props:
            continue
        if (node.domain, node.op_type) in PRODUCTS and _weight_tensor(node) is not None:
            yield _linear(node)


def find_embeddings(graph: ir.Graph) -> Iterator[Embedding]:
    """Every Gather of rows of a constant matrix of floats, in graph order."""
    for node in graph:
        if node.domain == "" and node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            tensor = constant_of(node.inputs[0])
            if tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point():
                yield Embedding(node, _name(node, node.inputs[0]))


def _linear(node: ir.Node) -> Linear:
    linear = Linear(node, [])
    split = only_consumer(node.outputs[0], "Split")
    sizes = None if split is None else _split_sizes(split, linear.fan_out, rank=_rank(node.outputs[0]))
    if split is None or sizes is None or node.op_type != "MatMul":
        linear.columns = [Columns(_name(node, node.inputs[1]), 0, linear.fan_out, node.outputs[0])]
        return linear
    stops = np.cumsum(sizes).tolist()
    names = _names_of_parts(split, linear.weight_name)
    linear.split = split
    linear.columns = [
        Columns(name, stop - size, stop, output)
        for name, size, stop, output in zip(names, sizes, stops, split.outputs, strict=True)
    ]
    return linear


def _weight_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    value = node.inputs[1]
    turn = _transpose_behind(value)
    tensor = constant_of(turn.inputs[0] if turn is not None else value)
    if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        return None
    return tensor


def _transpose_behind(value: ir.Value | None) -> ir.Node | None:
    """The Transpose that turns a constant matrix into ``value``: exporters leave it where folding would cost space."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or node.domain != "":
        return None
    return node if tuple(node.attributes.get_ints("perm", [1, 0])) == (1, 0) else None


def _split_sizes(split: ir.Node, width: int, rank: int | None) -> list[int] | None:
    """Widths of the parts, or None if ``split`` does not take the last axis apart or takes unknown parts."""
    axis = split.attributes.get_int("axis", 0)
    if axis != -1 and (rank is None or axis != rank - 1):
        return None
    if len(split.inputs) > 1 and split.inputs[1] is not None:
        sizes = constant_of(split.inputs[1])
        return None if sizes is None else [int(size) for size in sizes.numpy()]
    parts = len(split.outputs)
    return [width // parts] * parts if width % parts == 0 else None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _name(node: ir.Node, weight: ir.Value | None) -> str:
    return module_of(node) or (str(weight.name).removesuffix(".weight") if weight is not None else str(node.name))


def _names_of_parts(split: ir.Node, weight_name: str) -> list[str]:
    """Names for the parts of a packed projection, whose packing has lost the names of the modules packed.

    The bias of each module is still added under its name. Without a bias, the parts are numbered below the module that
    reads all of them.
    """
    readers = [_first_module_behind(output) for output in split.outputs]
    modules = [module or "" for module, _ in readers]
    if all(modules) and len(set(modules)) == len(modules) and all(linear for _, linear in readers):
        return modules
    common = os.path.commonprefix([module.split(".") for module in modules])  # noqa: RUF071 - of lists of names
    parent = ".".join(common) or weight_name
    return [f"{parent}.part{index}" for index in range(len(modules))]


def _first_module_behind(value: ir.Value) -> tuple[str | None, bool]:
    """The module of the nearest named node behind ``value``, and whether that module is the linear layer itself."""
    waiting = [use.node for use in value.uses()]
    for reader in waiting[:16]:
        if (module := module_of(reader)) is not None:
            kind = reader.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
            return module, "torch.nn.modules.linear.Linear" in kind and reader.op_type == "Add"
        waiting += [use.node for output in reader.outputs for use in output.uses()]
    return None, False
