"""One GPU's share of a graph: tensor parallelism by TensorRT's ``DistCollective`` (TensorRT 11, NCCL at run time).

Heads and feed-forward units are divided between the ranks; embeddings, norms and heads of the model are on all of
them. Behind each layer whose inputs are divided the ranks add up their partial results, so that all go on with the
same states. The operator's name and attributes are those that TensorRT's ONNX parser reads; it takes any domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.errors import PreconditionError
from effc.exporters.shard_find import ELEMENTWISE, REMEDY, Linear, Plan, find_splits, weight_sizes
from effc.passes.quantize_graph import Editor, constant_of
from effc.plugins.function_body import attach_bodies, geometry_of, is_attention
from effc.plugins.operator import DOMAIN, optional_inputs

COLLECTIVE = "DistCollective"
_PER_HEAD = ("distance_bias", "distance_slope")


@dataclass(frozen=True)
class Split:
    """How a value is divided.

    Attributes:
        axis: counted from the end, negative.
        parts: sizes, before the division, of the stretches of the axis that are each divided.
    """

    axis: int
    parts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Of the axis, before the division."""
        return sum(self.parts)


@dataclass(frozen=True)
class Sharding:
    """What became of a graph: names of the nodes that are divided by outputs and by inputs."""

    columns: list[str]
    rows: list[str]


def shard(model: ir.Model, ranks: int, rank: int) -> Sharding:
    """Leave what ``rank`` of ``ranks`` computes, in place.

    Args:
        model: a forward graph with ``effc::`` operators, quantized by QuantizeLinear and DequantizeLinear or not.

    Raises:
        PreconditionError: naming the layer that cannot be divided.
    """
    plan = find_splits(model.graph)
    sharder = _Sharder(model, plan, ranks, rank)
    sharder.run()
    model.functions.clear()
    attach_bodies(model)
    return Sharding([str(node.name) for node in plan.columns], sharder.rows)


