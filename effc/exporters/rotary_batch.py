"""Let rotary embeddings run at any batch size.

Positions that all sequences share give cosines and sines ``[1, length, head_dim / 2]``. The arithmetic that a model
writes broadcasts them over the batch; the ``RotaryEmbedding`` operator that the exporter folds it into does not.
"""

from __future__ import annotations

import onnx_ir as ir

_ELEMENTWISE = ("Cos", "Sin")


def expand_rotary_caches(model: ir.Model) -> int:
    """Repeat shared cosines and sines over the batch, once for all the nodes that read them; in place.

    Returns:
        how many ``RotaryEmbedding`` nodes were changed.
    """
    expanded: dict[object, ir.Value] = {}
    changed = 0
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "RotaryEmbedding" and _shares_positions(node):
            for index in (1, 2):
                cache = node.inputs[index]
                assert cache is not None
                key = _computation(cache)
                if key not in expanded:
                    expanded[key] = _expand(model.graph, node, cache)
                node.replace_input_with(index, expanded[key])
            changed += 1
    return changed


def _shares_positions(node: ir.Node) -> bool:
    """Whether the caches are one row for a batch that may have several."""
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return False  # Positions of their own pick rows from a cache without a batch.
    states, cache = node.inputs[0], node.inputs[1]
    shape = _shape(cache)
    if states is None or states.shape is None or shape is None:
        return False
    return len(shape) == 3 and shape[0] == 1 and states.shape[0] != 1


def _shape(value: ir.Value | None) -> ir.Shape | None:
    """The exporter does not infer the shapes of the cosines that it makes; they are those of the angles."""
    node = value.producer() if value is not None else None
    if value is not None and value.shape is None and node is not None and node.op_type in _ELEMENTWISE:
        return _shape(node.inputs[0])
    return value.shape if value is not None else None


def _computation(value: ir.Value) -> object:
    """Equal for values that are computed alike: the exporter gives every node a cosine of its own."""
    node = value.producer()
    return value if node is None or node.op_type not in _ELEMENTWISE else (node.op_type, node.inputs[0])


def _expand(graph: ir.Graph, before: ir.Node, cache: ir.Value) -> ir.Value:
    states, cache_shape = before.inputs[0], _shape(cache)
    assert states is not None and states.shape is not None and cache_shape is not None
    ones = ir.node("Constant", [], attributes={"value_ints": [1, 1]})
    batch = ir.node("Shape", [states], attributes={"start": 0, "end": 1})
    shape = ir.node("Concat", [*batch.outputs, *ones.outputs], attributes={"axis": 0})
    repeated = ir.node("Expand", [cache, *shape.outputs])
    for node, size in ((ones, 2), (batch, 1), (shape, 3)):
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([size]), ir.DataType.INT64
    result = repeated.outputs[0]
    result.shape, result.type = ir.Shape([states.shape[0], *cache_shape[1:]]), states.type
    graph.insert_before(before, [ones, batch, shape, repeated])
    return result
