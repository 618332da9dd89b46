"""Prefill and decode graphs for engines: the forward graph with keys and values of the past as inputs and outputs.

Two graphs instead of one with a branch, because an engine is tuned for the shapes of its profiles, and a prompt and a
single token have little in common. Every cache is ``[batch, positions, kv_heads * head_dim]``, as the projections
produce it and as the operator takes it: a step appends its token's row. A layer whose pattern looks back a bounded way,
wherever it stands, hands out no more rows than the next step can see, so its cache stops growing. ``topk-blocks`` also
keeps the last queries, from which the next token's block chooses its keys, and in fp32 the sums of the keys of every
block, by which it chooses (see :mod:`effc.exporters.engine_sums`). Linear attention keeps its state instead, in
fp32 (see :mod:`effc.exporters.engine_states`): a step costs the same whatever lies before it.

(ONNX Runtime's generating graph keeps a ring of slots instead, which a plugin that counts positions from the end of the
keys could not read.)
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.exporters.engine_attention import LAST_QUERY, given_inputs
from effc.exporters.engine_states import STATES, state_shapes, with_state
from effc.exporters.engine_sums import sums_width, with_sums
from effc.plugins.caches import OrderedCache, SlotCache, cache_of
from effc.plugins.forms.content import BlockTopK
from effc.plugins.forms.linear import Linear, LinearForm
from effc.plugins.forms.terms import Dense, Dilated, Local, Strided
from effc.plugins.function_body import geometry_of, is_attention
from effc.plugins.operator import KEY_MASK
from effc.plugins.pattern import Pattern

MASK = "attention_mask"
PAST, PRESENT = "past_", "present_"
_QUERY, _SUMS = "query", "sums"


@dataclass(frozen=True)
class EngineCache:
    """Rows that one attention layer keeps: keys and values, queries, or sums of keys.

    Attributes:
        layer: name of the torch module.
        dimension: name of its cache's number of positions; layers that keep equally many share it.
        most: positions it ever needs, or None.
        width: numbers of a row.
        span: positions that a row stands for.
    """

    layer: str
    dimension: str
    most: int | None
    width: int
    span: int = 1


def add_prefill_outputs(model: ir.Model) -> list[EngineCache]:
    """Let a forward graph hand out what its attention layers keep of the prompt, in place."""
    nodes = _causal_nodes(model)
    kept = _caches(nodes)
    for number, (node, caches) in enumerate(zip(nodes, kept, strict=True)):
        sums = _sums_of(node)
        if isinstance(geometry_of(node).form, Linear):
            _hand_out_states(model.graph, with_state(model, node, []), number)
        for place, what, cache in _rows(caches):
            value = node.inputs[place]
            assert value is not None
            _hand_out(model.graph, f"{PRESENT}{what}.{number}", value, node, cache)
        for cache in sums:
            _hand_out(model.graph, f"{PRESENT}{_SUMS}.{number}", with_sums(model, node), node, cache)
            caches.append(cache)
    return [cache for caches in kept for cache in caches]


def add_decode_caches(model: ir.Model) -> list[EngineCache]:
    """Let a forward graph take one token and what its attention layers keep of those before, in place.

    ``attention_mask`` then is ``[batch, past + 1]`` and the other inputs of tokens ``[batch, 1]``.

    Raises:
        PreconditionError: if something other than attention reads the mask.
    """
    graph, nodes = model.graph, _causal_nodes(model)
    kept = _caches(nodes)
    mask = _key_mask(graph, nodes)
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) == 2:
            value.shape = ir.Shape(["batch", "total" if value.name == MASK else 1])
    for number, (node, caches) in enumerate(zip(nodes, kept, strict=True)):
        geometry, key, sums = geometry_of(node), node.inputs[1], _sums_of(node)
        for place, what, cache in _rows(caches):
            own = node.inputs[place]
            assert own is not None
            past = _past(graph, f"{what}.{number}", ["batch", cache.dimension, cache.width])
            joined = ir.node("Concat", [past, own], {"axis": 1})
            joined.outputs[0].type = own.type
            joined.outputs[0].shape = ir.Shape(["batch", None, cache.width])
            graph.insert_before(node, joined)
            node.replace_input_with(place, joined.outputs[0])
            _hand_out(graph, f"{PRESENT}{what}.{number}", joined.outputs[0], node, cache)
            if what == _QUERY:
                _keep_last_row(graph, node)
        if mask is not None:
            node.replace_input_with(3, _last(graph, node, mask, node.inputs[1]))
        if isinstance(geometry.form, Linear):
            states = [_past(graph, f"{name}.{number}", shape) for name, shape in state_shapes(geometry).items()]
            _hand_out_states(graph, with_state(model, node, states), number)
        for cache in sums:
            assert key is not None
            past = _past(graph, f"{_SUMS}.{number}", ["batch", cache.dimension, cache.width])
            _hand_out(graph, f"{PRESENT}{_SUMS}.{number}", with_sums(model, node, (key, past)), node, cache)
            caches.append(cache)
    return [cache for caches in kept for cache in caches]


def half_caches(graph: ir.Graph) -> list[str]:
    """Names of the inputs and outputs that hold rows, which take the engine's precision; states and sums stay fp32."""
    names = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
    states = tuple(f"{when}{name}." for when in (PAST, PRESENT) for name in (*STATES, _SUMS))
    return [name for name in names if name.startswith((PAST, PRESENT)) and not name.startswith(states)]


