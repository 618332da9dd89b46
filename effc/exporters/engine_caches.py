"""Prefill and decode graphs for engines: the forward graph with keys and values of the past as inputs and outputs.

Two graphs instead of one with a branch, because an engine is tuned for the shapes of its profiles, and a prompt and a
single token have little in common. Every cache is ``[batch, positions, kv_heads * head_dim]``, as the projections
produce it and as the operator takes it: a step appends its token's row. A layer whose pattern looks back a bounded way,
wherever it stands, hands out no more rows than the next step can see, so its cache stops growing.

(ONNX Runtime's generating graph keeps a ring of slots instead, which a plugin that counts positions from the end of the
keys could not read.)
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.plugins.caches import SlotCache, cache_of
from effc.plugins.function_body import geometry_of, is_attention
from effc.plugins.operator import KEY_MASK, optional_inputs

MASK = "attention_mask"
PAST, PRESENT = "past_", "present_"


@dataclass(frozen=True)
class EngineCache:
    """What one attention layer keeps.

    Attributes:
        layer: name of the torch module.
        dimension: name of its cache's number of positions; layers that keep equally many share it.
        most: positions it ever needs, or None.
        width: numbers of a key, and of a value.
    """

    layer: str
    dimension: str
    most: int | None
    width: int


def add_prefill_outputs(model: ir.Model) -> list[EngineCache]:
    """Let a forward graph hand out the keys and values of the prompt, in place."""
    nodes = _causal_nodes(model)
    caches = _caches(nodes)
    for number, (node, cache) in enumerate(zip(nodes, caches, strict=True)):
        for place, what in ((1, "key"), (2, "value")):
            value = node.inputs[place]
            assert value is not None
            _hand_out(model.graph, f"{PRESENT}{what}.{number}", value, node, cache)
    return caches


def add_decode_caches(model: ir.Model) -> list[EngineCache]:
    """Let a forward graph take one token and the keys and values of those before, in place.

    ``attention_mask`` then is ``[batch, past + 1]`` and the other inputs of tokens ``[batch, 1]``.

    Raises:
        PreconditionError: if something other than attention reads the mask.
    """
    graph, nodes = model.graph, _causal_nodes(model)
    caches = _caches(nodes)
    mask = _key_mask(graph, nodes)
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) == 2:
            value.shape = ir.Shape(["batch", "total" if value.name == MASK else 1])
    for number, (node, cache) in enumerate(zip(nodes, caches, strict=True)):
        for place, what in ((1, "key"), (2, "value")):
            own = node.inputs[place]
            assert own is not None
            shape = ir.Shape(["batch", cache.dimension, cache.width])
            past = ir.Value(name=f"{PAST}{what}.{number}", shape=shape, type=own.type)
            graph.inputs.append(past)
            joined = ir.node("Concat", [past, own], {"axis": 1})
            joined.outputs[0].type = own.type
            joined.outputs[0].shape = ir.Shape(["batch", None, cache.width])
            graph.insert_before(node, joined)
            node.replace_input_with(place, joined.outputs[0])
            _hand_out(graph, f"{PRESENT}{what}.{number}", joined.outputs[0], node, cache)
        if mask is not None:
            node.replace_input_with(3, _last(graph, node, mask, node.inputs[1]))
    return caches


def _causal_nodes(model: ir.Model) -> list[ir.Node]:
    nodes = [node for node in model.graph if is_attention(node)]
    for node in nodes:
        if not geometry_of(node).causal:
            raise PreconditionError(
                f"'{node.name}' looks ahead, so its output changes with every token that is written.",
                "A model generates only if all of its attention is causal.",
            )
    if not nodes:
        raise PreconditionError("No attention layer of this model is an operator of effc, so none can be cached.")
    return nodes


def _caches(nodes: list[ir.Node]) -> list[EngineCache]:
    result, dimensions = [], dict[int | None, str]()
    for node in nodes:
        geometry = geometry_of(node)
        cache = cache_of(geometry.form, geometry.kv_heads, geometry.head_dim)
        # Rows can only be dropped where positions count from the end alone: not under sinks, global or random keys.
        most = cache.recent if isinstance(cache, SlotCache) and cache.sinks == 0 and _from_the_end(node) else None
        dimension = dimensions.setdefault(most, f"past.{len(dimensions)}")
        result.append(EngineCache(str(node.name), dimension, most, geometry.kv_heads * geometry.head_dim))
    return result


def _from_the_end(node: ir.Node) -> bool:
    """Whether a pattern means the same if the first keys are left out: blocks are counted from the beginning."""
    from effc.plugins.forms.terms import Dilated, Local
    from effc.plugins.pattern import Pattern

    form = geometry_of(node).form
    return isinstance(form, Pattern) and all(isinstance(term, (Local, Dilated)) for term in form.terms)


def _key_mask(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Value | None:
    """The operators' common mask, which must be all that the graph's input mask is for."""
    masks = {_mask_of(node) for node in nodes}
    if len(masks) != 1:
        raise PreconditionError("The attention layers of this model have masks of their own.", _FORWARD_ONLY)
    mask = masks.pop()
    given = next((value for value in graph.inputs if value.name == MASK), None)
    if mask is None or given is None:
        return None
    readers = {use.node for use in given.uses()}
    producer = mask.producer()
    if producer is None or readers != {producer} or producer.op_type not in ("Cast", "NotEqual", "Not", "Equal"):
        names = ", ".join(sorted(str(node.op_type) for node in readers))
        raise PreconditionError(f"This model computes more from its mask than padding ({names}).", _FORWARD_ONLY)
    mask.shape = ir.Shape(["batch", "total"])
    return mask


_FORWARD_ONLY = "Only the engine of its forward pass is built."


def _mask_of(node: ir.Node) -> ir.Value | None:
    place = optional_inputs(geometry_of(node).form).index(KEY_MASK) + 3
    return node.inputs[place] if len(node.inputs) > place else None


def _last(graph: ir.Graph, before: ir.Node, mask: ir.Value, keys: ir.Value | None) -> ir.Value:
    """The mask of the last positions, as many as there are keys."""
    total = ir.node("Shape", [mask], {"start": 1, "end": 2})
    count = ir.node("Shape", [keys], {"start": 1, "end": 2})
    start = ir.node("Sub", [total.outputs[0], count.outputs[0]])
    axis = ir.node("Constant", [], {"value_ints": [1]})
    last = ir.node("Slice", [mask, start.outputs[0], total.outputs[0], axis.outputs[0]])
    last.outputs[0].type, last.outputs[0].shape = mask.type, ir.Shape(["batch", None])
    for value in (total.outputs[0], count.outputs[0], start.outputs[0]):
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([1])
    graph.insert_before(before, [total, count, start, axis, last])
    return last.outputs[0]


def _hand_out(graph: ir.Graph, name: str, value: ir.Value, before: ir.Node, cache: EngineCache) -> None:
    if cache.most is None:
        given = ir.node("Identity", [value])
        graph.insert_before(before, given)
    else:
        count = ir.node("Shape", [value], {"start": 1, "end": 2})
        most, none, axis = (ir.node("Constant", [], {"value_ints": [number]}) for number in (cache.most, 0, 1))
        less = ir.node("Sub", [count.outputs[0], most.outputs[0]])
        start = ir.node("Max", [less.outputs[0], none.outputs[0]])
        given = ir.node("Slice", [value, start.outputs[0], count.outputs[0], axis.outputs[0]])
        for shape_value in (count.outputs[0], less.outputs[0], start.outputs[0]):
            shape_value.dtype, shape_value.shape = ir.DataType.INT64, ir.Shape([1])
        graph.insert_before(before, [count, most, none, axis, less, start, given])
    given.outputs[0].type = value.type
    given.outputs[0].shape = ir.Shape(["batch", f"kept_{cache.dimension}", cache.width])
    given.outputs[0].name = name
    graph.outputs.append(given.outputs[0])
