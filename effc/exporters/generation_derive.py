"""The forward graph with positions as an input, made from the forward graph without, so that it need not be exported.

A causal model that is not told positions counts them off: ``Range`` from 0. Where every use of that count is as a row
for the whole batch, the input ``position_ids [batch, length]`` can take its place. Nothing here is trusted: the caller
proves the graph against torch, and exports the model anew where this gives up or is wrong.
"""

from __future__ import annotations

import onnx_ir as ir

from effc.passes.quantize_graph import constant_of

POSITIONS = "position_ids"
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Clip"})
_END = 2**63 - 1


def take_positions(graph: ir.Graph) -> bool:
    """Let ``position_ids`` take the place of positions that are counted off, in place.

    Returns:
        False, the graph untouched, where there is no such count or it is used in another way.
    """
    counts = [node for node in graph if node.op_type == "Range" and _number(node.inputs[0]) == 0]
    rows: list[tuple[ir.Node, list[int]]] = []
    for count in counts:
        for use in count.outputs[0].uses():
            tensor = constant_of(use.node.inputs[1]) if use.node.op_type == "Unsqueeze" else None
            axes = [] if tensor is None else sorted(int(axis) for axis in tensor.numpy().reshape(-1))
            if not axes or axes[0] != 0:
                return False
            rows.append((use.node, axes[1:]))
    if not rows:
        return False
    positions = ir.Value(name=POSITIONS, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(positions)
    for node, axes in rows:
        former, replacement = node.outputs[0], positions
        if axes:
            constant = ir.node("Constant", [], {"value_ints": axes})
            placed = ir.node("Unsqueeze", [positions, constant.outputs[0]])
            graph.insert_before(node, [constant, placed])
            replacement = placed.outputs[0]
            replacement.type, replacement.shape = former.type, former.shape
        ir.convenience.replace_all_uses_with(former, replacement)
        graph.remove(node, safe=True)
        _spread_batch(replacement)
    for count in counts:
        if not count.outputs[0].uses():
            graph.remove(count, safe=True)
    return True


def keep_last_position(graph: ir.Graph) -> bool:
    """Let the head compute logits of the last position only, in place.

    Returns:
        False, the graph untouched, where no product with a matrix is found that gives the logits.
    """
    logits = next(value for value in graph.outputs if value.name == "logits")
    between, node = [logits], logits.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        inputs = [value for value in node.inputs if value is not None and constant_of(value) is None]
        if len(inputs) != 1:
            return False
        between.append(inputs[0])
        node = inputs[0].producer()
    if node is None or node.op_type not in ("MatMul", "Gemm") or len(logits.shape or ()) != 3:
        return False
    states = node.inputs[0]
    if states is None or states.shape is None or len(states.shape) != 3:
        return False
    bounds = [ir.node("Constant", [], {"value_ints": [number]}) for number in (-1, _END, 1)]
    last = ir.node("Slice", [states, *(bound.outputs[0] for bound in bounds)])
    last.outputs[0].type = states.type
    graph.insert_before(node, [*bounds, last])
    node.replace_input_with(0, last.outputs[0])
    for value in (last.outputs[0], *between):
        width = (states if value is last.outputs[0] else value).shape
        value.shape = ir.Shape(["batch", 1, width[2]]) if width is not None and len(width) == 3 else None
    return True


def _number(value: ir.Value | None) -> int | None:
    tensor = constant_of(value)
    return None if tensor is None or tensor.size != 1 else int(tensor.numpy().reshape(-1)[0])


def _spread_batch(start: ir.Value) -> None:
    """What was one row for the whole batch is now a row for each sequence of it."""
    waiting, seen = [start], {start}
    while waiting:
        value = waiting.pop()
        if value.shape is not None:
            if not len(value.shape) or value.shape[0] != 1:
                continue
            value.shape = ir.Shape(["batch", *value.shape[1:]])
        for use in value.uses():
            fresh = [output for output in use.node.outputs if output not in seen]
            seen.update(fresh)
            waiting += fresh