def pads_in_front(model: ir.Model) -> bool:
    """Whether texts of different lengths may share a run of a graph, the shorter ones with padding in front.

    That takes a mask that hides the padding, and forms that mean the same behind it: those that count positions from
    the query, and linear ones. Sinks, blocks, global and random keys are counted from the beginning.
    """
    nodes = [node for node in model.graph if is_attention(node)]
    return all(_mask_of(node) is not None and _counts_back(node) for node in nodes)


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


def _caches(nodes: list[ir.Node]) -> list[list[EngineCache]]:
    """For each node its cache of keys and of values, then that of queries; nothing where a state is kept."""
    result, dimensions = list[list[EngineCache]](), dict[int | None, str]()

    def rows(node: ir.Node, most: int | None, heads: int) -> EngineCache:
        dimension = dimensions.setdefault(most, f"past.{len(dimensions)}")
        return EngineCache(str(node.name), dimension, most, heads * geometry_of(node).head_dim)

    for node in nodes:
        geometry = geometry_of(node)
        cache = cache_of(geometry.form, geometry.kv_heads, geometry.head_dim)
        if isinstance(geometry.form, Linear):
            result.append([])
            continue
        # Rows can only be dropped where positions count from the end alone: not under sinks, global or random keys.
        most = cache.recent if isinstance(cache, SlotCache) and cache.sinks == 0 and _from_the_end(node) else None
        result.append([rows(node, most, geometry.kv_heads)])
        if isinstance(cache, OrderedCache) and cache.queries > 1:
            result[-1].append(rows(node, cache.queries - 1, geometry.num_heads))
    return result


def _sums_of(node: ir.Node) -> list[EngineCache]:
    """The one cache of sums of keys that a layer has if its content chooses blocks."""
    geometry = geometry_of(node)
    if not isinstance(geometry.form, BlockTopK):
        return []
    block = geometry.form.block
    return [EngineCache(str(node.name), f"past_blocks.{block}", None, sums_width(geometry), block)]


def _rows(caches: list[EngineCache]) -> list[tuple[int, str, EngineCache]]:
    """Places among a node's inputs of what it keeps, with names and caches."""
    whats = ((1, "key", 0), (2, "value", 0), (0, _QUERY, 1))
    return [(place, what, caches[which]) for place, what, which in whats if which < len(caches)]


def _past(graph: ir.Graph, name: str, shape: list[int | str]) -> ir.Value:
    value = ir.Value(name=f"{PAST}{name}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _hand_out_states(graph: ir.Graph, states: list[ir.Value], number: int) -> None:
    for name, state in zip(STATES, states, strict=True):
        state.name = f"{PRESENT}{name}.{number}"
        graph.outputs.append(state)


def _keep_last_row(graph: ir.Graph, node: ir.Node) -> None:
    """Of the output, whose rows are those of past queries too."""
    node.metadata_props[LAST_QUERY] = "1"
    output = node.outputs[0]
    assert output.shape is not None
    width = output.shape[2]
    output.shape = ir.Shape(["batch", None, width])
    bounds = [ir.node("Constant", [], {"value_ints": [number]}) for number in (-1, 2**31 - 1, 1)]
    last = ir.node("Slice", [output, *(bound.outputs[0] for bound in bounds)])
    last.outputs[0].type, last.outputs[0].shape = output.type, ir.Shape(["batch", 1, width])
    graph.insert_after(node, [*bounds, last])
    ir.convenience.replace_all_uses_with(output, last.outputs[0])
    last.replace_input_with(0, output)


def _from_the_end(node: ir.Node) -> bool:
    """Whether a pattern means the same if the first keys are left out: blocks are counted from the beginning."""
    form = geometry_of(node).form
    return isinstance(form, Pattern) and all(isinstance(term, (Local, Dilated)) for term in form.terms)


def _counts_back(node: ir.Node) -> bool:
    form = geometry_of(node).form
    if isinstance(form, Pattern):
        return all(isinstance(term, (Dense, Local, Dilated, Strided)) for term in form.terms)
    return isinstance(form, LinearForm)


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
    place = given_inputs(node).get(KEY_MASK)
    return None if place is None else node.inputs[place]


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
