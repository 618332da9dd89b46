"""From the graph of a causal model's forward pass to one that generates: attention gets a memory.

One graph serves prefill and decode, and everything around attention is untouched. It is made from the exported (fused,
quantized) forward graph by giving each ``effc::`` operator its cache; which one, :mod:`effc.plugins.caches` says.

Why not transformers' pair of prefill and decode graphs (``OnnxExporter.export_for_generation``): its decode graph has
grown caches of all layers as inputs and outputs, in a layout of its own, joined and turned around by every layer in
every step, and a ring of slots cannot be said in it at all. Here a step reads each cache in place and hands out nothing
but the new token's keys and values, and quantization sees one graph of plain projections. One graph instead of two also
halves the memory: ONNX Runtime packs the weights anew for every session. The price is an ``If`` per layer.

A layer whose form is a pattern becomes::

    If (sequence length is 1)
        then effc::CachedAttention (query, key, value, past_key.i, past_value.i, bias.g)
        else the operator as it was, over the prompt

Forms that need keys at their places read ``past ++ new`` through their own operator, and linear forms take their state
as an input and give the next one. Layers with the same pattern form a *group* that shares what the caller computes for
each step: ``bias.g``, ``kept.g`` (which prompt positions are handed out: those that a bounded cache keeps).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.exporters.generation_bodies import CACHED_INPUTS, DISTANCE_INPUTS, cached_attention, recurrent_attention
from effc.plugins.caches import Cache, OrderedCache, SlotCache, StateCache, cache_of, slot_arrays
from effc.plugins.function_body import geometry_of, is_attention
from effc.plugins.operator import AttentionGeometry, optional_inputs

WHOLE_MASK = "whole_mask"
"""``[batch, past + new]`` bool for layers that read keys in order: False hides padding."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers of one form.

    Attributes:
        pattern: the form's text.
        cache: what each of the layers keeps.
        distance: whether the layers add a bias by distance, so that the caller has to say the distances.
    """

    pattern: str
    cache: Cache
    distance: bool


@dataclass(frozen=True)
class CachedLayer:
    """One operator with its cache; ``name`` is that of the torch module, its number the suffix of its inputs.

    Attributes:
        kept_in: type of its cache.
    """

    name: str
    group: int
    num_heads: int
    kv_heads: int
    head_dim: int
    kept_in: str = "fp32"


def add_caches(model: ir.Model, kept_in: str = "fp32") -> tuple[list[CacheGroup], list[CachedLayer]]:
    """Give every attention operator of a forward graph its cache, in place.

    Args:
        kept_in: what keys and values in slots are kept in, one of ``effc.plugins.caches.CACHE_TYPES``; other caches
            are fp32.

    Raises:
        PreconditionError: if an operator looks ahead, or there is none.
    """
    surgeon = _Surgeon(model, kept_in)
    nodes = [node for node in model.graph if is_attention(node)]
    if not nodes:
        raise PreconditionError("No attention layer of this model is an operator of effc, so none can be cached.")
    for number, node in enumerate(nodes):
        surgeon.add_cache(number, node)
    _drop_unused_functions(model)
    return surgeon.groups, surgeon.layers


class _Surgeon:
    def __init__(self, model: ir.Model, kept_in: str):
        self._kept_in = kept_in
        self.groups: list[CacheGroup] = []
        self.layers: list[CachedLayer] = []
        self._model, self._graph = model, model.graph
        self._named: dict[str, ir.Value] = {}
        self._is_step: ir.Value | None = None

    def add_cache(self, number: int, node: ir.Node) -> None:
        geometry = geometry_of(node)
        if not geometry.causal:
            raise PreconditionError(
                f"'{node.name}' looks ahead, so its output changes with every token that is written.",
                "A model generates only if all of its attention is causal.",
            )
        given = {
            name: value
            for name, value in zip(optional_inputs(geometry.form), node.inputs[3:], strict=False)
            if value is not None
        }
        cache = cache_of(geometry.form, geometry.kv_heads, geometry.head_dim)
        group = CacheGroup(str(geometry.form), cache, any(name in given for name in DISTANCE_INPUTS))
        if group not in self.groups:
            self.groups.append(group)
        place = self.groups.index(group)
        self.layers.append(
            CachedLayer(
                node.name or "",
                place,
                geometry.num_heads,
                geometry.kv_heads,
                geometry.head_dim,
                self._kept_in if isinstance(cache, SlotCache) else "fp32",
            )
        )
        if isinstance(cache, SlotCache):
            self._slots(number, place, node, geometry, given, cache)
        elif isinstance(cache, OrderedCache):
            self._ordered(number, node, geometry, cache)
        else:
            self._state(number, node, geometry, given, cache)

    def _slots(
        self,
        number: int,
        place: int,
        node: ir.Node,
        geometry: AttentionGeometry,
        given: dict[str, ir.Value],
        cache: SlotCache,
    ) -> None:
        shape: list[int | str] = ["batch", geometry.kv_heads, f"slots.{place}"]
        values = dict(zip(CACHED_INPUTS, node.inputs[:3], strict=False))
        for what, (width, kind) in slot_arrays(geometry.head_dim, self._kept_in).items():
            dtype = ir.DataType.from_numpy(kind)
            values[f"past_{what}"] = self._input(f"past_{what}.{number}", dtype, [*shape, width])
        values["bias"] = self._input(f"bias.{place}", ir.DataType.FLOAT, ["batch", 1, 1, f"columns.{place}"])
        distances = {name: given[name] for name in DISTANCE_INPUTS if name in given}
        own = node.inputs[1:3]
        if distances:
            values["distance"] = self._input(f"distance.{place}", ir.DataType.INT64, [f"columns.{place}"])
            values |= distances
        inputs = [values.get(name) for name in CACHED_INPUTS]
        while inputs[-1] is None:
            inputs.pop()
        function = cached_attention(geometry, frozenset(distances), self._kept_in)
        self._branch(node, function, inputs)
        kept = None
        if cache.bound is not None:
            kept = self._input(f"kept.{place}", ir.DataType.INT64, [f"kept_length.{place}"])
        for what, states in zip(("key", "value"), own, strict=True):
            assert states is not None
            self._hand_out(what, number, states, kept, geometry)

    def _ordered(self, number: int, node: ir.Node, geometry: AttentionGeometry, cache: OrderedCache) -> None:
        own_query, width = node.inputs[0], geometry.kv_heads * geometry.head_dim
        assert own_query is not None
        for index, what in ((1, "key"), (2, "value")):
            own = node.inputs[index]
            assert own is not None
            past = self._input(f"past_{what}.{number}", ir.DataType.FLOAT, ["batch", "past", width])
            joined = self._joined(node, what, number, past, own)
            node.replace_input_with(index, joined)
        mask = self._input(WHOLE_MASK, ir.DataType.BOOL, ["batch", "total"])
        if len(node.inputs) < 4:
            node.resize_inputs(4)
        node.replace_input_with(3, mask)
        _give_body(self._model, node)
        if cache.queries == 1:
            return
        query_width = geometry.num_heads * geometry.head_dim
        past = self._input(f"past_query.{number}", ir.DataType.FLOAT, ["batch", "past_queries", query_width])
        node.replace_input_with(0, self._joined(node, "query", number, past, own_query))
        output = node.outputs[0]
        # ONNX Runtime reuses buffers of equal symbolic shapes, and this one is longer than the model's states now.
        output.shape = ir.Shape(["batch", None, query_width])
        last = ir.node("Slice", [output, *self._slice_ends(node, own_query)])
        _like(last.outputs[0], own_query)
        self._graph.insert_after(node, last)
        ir.convenience.replace_all_uses_with(output, last.outputs[0])
        last.replace_input_with(0, output)

    def _joined(self, node: ir.Node, what: str, number: int, past: ir.Value, own: ir.Value) -> ir.Value:
        """The past and the new states in order, which are also what the next run has as its past."""
        joined = self._before(node, "Concat", [past, own], {"axis": 1}, own)
        joined.name = f"present_{what}.{number}"
        self._graph.outputs.append(joined)
        return joined

    def _slice_ends(self, node: ir.Node, query: ir.Value) -> list[ir.Value]:
        """Start, end and axis of the last ``query_length`` rows."""
        length = self._before(node, "Shape", [query], {"start": 1, "end": 2})
        constants = [
            self._before(node, "Constant", [], {"value_ints": [number]}) for number in (9223372036854775807, 1)
        ]
        return [self._before(node, "Neg", [length]), *constants]

    def _state(
        self, number: int, node: ir.Node, geometry: AttentionGeometry, given: dict[str, ir.Value], cache: StateCache
    ) -> None:
        past = [
            self._input(f"past_{name}.{number}", ir.DataType.FLOAT, ["batch", *shape]) for name, shape in cache.shapes
        ]
        names = [name for name, _ in cache.shapes]
        step, whole = recurrent_attention(geometry, list(given), names)
        inputs = [*node.inputs[:3], *given.values(), *past]
        outputs = self._branch(node, step, inputs, other=whole)
        for name, shape, value in zip(names, (shape for _, shape in cache.shapes), outputs[1:], strict=True):
            value.name = f"present_{name}.{number}"
            value.shape, value.dtype = ir.Shape(["batch", *shape]), ir.DataType.FLOAT
            self._graph.outputs.append(value)

    def _branch(
        self,
        node: ir.Node,
        step: ir.Function,
        inputs: list[ir.Value | None],
        other: ir.Function | None = None,
    ) -> tuple[ir.Value, ...]:
        """Put ``If (one token) then step else`` the node itself, or ``other`` of the same inputs, in its place."""
        graph, result = self._graph, node.outputs[0]
        then = _call(self._model, step, inputs, f"{node.name}/step", node.attributes.values())
        if other is None:
            otherwise = ir.Node(
                node.domain, node.op_type, node.inputs, node.attributes.values(), overload=node.overload, name=node.name
            )
        else:
            otherwise = _call(self._model, other, inputs, str(node.name))
        branches = {}
        for name, inner in (("then_branch", then), ("else_branch", otherwise)):
            for position, value in enumerate(inner.outputs):
                value.name = f"{node.name}/{name}/{position}"
            _like(inner.outputs[0], result)
            branches[name] = ir.Graph([], list(inner.outputs), nodes=[inner], name=f"{node.name}/{name}")
        choice = ir.Node(
            "",
            "If",
            [self._step_condition()],
            [ir.AttrGraph(name, branch) for name, branch in branches.items()],
            num_outputs=len(then.outputs),
            name=f"{node.name}/choice",
        )
        graph.insert_before(node, choice)
        result_name, result.name = result.name, None
        _like(choice.outputs[0], result)
        choice.outputs[0].name = result_name
        ir.convenience.replace_all_uses_with(result, choice.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        return tuple(choice.outputs)

    def _step_condition(self) -> ir.Value:
        """Whether the input is one token, computed once."""
        if self._is_step is None:
            ids = next(value for value in self._graph.inputs if value.name == "input_ids")
            length = ir.node("Shape", [ids], {"start": 1, "end": 2})
            scalar = ir.node("Squeeze", [length.outputs[0]])
            one = ir.node("Constant", [], {"value": ir.tensor(1, dtype=ir.DataType.INT64)})
            equal = ir.node("Equal", [scalar.outputs[0], one.outputs[0]])
            self._graph.insert_before(self._graph[0], [length, scalar, one, equal])
            self._is_step = equal.outputs[0]
            self._is_step.name = "is_step"
        return self._is_step

    def _input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        """The graph input of that name, made on first use."""
        if name not in self._named:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self._graph.inputs.append(value)
            self._named[name] = value
        return self._named[name]

    def _hand_out(
        self, what: str, number: int, value: ir.Value, kept: ir.Value | None, geometry: AttentionGeometry
    ) -> None:
        """Make keys or values ``[batch, length, kv_heads * head_dim]``, or the rows that are kept, an output."""
        last = value.producer()
        # Not the value itself where all is kept: parts of a layer's heads may share one.
        gather = ir.node("Identity", [value]) if kept is None else ir.node("Gather", [value, kept], {"axis": 1})
        _like(gather.outputs[0], value)
        if kept is not None and value.shape is not None:
            assert kept.shape is not None
            gather.outputs[0].shape = ir.Shape([value.shape[0], kept.shape[0], value.shape[2]])
        made = [gather]
        outputs = {f"new_{what}.{number}": gather.outputs[0]}
        if self._kept_in == "fp16":
            made.append(ir.node("Cast", [gather.outputs[0]], {"to": ir.DataType.FLOAT16}))
            outputs = {f"new_{what}.{number}": _typed(made[-1].outputs[0], ir.DataType.FLOAT16)}
        elif self._kept_in == "int8":
            rounded, codes, scale = _rounded(gather.outputs[0], geometry)
            made += rounded
            outputs = {f"new_{what}.{number}": codes, f"new_{what}_scale.{number}": scale}
        if last is None:
            self._graph.insert_before(self._graph[0], made)
        else:
            self._graph.insert_after(last, made)
        for name, output in outputs.items():
            output.name = name
            self._graph.outputs.append(output)

    def _before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, int | list[int]] | None = None,
        like: ir.Value | None = None,
    ) -> ir.Value:
        made = ir.node(op_type, inputs, attributes)
        if like is not None:
            made.outputs[0].type = like.type
        if like is not None and like.shape is not None:
            made.outputs[0].shape = ir.Shape([like.shape[0], None, like.shape[2]])
        self._graph.insert_before(node, made)
        return made.outputs[0]


def _rounded(value: ir.Value, geometry: AttentionGeometry) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    """Nodes that round states to INT8, the codes ``[batch, length, kv_heads, head_dim]``, their scales ``[..., 1]``."""
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, **attributes: int | list[int] | float) -> ir.Value:
        nodes.append(ir.node(op_type, list(inputs), attributes))
        return nodes[-1].outputs[0]

    shape = add("Constant", value_ints=[0, 0, geometry.kv_heads, geometry.head_dim])
    heads = add("Reshape", value, shape)
    peak = add("ReduceMax", add("Abs", heads), add("Constant", value_ints=[-1]), keepdims=1)
    scale = add("Max", add("Mul", peak, add("Constant", value_float=1 / 127)), add("Constant", value_float=1e-12))
    codes = add("Cast", add("Round", add("Div", heads, scale)), to=int(ir.DataType.INT8))
    sizes: list[int | str | None] = ["batch", None, geometry.kv_heads]
    codes.shape, scale.shape = ir.Shape([*sizes, geometry.head_dim]), ir.Shape([*sizes, 1])
    return nodes, _typed(codes, ir.DataType.INT8), _typed(scale, ir.DataType.FLOAT)


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.dtype = dtype
    return value


def _like(value: ir.Value, other: ir.Value) -> None:
    value.shape, value.type = other.shape, other.type


def _call(
    model: ir.Model, function: ir.Function, inputs: list[ir.Value | None], name: str, attributes: Iterable[ir.Attr] = ()
) -> ir.Node:
    """A call of the function with those of the attributes that it takes."""
    model.functions[function.identifier()] = function
    return ir.Node(
        function.domain,
        function.name,
        inputs,
        [attribute for attribute in attributes if attribute.name in function.attributes],
        overload=function.overload,
        num_outputs=len(function.outputs),
        name=name,
    )


def _give_body(model: ir.Model, node: ir.Node) -> None:
    """The body that fits a node whose optional inputs have changed."""
    from effc.plugins.function_body import function_body

    optional = zip(optional_inputs(geometry_of(node).form), node.inputs[3:], strict=False)
    body = function_body(geometry_of(node), frozenset(name for name, value in optional if value is not None))
    node.overload = body.overload
    model.functions[body.identifier()] = body


def _drop_unused_functions(model: ir.Model) -> None:
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in list(model.functions):
        if identifier not in used:
            del model.functions[identifier]
