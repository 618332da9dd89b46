"""The exported graph of a source model with rewritten attention, and the dense twin made from it; both cached.

The twin is the same graph in fp32 with every attention module seeing what it sees in the source model, lowered to
ONNX Runtime's fused kernels. It is what a user would deploy without effc, at its fastest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.compiler.bench import DENSE_FORM_KEY
from effc.compiler.cache import cache_key, cached
from effc.compiler.inputs import dynamic_axes, ragged_inputs
from effc.compiler.manifest import AttentionLayer
from effc.compiler.runtime import MODEL_NAME
from effc.compiler.source import SourceModel
from effc.compiler.toolchain import toolchain
from effc.exporters.onnx_graph import export_onnx, save_onnx
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.plugins.function_body import attach_bodies, is_attention

EXPORT_VERSION = 2
# The lengths of the two example sequences; any that are neither equal nor special would do.
_EXAMPLE_LENGTHS = (40, 24)


def export_key(source: SourceModel, layers: list[AttentionLayer]) -> str:
    """What decides the exported graph and its twin: model, task, attention of every layer, fusion and toolchain."""
    return cache_key(
        version=EXPORT_VERSION,
        fingerprint=source.located.fingerprint,
        task=source.task.name,
        attention=[layer.model_dump(mode="json") for layer in layers],
        fusion=FuseOnnxRuntime().identity(),
        toolchain=toolchain(),
    )


def exported_graph(source: SourceModel, layers: list[AttentionLayer]) -> tuple[Path, bool]:
    """Path of the exported graph (unfused, fp32), and whether it came from the cache.

    The rewrite pass must have assigned the attention of ``source.model``.
    """

    def make(directory: Path) -> None:
        inputs = ragged_inputs(source, _EXAMPLE_LENGTHS)
        save_onnx(export_onnx(source.model, inputs, dynamic_axes(inputs)), directory / MODEL_NAME)

    entry, hit = cached("export", export_key(source, layers), make)
    return entry / MODEL_NAME, hit


def twin_of(exported: Path, key: str, layers: list[AttentionLayer]) -> Path:
    """Path of the dense twin of an exported graph."""

    def make(directory: Path) -> None:
        model = ir.load(str(exported))
        restore_source_attention(model, layers)
        FuseOnnxRuntime().run(model)
        save_onnx(model, directory / MODEL_NAME)

    entry, _ = cached("twin", key, make)
    return entry / MODEL_NAME


def restore_source_attention(model: ir.Model, layers: list[AttentionLayer]) -> None:
    """Give every operator node the pattern that its module has in the source model, in place."""
    source = {layer.layer: layer.source for layer in layers}
    model.functions.clear()
    forms: set[str] = set()
    for node in model.graph:
        if is_attention(node):
            # A module that runs several times (ALBERT) has a node for each run, told apart by a number behind its name.
            name = node.name or ""
            pattern = source[name if name in source else re.sub(r"_\d+$", "", name)]
            node.attributes["pattern"] = ir.AttrString("pattern", pattern)
            forms.add(pattern)
    attach_bodies(model)
    causal = any(layer.causal for layer in layers)
    kernel = "contrib GroupQueryAttention" if causal else "contrib MultiHeadAttention"
    windows = sorted(forms - {"dense"})
    model.metadata_props[DENSE_FORM_KEY] = kernel + (f", {', '.join(windows)} of the model itself" if windows else "")


def describe_layers(layers: list[dict[str, Any]]) -> list[AttentionLayer]:
    """Validate what the rewrite pass says of its layers."""
    return [AttentionLayer.model_validate(layer) for layer in layers]