class _Sharder:
    def __init__(self, model: ir.Model, plan: Plan, ranks: int, rank: int):
        self._graph, self._plan, self._ranks, self._rank = model.graph, plan, ranks, rank
        self._editor = Editor(model.graph)
        self.rows: list[str] = []
        self._splits: dict[ir.Value, Split] = {}
        self._sliced: dict[tuple[ir.Value, int, tuple[int, ...]], ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            self._visit(node)
        for value in self._graph.outputs:
            if value in self._splits:
                raise PreconditionError(f"The output '{value.name}' would be divided.", REMEDY)
        for value, split in self._splits.items():
            if value.shape is not None and isinstance(value.shape[split.axis], int):
                dims = list(value.shape)
                dims[split.axis] = split.size // self._ranks
                value.shape = ir.Shape(dims)
        self._editor.drop_unused_initializers()

    def _visit(self, node: ir.Node) -> None:
        divided = {index: self._splits[v] for index, v in enumerate(node.inputs) if v is not None and v in self._splits}
        if node in self._plan.columns:
            if divided:
                raise self._cannot(node)
            self._column(self._plan.linears[node], self._plan.columns[node])
        elif is_attention(node):
            self._attention(node, divided)
        elif not divided:
            return
        elif node in self._plan.linears:
            self._row(self._plan.linears[node], divided)
        elif node.domain != "":
            raise self._cannot(node)
        elif node.op_type in ELEMENTWISE:
            self._elementwise(node, divided)
        else:
            handler = getattr(self, f"_{node.op_type.lower()}", None)
            if handler is None or 0 not in divided:
                raise self._cannot(node)
            handler(node, divided[0])

    def _cannot(self, node: ir.Node) -> PreconditionError:
        return PreconditionError(f"'{node.name}' ({node.op_type}) cannot be divided between GPUs.", REMEDY)

    def _even(self, node: ir.Node, what: str, number: int) -> int:
        if number % self._ranks:
            raise PreconditionError(
                f"'{node.name}' has {number} {what}, which {self._ranks} GPUs cannot share evenly.",
                "Give another number in --tensor-parallel.",
            )
        return number // self._ranks

    # --- layers ---

    def _column(self, linear: Linear, parts: tuple[int, ...]) -> None:
        node = linear.node
        for part in parts:
            self._even(node, "outputs", part)
        node.replace_input_with(1, self._slice(node, linear.weight, linear.outputs_axis - 2, parts))
        if linear.bias is not None:
            node.replace_input_with(2, self._slice(node, linear.bias, -1, parts))
        self._splits[node.outputs[0]] = Split(-1, parts)

    def _row(self, linear: Linear, divided: dict[int, Split]) -> None:
        node, split = linear.node, divided.get(0)
        if split is None or len(divided) > 1 or split.axis != -1:
            raise self._cannot(node)
        node.replace_input_with(1, self._slice(node, linear.weight, linear.inputs_axis - 2, split.parts))
        if linear.bias is not None and self._rank:
            tensor = constant_of(linear.bias)
            assert tensor is not None
            # Once is enough.
            node.replace_input_with(
                2, self._editor.initializer(f"{linear.bias.name}_zero", np.zeros_like(tensor.numpy()))
            )
        self.rows.append(str(node.name))
        partial = node.outputs[0]
        # The sum stands for what the whole layer would give, and so has its name, should it be an output.
        name, partial.name = partial.name, f"{partial.name}_partial"
        attributes: dict[str, str | int] = {
            "collective_operation": "all_reduce",
            "reduce_op": "sum",
            "root": -1,
            "nb_rank": self._ranks,
        }
        add = ir.node(COLLECTIVE, [partial], attributes, domain=DOMAIN, name=f"{node.name}/all_reduce")
        whole = add.outputs[0]
        whole.name, whole.type, whole.shape = name, partial.type, partial.shape
        self._graph.insert_after(node, add)
        ir.convenience.replace_all_uses_with(partial, whole, replace_graph_outputs=True)
        add.replace_input_with(0, partial)

    def _attention(self, node: ir.Node, divided: dict[int, Split]) -> None:
        geometry = geometry_of(node)
        heads = self._even(node, "heads", geometry.num_heads)
        kv_heads = self._even(node, "key/value heads", geometry.kv_heads)
        widths = [count * geometry.head_dim for count in (geometry.num_heads, geometry.kv_heads, geometry.kv_heads)]
        if divided != {index: Split(-1, (width,)) for index, width in enumerate(widths)}:
            raise self._cannot(node)
        for index, name in enumerate(optional_inputs(geometry.form), 3):
            if name in _PER_HEAD and index < len(node.inputs) and (value := node.inputs[index]) is not None:
                tensor = constant_of(value)
                if tensor is None:
                    raise self._cannot(node)
                axis = -len(tensor.shape)
                node.replace_input_with(index, self._slice(node, value, axis, (geometry.num_heads,)))
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", kv_heads)
        self._splits[node.outputs[0]] = Split(-1, (widths[0],))

    # --- what stands between them ---

    def _elementwise(self, node: ir.Node, divided: dict[int, Split]) -> None:
        [split, *others] = set(divided.values())
        if others:
            raise self._cannot(node)
        scales = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for index, value in enumerate(node.inputs):
            if value is None or index in divided or (tensor := constant_of(value)) is None:
                if value is not None and index not in divided and _size(value, split.axis) != 1:
                    raise self._cannot(node)
                continue
            if scales:
                # ONNX Runtime has the one scale of an activation beside each number of the last axis.
                if tensor.size != 1 and split.axis != -1:
                    raise self._cannot(node)
                if tensor.size != 1:
                    node.replace_input_with(index, self._slice(node, value, -1, split.parts))
            elif len(tensor.shape) >= -split.axis and tensor.shape[split.axis] != 1:
                node.replace_input_with(index, self._slice(node, value, split.axis, split.parts))
        self._splits[node.outputs[0]] = split

    def _transpose(self, node: ir.Node, split: Split) -> None:
        order = list(node.attributes["perm"].as_ints())
        self._splits[node.outputs[0]] = Split(order.index(len(order) + split.axis) - len(order), split.parts)

    def _split(self, node: ir.Node, split: Split) -> None:
        sizes = tuple(_size(output, split.axis) for output in node.outputs)
        axis = node.attributes.get_int("axis", 0)
        if axis - (len(node.outputs[0].shape or ()) if axis >= 0 else 0) != split.axis or sizes != split.parts:
            raise self._cannot(node)
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            own = self._editor.initializer(f"{node.name}_sizes", np.array(sizes, np.int64) // self._ranks)
            node.replace_input_with(1, own)
        for output, size in zip(node.outputs, sizes, strict=True):
            self._splits[output] = Split(split.axis, (size,))

    def _rotaryembedding(self, node: ir.Node, split: Split) -> None:
        heads = node.attributes.get_int("num_heads", 0)
        if heads:
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", self._even(node, "heads", heads))
        self._splits[node.outputs[0]] = split

    def _rmsnormalization(self, node: ir.Node, split: Split) -> None:
        axis, rank = node.attributes.get_int("axis", -1), len(node.outputs[0].shape or ())
        if rank == 0 or (axis if axis < 0 else axis - rank) <= split.axis:
            raise self._cannot(node)
        self._splits[node.outputs[0]] = split

    _layernormalization = _rmsnormalization

    def _shape(self, node: ir.Node, split: Split) -> None:
        value = node.inputs[0]
        rank = len(value.shape or ()) if value is not None else 0
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
        if not rank or range(rank)[split.axis] in range(rank)[start:end]:
            raise self._cannot(node)

    def _reshape(self, node: ir.Node, split: Split) -> None:
        """Heads are taken apart from or joined with the numbers in them; what stands before them is untouched."""
        value, target = node.inputs[0], node.inputs[1]
        before, after = _dims(value), _dims(node.outputs[0])
        if not before or not after or target is None:
            raise self._cannot(node)
        tail = 0
        while tail < min(len(before), len(after)) and before[-1 - tail] == after[-1 - tail]:
            tail += 1
        if -split.axis <= tail:
            axis = split.axis
        else:
            # The divided axis must vary slowest among those that change, on both sides.
            count = len(before) + split.axis
            inner = [before[count:], after[len(after) - self._width(after, before[count:]) :]]
            if not inner[1] or inner[1][0] % self._ranks:
                raise self._cannot(node)
            axis = -len(inner[1])
        local = after[axis]
        if local < 0 or (len(split.parts) > 1 and local != split.size):
            raise self._cannot(node)
        node.replace_input_with(1, self._target(node, target, len(after) + axis))
        parts = split.parts if local == split.size else (local,)
        self._splits[node.outputs[0]] = Split(axis, parts)

    @staticmethod
    def _width(after: Sequence[int], inner: Sequence[int]) -> int:
        """How many of the last dimensions hold as many numbers as ``inner``; 0 if that does not come out."""
        wanted, found = int(np.prod(inner)), 1
        for count, dim in enumerate(reversed(after), 1):
            found *= dim
            if dim < 0 or wanted < 0 or found > wanted:
                return 0
            if found == wanted:
                return count
        return 0

    def _target(self, node: ir.Node, target: ir.Value, place: int) -> ir.Value:
        """The shape to reshape to, its entry ``place`` divided."""
        tensor = constant_of(target)
        if tensor is not None:
            return self._divided(target, tensor.numpy(), place)
        join = target.producer()
        if join is None or join.op_type != "Concat":
            raise self._cannot(node)
        inputs, first = list(join.inputs), 0
        for index, piece in enumerate(inputs):
            length = _dims(piece)
            if piece is None or len(length) != 1 or length[0] < 0:
                raise self._cannot(node)
            if first <= place < first + length[0]:
                constant = constant_of(piece)
                if constant is None:
                    raise self._cannot(node)
                inputs[index] = self._divided(piece, constant.numpy(), place - first)
            first += length[0]
        return self._editor.insert(node, "Concat", inputs, {"axis": 0}, like=target, dtype=ir.DataType.INT64)[0]

    def _divided(self, value: ir.Value, dims: np.ndarray, place: int) -> ir.Value:
        if dims[place] <= 0:
            return value
        changed = dims.copy()
        changed[place] //= self._ranks
        return self._editor.initializer(f"{value.name}_shard", changed)

    # --- constants ---

    def _slice(self, node: ir.Node, value: ir.Value, axis: int, parts: tuple[int, ...]) -> ir.Value:
        """This rank's share of a constant, or of what is made of one."""
        key = (value, axis, parts)
        if key not in self._sliced:
            self._sliced[key] = self._made(node, value, axis, parts)
        return self._sliced[key]

    def _made(self, node: ir.Node, value: ir.Value, axis: int, parts: tuple[int, ...]) -> ir.Value:
        tensor = constant_of(value)
        if tensor is not None:
            array = tensor.numpy()
            if array.shape[axis] != sum(parts):
                raise self._cannot(node)
            places, first = [], 0
            for part in parts:
                share = part // self._ranks
                places.append(np.arange(first + self._rank * share, first + (self._rank + 1) * share))
                first += part
            own = np.ascontiguousarray(np.take(array, np.concatenate(places), axis=axis))
            made = self._editor.initializer(f"{value.name}_shard", own)
            made.dtype = tensor.dtype
            return made
        maker = value.producer()
        assert maker is not None
        inputs = list(maker.inputs)
        inner = axis
        if maker.op_type == "Transpose":
            order = list(maker.attributes["perm"].as_ints())
            inner = order[axis] - len(order)
        rank = len(weight_sizes(inputs[0]))
        inputs[0] = self._slice(node, _given(inputs[0]), inner, parts)
        if maker.op_type == "Reshape":
            target = constant_of(inputs[1])
            if target is None:
                raise self._cannot(node)
            inputs[1] = self._divided(_given(inputs[1]), target.numpy(), axis)
        if maker.op_type == "DequantizeLinear":
            scaled = maker.attributes.get_int("axis", 1)
            for index in range(1, len(inputs)):
                scale = inputs[index]
                each = scale is not None and len(weight_sizes(scale)) == 1 and weight_sizes(scale)[0] > 1
                if scale is not None and each and (scaled - rank if scaled >= 0 else scaled) == axis:
                    inputs[index] = self._slice(node, scale, -1, parts)
        copy = ir.Node(maker.domain, maker.op_type, inputs, list(maker.attributes.values()))
        copy.outputs[0].type = value.type
        self._graph.insert_before(node, copy)
        if value.shape is not None:
            dims = list(value.shape)
            dims[axis] = sum(parts) // self._ranks
            copy.outputs[0].shape = ir.Shape(dims)
        return copy.outputs[0]


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _dims(value: ir.Value | None) -> list[int]:
    """Dimensions of a value, -1 for those that vary; empty if its shape is not known."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else -1 for dim in value.shape]


def _size(value: ir.Value, axis: int) -> int:
    """Of an axis counted from the end; 1 where the value has none there, -1 if it varies."""
    dims = _dims(value)
    return dims[axis] if len(dims) >= -axis else 1
