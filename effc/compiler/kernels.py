"""Tell from a profile which kernel really served each attention layer and each linear layer.

ONNX Runtime runs ``effc::SparseAttention`` by effc's native kernel where that is registered, and otherwise inlines
the operator's function body; its optimizer may also fuse or split other nodes. The graph alone therefore does not say
what ran: a profile does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from effc.compiler.manifest import AttentionLayer
from effc.compiler.session import KernelEvent

NATIVE = "native effc::SparseAttention"
BODY = "standard-op body"
UNFUSED = "MatMul + Softmax"
UNKNOWN = "not identified"

_OPERATOR = "SparseAttention"
BODY_PREFIX = f"{_OPERATOR}_body/"
"""In the names of a body's nodes inside branches and loops, which ONNX Runtime does not rename when it inlines."""
# ONNX Runtime names the nodes of an inlined function _inlfunc_<function>_<node>, and from the second call on
# _inlfunc_<function>_token_<n>_<node>.
_INLINED = re.compile(rf"^_inlfunc_{_OPERATOR}_(token_\d+_)?")
_FUSED_ATTENTION = frozenset(
    {"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"}
)
_INT8 = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"})
_LINEAR = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"})


def attention_kernels(events: Sequence[KernelEvent], layers: Iterable[AttentionLayer]) -> dict[str, str]:
    """Which kernel served each attention layer, keyed by the layer's module name.

    Kernels that carry no layer name (inlined bodies, fused dense attention, softmaxes) are matched by their number; a
    layer for which that does not come out is ``"not identified"``.
    """
    layers = list(layers)
    native = {event.node for event in events if event.operator == _OPERATOR}
    result = {layer.layer: NATIVE for layer in layers if layer.layer in native}
    outside = [event for event in events if not _INLINED.match(event.node)]

    bodies = {match.group(0) for event in events if (match := _INLINED.match(event.node))}
    rewritten = [layer.layer for layer in layers if layer.rewritten and layer.layer not in result]
    # Bodies whose nodes have no names leave no trace of theirs; but what is not native can only have been inlined.
    if len(bodies) in (0, len(rewritten)):
        result.update(dict.fromkeys(rewritten, BODY))
    elif len(bodies) == len(layers) - len(result):
        # Layers that keep their own pattern are effc operators too.
        return {layer.layer: result.get(layer.layer, BODY) for layer in layers}

    dense = [layer.layer for layer in layers if not layer.rewritten]
    fused = [event for event in outside if event.operator in _FUSED_ATTENTION]
    for layer in dense:
        for event in fused:
            if _same_name(layer, event.node):
                result[layer] = f"onnxruntime {event.operator}"
    left = [layer for layer in dense if layer not in result]
    if left and len(fused) == len(left):
        result.update({layer: f"onnxruntime {event.operator}" for layer, event in zip(left, fused, strict=True)})
    elif left and not fused and sum(event.operator == "Softmax" for event in outside) == len(left):
        result.update(dict.fromkeys(left, UNFUSED))
    return {layer.layer: result.get(layer.layer, UNKNOWN) for layer in layers}


def linear_kernels(events: Iterable[KernelEvent]) -> dict[str, str]:
    """Which kernel served each matrix product outside of attention bodies, such as ``"int8 DynamicQuantizeMatMul"``.

    Keyed by the node's name after ONNX Runtime's own fusions.
    """
    result = {}
    for event in events:
        if _INLINED.match(event.node) or BODY_PREFIX in event.node:
            continue
        if event.operator in _INT8:
            result[event.node] = f"int8 {event.operator}"
        elif event.operator in _LINEAR:
            result[event.node] = f"{event.dtype or 'unknown type'} {event.operator}"
    return result


def attention_summary(events: Iterable[KernelEvent]) -> str:
    """One phrase for a whole model's attention, such as ``"12 x MultiHeadAttention"``."""
    counts = Counter(event.operator for event in events if event.operator in _FUSED_ATTENTION | {_OPERATOR, "Softmax"})
    names = {"Softmax": UNFUSED, _OPERATOR: NATIVE}
    return ", ".join(f"{count} x {names.get(name, name)}" for name, count in counts.items()) or "no attention"


def _same_name(layer: str, node: str) -> bool:
    return f".{layer}." in f".{node.replace('/', '.').strip('.')}."
