"""Split a graph between its attention layers into stages of about equal weight, each a graph of its own.

What later stages need of earlier ones is handed on, unless it is cheap to compute again from the graph's inputs: masks,
rotary angles, sizes. So what passes from stage to stage is hidden states, and every passed tensor has the batch first,
as Triton wants it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir

from effc.compiler.manifest import TensorRecord
from effc.errors import UsageError

_BATCH = "batch"
_CHEAP_BYTES = 1 << 20
# Products with weights are work, except for those with a handful of numbers, as rotary embeddings have.
_CHEAP_PRODUCT_BYTES = 1 << 12
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "Conv")
# What a dimension that varies counts for when the sizes of tensors are compared.
_ANY_LENGTH = 128
_IMPOSSIBLE = math.inf


@dataclass(frozen=True)
class Stage:
    """One part of a graph.

    Attributes:
        inputs, outputs: of the part; those that are no inputs or outputs of the whole pass between stages.
        weights: bytes of its initializers.
    """

    model: ir.Model
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    weights: int

    def save(self, path: Path) -> None:
        """Write it, its weights beside it as ``<name>.data``."""
        ir.save(self.model, str(path), external_data=f"{path.name}.data")


def split_graph(path: Path, layers: Collection[str], count: int) -> list[Stage]:
    """Split a graph into ``count`` stages.

    Args:
        path: an ONNX file with shapes; its weights stay where they are until a stage is saved.
        layers: names of the nodes that are attention layers.

    Raises:
        UsageError: if there are more stages than layers, or nothing can be handed on between two layers.
    """
    source = ir.load(str(path))
    graph = source.graph
    nodes = list(graph)
    light = _light(graph)
    places = [number for number, node in enumerate(nodes) if node.name in layers]
    if count > len(places):
        raise UsageError(
            f"The graph has {len(places)} attention layer{'s' if len(places) != 1 else ''}, which cannot be split into "
            f"{count} stages.",
            f"Give at most {max(1, len(places))}.",
        )
    costs = _costs(nodes, graph, light)
    cuts = [_cheapest(costs, before, after) for before, after in pairwise(places)]
    usable = [cut for cut in cuts if cut is not None]
    if count > len(usable) + 1:
        raise UsageError(
            f"Only {len(usable)} of the {len(cuts)} boundaries between layers can be cut: across the others go tensors "
            "without a batch dimension.",
            f"Give at most {len(usable) + 1} stages.",
        )
    bounds = [0, *usable, len(nodes)]
    segments = [_weights(nodes[low:high], light) for low, high in pairwise(bounds)]
    ends = [bounds[end] for end in [0, *_balance(segments, count)]]
    return _stages(source, nodes, light, ends)


def _light(graph: ir.Graph) -> set[ir.Value]:
    """Values that are computed from the graph's inputs and small constants alone."""
    found = set(graph.inputs)
    found |= {value for value in graph.initializers.values() if _bytes(value) <= _CHEAP_BYTES}
    for node in graph:
        cheap = all(value is None or value in found for value in node.inputs) and node.domain in ("", "com.microsoft")
        if cheap and node.op_type in _PRODUCTS:
            cheap = all(value is None or _bytes(value) <= _CHEAP_PRODUCT_BYTES for value in node.inputs)
        if cheap:
            found.update(node.outputs)
    return found


def _costs(nodes: Sequence[ir.Node], graph: ir.Graph, light: set[ir.Value]) -> list[float]:
    """What would have to be handed on if the graph were cut before each node."""
    last: dict[ir.Value, int] = {}
    for number, node in enumerate(nodes):
        for value in _needed(node):
            last[value] = number
    costs = [0.0] * (len(nodes) + 1)
    for number, node in enumerate(nodes):
        for value in node.outputs:
            if value in light or value not in last:
                continue
            for place in range(number + 1, last[value] + 1):
                costs[place] += _size(value)
    return costs


