"""What an engine is made of, read from the builder's verbose log.

Inspecting a finished engine needs the GPU that it was built for. The builder, asked for detailed profiling verbosity,
prints the same list: one line a layer, with the names of the ONNX nodes in it, the types of its tensors and its kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
_TYPE = re.compile(r"Datatype: (\w+)")
_SECTION = re.compile(r"\b(Inputs|Constants|Outputs): \[")
_TACTIC = re.compile(r"TacticName: ([^,]*)")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# TensorRT's compiler for fused parts of a network puts this behind names.
_SUFFIX = re.compile(r"_myl\d+_\d+$")
_LOW = {"Int8": "int8", "FP8": "fp8", "Fp8": "fp8", "Int4": "int4", "INT4": "int4", "INT8": "int8"}
_FLOATS = {"Half": "fp16", "BFloat16": "bf16", "BF16": "bf16", "Float": "fp32"}
# Generated code around products: it carries their nodes' names too, for what it does before and after them.
_AROUND = frozenset({"kgen", "shape_call", "signal", "wait", "myelin_copy"})
PLUGIN = "plugin effc::SparseAttention"
UNFUSED = "separate products"
NOT_FOUND = "not found in the log"


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: of TensorRT, made of names of ONNX nodes, ``+`` between them.
        kind: ``gemm``, ``custom_layer`` (a plugin), ``kgen`` (generated pointwise code) and so on.
        inputs, outputs: types of its tensors, constants counted as inputs, as TensorRT writes them.
        tactic: the kernel.
        nodes: the ONNX nodes that it computes, wholly or in part.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]

    @property
    def is_plugin(self) -> bool:
        """Whether a plugin computes it."""
        return self.kind in ("custom_layer", "PluginV3", "Plugin")

    @property
    def is_attention(self) -> bool:
        """Whether it is one of TensorRT's fused attention kernels."""
        return "mha" in f"{self.name} {self.kind} {self.tactic}".lower()

    @property
    def precision(self) -> str | None:
        """The lowest precision that it reads."""
        for kinds in (_LOW, _FLOATS):
            for name in self.inputs:
                if name in kinds:
                    return kinds[name]
        return None


def read_layers(log: str) -> list[EngineLayer]:
    """The layers of the last engine that the log speaks of; none if it lists none."""
    begin = max(log.rfind("\nLayers:"), 0 if log.startswith("Layers:") else -1)
    if begin < 0:
        return []
    layers = []
    for line in log[begin:].splitlines():
        found = _LAYER.match(line.strip())
        if found is not None:
            parts = _sections(found["rest"])
            tactic = _TACTIC.search(found["rest"])
            inputs = (*parts.get("Inputs", ()), *parts.get("Constants", ()))
            layers.append(
                EngineLayer(
                    found["name"],
                    found["kind"],
                    inputs,
                    parts.get("Outputs", ()),
                    tactic[1].strip() if tactic else "",
                    tuple(_ONNX.findall(found["rest"])) or _names_in(found["name"]),
                )
            )
        elif line.startswith("Bindings:") or line.startswith("I/O Tensors:"):
            break
    return layers


def _names_in(name: str) -> tuple[str, ...]:
    return tuple(_SUFFIX.sub("", part) for part in name.split("+"))


def _sections(text: str) -> dict[str, tuple[str, ...]]:
    """Types of the tensors in each list of a line."""
    starts = [(match[1], match.end()) for match in _SECTION.finditer(text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return {
        name: tuple(dict.fromkeys(_TYPE.findall(text[start:end])))
        for (name, start), end in zip(starts, ends, strict=True)
    }


@dataclass(frozen=True)
class Served:
    """Which kernel computes each layer of the model.

    Attributes:
        attention: by attention layer: effc's plugin, a fused kernel of TensorRT's, or separate products.
        linears: by linear layer: ``int8 gemm``, ``fp16 gemm`` and so on.
        low: matrix products of the engine in INT8, FP8 or INT4, one for each optimization profile; products that
            read one input may have become one.
        missed: linear layers that were to be quantized and are not.
    """

    attention: dict[str, str]
    linears: dict[str, str]
    low: dict[str, int]
    missed: tuple[str, ...]


def serve(
    layers: Sequence[EngineLayer],
    attention: Iterable[str],
    linears: Mapping[str, str],
    plugins: Mapping[str, str] | None = None,
) -> Served:
    """Find the model's layers in an engine.

    Args:
        attention: names of attention nodes.
        plugins: operators of those that are left to the plugin; ``SparseAttention`` if it says nothing.
        linears: what each linear layer's node was to be computed in.
    """
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    products = {name: _product(by_node.get(name, ())) for name in linears}
    low = Counter(
        layer.precision
        for layer in layers
        if layer.kind not in _AROUND
        and not (layer.is_attention or layer.is_plugin)
        and layer.precision in _LOW.values()
    )
    return Served(
        {name: _attention_kernel(by_node.get(name, ()), (plugins or {}).get(name)) for name in attention},
        products,
        {str(precision): count for precision, count in sorted(low.items(), key=str)},
        tuple(
            name
            for name, asked in linears.items()
            if asked in _LOW.values() and not products[name].startswith(f"{asked} ")
        ),
    )


def _product(candidates: Iterable[EngineLayer]) -> str:
    own = [layer for layer in candidates if layer.kind not in _AROUND] or list(candidates)
    found = {f"{layer.precision} {'gemm' if layer.kind == 'runtime_fusion' else layer.kind}" for layer in own}
    return " + ".join(sorted(found)) or NOT_FOUND


def _attention_kernel(candidates: Sequence[EngineLayer], operator: str | None) -> str:
    for layer in candidates:
        if layer.is_plugin:
            reads = f", {layer.precision} inputs" if layer.precision in _LOW.values() else ""
            return (PLUGIN if operator is None else f"plugin effc::{operator}") + reads
    for layer in candidates:
        if layer.is_attention:
            return f"TensorRT {_SUFFIX.sub('', layer.name).strip('_')}"
    return UNFUSED if candidates else NOT_FOUND
