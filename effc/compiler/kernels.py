"""Tell from a profile which kernel really served each attention layer and each linear layer.

ONNX Runtime runs ``effc``'s operators by effc's native kernels where those are registered, and otherwise inlines the
operators' function bodies; its optimizer may also fuse or split other nodes. The graph alone therefore does not say
what ran: a profile does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from effc.compiler.manifest import AttentionLayer, CachedLayerRecord
from effc.compiler.session import KernelEvent
from effc.errors import UsageError
from effc.plugins.caches import CACHED_ATTENTION
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.forms.registry import parse_form

NATIVE = "native effc::SparseAttention"
BODY = "standard-op body"
UNFUSED = "MatMul + Softmax"
UNKNOWN = "not identified"

_HEADS = "/heads"
"""Between a layer's name and the number of a part of its heads, in the names of per-head nodes."""


def _operator_types() -> frozenset[str]:
    """Every type of effc's operators: one for each family of forms."""
    families, found = [AttentionForm], set()
    while families:
        family = families.pop()
        families.extend(family.__subclasses__())
        found.add(getattr(family, "op_type", ""))
    return frozenset(found - {""})


OPERATORS = _operator_types()
_ANY_OPERATOR = "|".join(sorted(OPERATORS, key=lambda name: (-len(name), name)))
_IN_BODY = re.compile(rf"(?:^|/)(?:{_ANY_OPERATOR})_body/")
"""In the names of a body's nodes inside branches and loops, which ONNX Runtime does not rename when it inlines."""
# ONNX Runtime names the nodes of an inlined function _inlfunc_<function>_<node>, and from the second call on
# _inlfunc_<function>_token_<n>_<node>.
_INLINED = re.compile(rf"^_inlfunc_({_ANY_OPERATOR})_(?:token_\d+_)?")
_FUSED_ATTENTION = frozenset(
    {"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"}
)
_INT8 = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"})
_LINEAR = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"})


def attention_kernels(events: Sequence[KernelEvent], layers: Iterable[AttentionLayer]) -> dict[str, str]:
    """Which kernel served each attention layer, keyed by the layer's module name.

    A layer whose heads compute different forms has one operator for each, and all of their kernels are named. Kernels
    that carry no layer name (inlined bodies, fused dense attention, softmaxes) are matched by their number; a layer
    for which that does not come out is ``"not identified"``.
    """
    layers = list(layers)
    nodes = {layer.layer: operator_nodes(layer) for layer in layers}
    native = {event.node: f"native effc::{event.operator}" for event in events if event.operator in OPERATORS}
    kernels = {node: native[node] for parts in nodes.values() for node in parts if node in native}
    outside = [event for event in events if not _INLINED.match(event.node)]

    bodies = {match.group(0): match.group(1) for event in events if (match := _INLINED.match(event.node))}
    for operator in sorted({operator for parts in nodes.values() for operator in parts.values()}):
        left = {
            layer.layer: [node for node, kind in nodes[layer.layer].items() if kind == operator and node not in kernels]
            for layer in layers
        }
        rewritten = [node for layer in layers if layer.rewritten for node in left[layer.layer]]
        everything = [node for parts in left.values() for node in parts]
        found = sum(kind == operator for kind in bodies.values())
        # Bodies whose nodes have no names leave no trace of theirs; but what is not native can only have been inlined.
        if found in (0, len(rewritten)):
            kernels.update(dict.fromkeys(rewritten, BODY))
        elif found == len(everything):
            # Layers that keep their own pattern are effc operators too.
            kernels.update(dict.fromkeys(everything, BODY))

    result = {name: _joined(kernels[node] for node in parts if node in kernels) for name, parts in nodes.items()}
    result = {name: kernel for name, kernel in result.items() if all(node in kernels for node in nodes[name])}
    dense = [layer.layer for layer in layers if not layer.rewritten and layer.layer not in result]
    fused = [event for event in outside if event.operator in _FUSED_ATTENTION]
    for name in dense:
        for event in fused:
            if _same_name(name, event.node):
                result[name] = f"onnxruntime {event.operator}"
    unknown = [name for name in dense if name not in result]
    if unknown and len(fused) == len(unknown):
        result.update({name: f"onnxruntime {event.operator}" for name, event in zip(unknown, fused, strict=True)})
    elif unknown and not fused and sum(event.operator == "Softmax" for event in outside) == len(unknown):
        result.update(dict.fromkeys(unknown, UNFUSED))
    return {layer.layer: result.get(layer.layer, UNKNOWN) for layer in layers}


def step_kernels(events: Iterable[KernelEvent], layers: Iterable[CachedLayerRecord]) -> dict[str, str]:
    """Which kernel served each attention operator when one token was written, keyed by ``"<layer>/step"``."""
    operators = OPERATORS | {CACHED_ATTENTION}
    native = {event.node: f"native effc::{event.operator}" for event in events if event.operator in operators}
    # What is not native can only have been inlined.
    found = {}
    for layer in layers:
        step = f"{layer.layer}/step"
        # Forms that need keys in order have one operator for prompts and steps.
        found[step] = native.get(step, native.get(layer.layer, BODY))
    return found


def operator_nodes(layer: AttentionLayer) -> dict[str, str]:
    """The operator nodes that a layer became in the graph, by name, and the type of each."""
    try:
        form = parse_form(layer.pattern)
    except UsageError:
        # Of a newer effc; its operator is not known, so nothing is said of its kernel.
        return {layer.layer: ""}
    if isinstance(form, HeadForms):
        return {f"{layer.layer}{_HEADS}{number}": part.op_type for number, (part, _) in enumerate(form.parts)}
    return {layer.layer: form.op_type}


def linear_kernels(events: Iterable[KernelEvent]) -> dict[str, str]:
    """Which kernel served each matrix product outside of attention bodies, such as ``"int8 DynamicQuantizeMatMul"``.

    Keyed by the node's name after ONNX Runtime's own fusions.
    """
    result = {}
    for event in events:
        if _INLINED.match(event.node) or _IN_BODY.search(event.node):
            continue
        if event.operator in _INT8:
            result[event.node] = f"int8 {event.operator}"
        elif event.operator in _LINEAR:
            result[event.node] = f"{event.dtype or 'unknown type'} {event.operator}"
    return result


def attention_summary(events: Iterable[KernelEvent]) -> str:
    """One phrase for a whole model's attention, such as ``"12 x MultiHeadAttention"``."""
    counts = Counter(event.operator for event in events if event.operator in _FUSED_ATTENTION | OPERATORS | {"Softmax"})
    names = {"Softmax": UNFUSED} | {operator: f"native effc::{operator}" for operator in OPERATORS}
    return ", ".join(f"{count} x {names.get(name, name)}" for name, count in counts.items()) or "no attention"


def _joined(kernels: Iterable[str]) -> str:
    counts = Counter(kernels)
    return next(iter(counts)) if len(counts) == 1 else " + ".join(f"{count} x {name}" for name, count in counts.items())


def _same_name(layer: str, node: str) -> bool:
    return f".{layer}." in f".{node.replace('/', '.').strip('.')}."
