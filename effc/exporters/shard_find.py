"""Which linear layers of a graph are split across GPUs, and how (Megatron-LM, Shoeybi et al., 2019).

Layers in front of attention, and those in front of a feed-forward layer's activation, give every GPU a share of their
outputs (*columns*); the layer behind takes that share of its inputs (*rows*) and gives partial sums of all outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.quantize_graph import constant_of
from effc.plugins.function_body import is_attention

REMEDY = "Split the model into stages (effc triton --stages) instead, or compile without --tensor-parallel."
ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Gelu", "Swish"}
    | {"HardSwish", "HardSigmoid", "Softplus", "Elu", "Selu", "Neg", "Abs", "Sqrt", "Exp", "Log", "Clip", "Cast"}
    | {"Identity", "QuantizeLinear", "DequantizeLinear"}
)
_FIRST_ONLY = frozenset({"Reshape", "Transpose", "Split", "RotaryEmbedding", "RMSNormalization", "LayerNormalization"})
_WEIGHT_CARRIERS = ("DequantizeLinear", "Cast", "Transpose", "Reshape")


@dataclass(frozen=True)
class Linear:
    """A product of states with a constant matrix; the axes are those of ``weight``."""

    node: ir.Node
    data: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    inputs_axis: int
    outputs_axis: int

    @property
    def outputs(self) -> int:
        """How many numbers it gives per token."""
        return weight_sizes(self.weight)[self.outputs_axis]


@dataclass
class Plan:
    """What is split.

    Attributes:
        linears: all products with constant matrices, by their nodes.
        columns: those whose outputs are divided, with the sizes of the parts that are each divided: fused projections
            have several.
        rows: nodes of those whose inputs are.
    """

    linears: dict[ir.Node, Linear]
    columns: dict[ir.Node, tuple[int, ...]] = field(default_factory=dict)
    rows: set[ir.Node] = field(default_factory=set)


def find_splits(graph: ir.Graph) -> Plan:
    """Attention layers with the projections around them, and feed-forward layers; what fits neither stays whole.

    Raises:
        PreconditionError: if there is no attention, or one of whose projections cannot be told.
    """
    plan = Plan({linear.node: linear for node in graph if (linear := _linear(node)) is not None})
    layers = [node for node in graph if is_attention(node)]
    if not layers:
        raise PreconditionError(
            "No attention layer of this model is an operator of effc, so none can be split.", REMEDY
        )
    for node in layers:
        for value in node.inputs[:3]:
            found = _leaves(plan, value, ELEMENTWISE | _FIRST_ONLY)
            if found is None:
                raise PreconditionError(f"What computes the inputs of '{node.name}' cannot be split.", REMEDY)
            for leaf in found[0]:
                plan.columns[leaf] = _parts(plan.linears[leaf])
    for node, linear in plan.linears.items():
        if node in plan.columns or node in plan.rows:
            continue
        found = _leaves(plan, linear.data, ELEMENTWISE | {"Reshape", "Split"})
        if found is None or not found[0] or found[0] & (plan.rows | plan.columns.keys()):
            continue
        leaves, between = found
        if all(
            use.node in between | {node}
            for inner in leaves | between
            for value in inner.outputs
            for use in value.uses()
        ):
            plan.columns |= {leaf: _parts(plan.linears[leaf]) for leaf in leaves}
            plan.rows.add(node)
    return plan


def _linear(node: ir.Node) -> Linear | None:
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or len(weight_sizes(weight)) != 2:
        return None
    turned = node.attributes.get_int("transB", 0) == 1
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_int("transA", 0) or (bias is not None and constant_of(bias) is None):
        return None
    return Linear(node, data, weight, bias, int(turned), int(not turned))


def weight_sizes(value: ir.Value | None) -> list[int]:
    """Dimensions of a constant, or of what is made of one by rounding and turning; empty for anything else."""
    if value is None or constant_of(value) is not None:
        return [] if value is None else _sizes(value)
    node = value.producer()
    if node is None or node.op_type not in _WEIGHT_CARRIERS:
        return []
    sizes = weight_sizes(node.inputs[0])
    if node.op_type == "Reshape":
        # FP8 weights are scaled as [1, inputs, outputs] for ONNX Runtime.
        target = constant_of(node.inputs[1])
        plain = target is not None and len(sizes) == 3 and target.numpy().tolist() == sizes[1:]
        return sizes[1:] if plain else []
    return [sizes[axis] for axis in node.attributes["perm"].as_ints()] if node.op_type == "Transpose" else sizes


def _leaves(plan: Plan, value: ir.Value | None, through: Iterable[str]) -> tuple[set[ir.Node], set[ir.Node]] | None:
    """The linear layers that a value comes from and the nodes between; None if it comes from anything else as well."""
    leaves: set[ir.Node] = set()
    between: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value is None or constant_of(value) is not None:
            continue
        node = value.producer()
        if node is None:
            return None
        if node in plan.linears:
            leaves.add(node)
        elif node.domain == "" and node.op_type in through:
            if node not in between:
                between.add(node)
                waiting += node.inputs[:1] if node.op_type in _FIRST_ONLY else node.inputs
        else:
            return None
    return leaves, between


def _parts(linear: Linear) -> tuple[int, ...]:
    """Sizes of what a fused projection's outputs are taken apart into, or the one size there is."""
    waiting, width = [linear.node.outputs[0]], linear.outputs
    while waiting:
        value = waiting.pop()
        for use in value.uses():
            node = use.node
            if node.op_type == "Split" and node.domain == "" and _sizes(value)[-1:] == [width]:
                return tuple(_sizes(output)[-1] for output in node.outputs)
            if node.op_type in ("Add", "Reshape", "Cast") and _sizes(node.outputs[0])[-1:] == [width]:
                waiting.append(node.outputs[0])
    return (width,)


def _sizes(value: ir.Value) -> list[int]:
    """Dimensions; -1 for those that vary."""
    tensor = constant_of(value)
    shape = value.shape if tensor is None else tensor.shape
    return [] if shape is None else [dim if isinstance(dim, int) else -1 for dim in shape]