def _needed(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node, and what graphs inside of it take from around it."""
    inner = [
        value
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for inside in ([attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value)
        for deeper in inside.all_nodes()
        for value in deeper.inputs
        if value is not None
    ]
    return [value for value in node.inputs if value is not None] + inner


def _size(value: ir.Value) -> float:
    """Bytes of a tensor, per row of the batch; infinite for one that cannot pass between Triton models."""
    if value.shape is None or value.dtype is None or not value.shape:
        return _IMPOSSIBLE
    first, *rest = value.shape
    if isinstance(first, int) or first.value != _BATCH or any(not isinstance(d, int) and not d.value for d in rest):
        return _IMPOSSIBLE
    return math.prod(size if isinstance(size, int) else _ANY_LENGTH for size in rest) * value.dtype.itemsize


def _cheapest(costs: Sequence[float], before: int, after: int) -> int | None:
    """The last of the best places between two layers; None if nothing can pass at any of them."""
    best = min(range(before + 1, after + 1), key=lambda place: (costs[place], -place))
    return best if costs[best] < _IMPOSSIBLE else None


def _weights(nodes: Sequence[ir.Node], light: set[ir.Value]) -> dict[ir.Value, int]:
    """Bytes of the weights that nodes use; what stages compute again is not counted."""
    working = [node for node in nodes if not all(value in light for value in node.outputs)]
    return {value: _bytes(value) for node in working for value in _needed(node) if value.is_initializer()}


def _balance(segments: Sequence[Mapping[ir.Value, int]], count: int) -> list[int]:
    """Ends of ``count`` runs of segments, as equal in weight as can be: with the least sum of squares."""
    total = len(segments)
    # A weight that several segments of a run share (a tied embedding) is there once.
    squares: dict[tuple[int, int], float] = {}
    for start in range(total):
        held: dict[ir.Value, int] = {}
        for end in range(start + 1, total + 1):
            held.update(segments[end - 1])
            squares[start, end] = float(sum(held.values())) ** 2
    # What the first `end` segments come to in the runs so far.
    best = [0.0, *(squares[0, end] for end in range(1, total + 1))]
    starts: list[list[int]] = []
    for runs in range(2, count + 1):
        rows = [
            min(((best[start] + squares[start, end], start) for start in range(runs - 1, end)), default=(math.inf, 0))
            for end in range(total + 1)
        ]
        best = [cost for cost, _ in rows]
        starts.append([start for _, start in rows])
    ends = [total]
    for row in reversed(starts):
        ends.append(row[ends[-1]])
    return ends[::-1]


def _stages(source: ir.Model, nodes: Sequence[ir.Node], light: set[ir.Value], ends: Sequence[int]) -> list[Stage]:
    graph = source.graph
    made_in = {
        value: stage
        for stage, (low, high) in enumerate(pairwise(ends))
        for node in nodes[low:high]
        for value in node.outputs
        if value not in light
    }
    outputs = [[value for value in graph.outputs if made_in.get(value, 0) == stage] for stage in range(len(ends) - 1)]
    inputs: list[list[ir.Value]] = [[] for _ in outputs]
    # From the last one on, because what a stage needs has to be given by one before it.
    for stage in reversed(range(len(outputs))):
        inputs[stage] = _taken(outputs[stage], stage, made_in, graph)
        for value in inputs[stage]:
            if value in made_in and value not in outputs[made_in[value]]:
                outputs[made_in[value]].append(value)
    return [_stage(source, taken, given) for taken, given in zip(inputs, outputs, strict=True)]


def _taken(outputs: Sequence[ir.Value], stage: int, made_in: dict[ir.Value, int], graph: ir.Graph) -> list[ir.Value]:
    """What a stage needs from outside to compute its outputs: inputs of the graph first, in their order."""
    found: set[ir.Value] = set()
    passed: list[ir.Value] = []
    waiting, seen = list(outputs), set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in graph.inputs:
            found.add(value)
        elif made_in.get(value, stage) != stage:
            passed.append(value)
        elif (node := value.producer()) is not None:
            waiting += _needed(node)
    return [value for value in graph.inputs if value in found] + sorted(passed, key=lambda value: str(value.name))


def _stage(source: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> Stage:
    part = ir.convenience.extract(source.graph, inputs, outputs)
    used = {node.op_identifier() for node in part.all_nodes()}
    functions = _functions(source, used)
    model = ir.Model(
        part,
        ir_version=source.ir_version,
        producer_name=source.producer_name,
        functions=functions,
        metadata_props=dict(source.metadata_props),
    )
    model.opset_imports.update(source.opset_imports)
    weights = sum(_bytes(value) for value in part.initializers.values())
    return Stage(model, tuple(map(_record, inputs)), tuple(map(_record, outputs)), weights)


def _functions(source: ir.Model, used: set[ir.OperatorIdentifier]) -> list[ir.Function]:
    """The functions of these operators, and those that they call."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    waiting = list(used)
    while waiting:
        name = waiting.pop()
        function = source.functions.get(name)
        if function is None or name in found:
            continue
        found[name] = function
        waiting += [node.op_identifier() for node in function.all_nodes()]
    return list(found.values())


def _record(value: ir.Value) -> TensorRecord:
    assert value.dtype is not None and value.shape is not None
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return TensorRecord(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
