"""The exported graph of a source model with rewritten attention, and the dense twin made from it; both cached.

The twin is the same graph in fp32 with every attention module seeing what it sees in the source model, lowered to
ONNX Runtime's fused kernels. It is what a user would deploy without effc, at its fastest.

Where heads of one layer compute different forms the graph slices and joins them, which dense attention does not need:
then the twin is exported from the source model anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from effc.compiler.artifact_files import MODEL_NAME
from effc.compiler.bench_process import DENSE_FORM_KEY
from effc.compiler.cache import cache_key, cached
from effc.compiler.inputs import dynamic_axes, ragged_inputs
from effc.compiler.manifest import AttentionLayer
from effc.compiler.source import SourceModel
from effc.compiler.toolchain import toolchain
from effc.exporters.decode_twin import add_shared_caches
from effc.exporters.generation_derive import keep_last_position
from effc.exporters.onnx_graph import export_onnx, save_onnx
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.plugins.forms.heads import HeadForms
from effc.plugins.forms.registry import parse_form, parse_pattern
from effc.plugins.function_body import attach_bodies, geometry_of, is_attention
from effc.plugins.hook import PARAMETERS
from effc.plugins.operator import KEY_MASK, optional_inputs
from effc.plugins.pattern import Pattern

EXPORT_VERSION = 3
# The lengths of the two example sequences; any that are neither equal nor special would do.
_EXAMPLE_LENGTHS = (40, 24)
SCORE_INPUTS = ("distance_bias", "distance_slope")
"""Inputs of the operator that are the source model's own, whatever form it has."""


def export_key(source: SourceModel, layers: list[AttentionLayer]) -> str:
    """What decides the exported graph and its twin: model, task, attention of every layer, fusion and toolchain.

    The attention of ``source.model`` must be assigned, because learned parameters of forms are part of it.
    """
    return cache_key(
        version=EXPORT_VERSION,
        fingerprint=source.located.fingerprint,
        task=source.task.name,
        attention=[layer.model_dump(mode="json") for layer in layers],
        weights=source.weights,
        positions=None if source.positions is None else source.positions.model_dump(mode="json"),
        parameters=_parameters(source.model),
        fusion=FuseOnnxRuntime().identity(),
        toolchain=toolchain(),
    )


def exported_graph(source: SourceModel, layers: list[AttentionLayer]) -> tuple[Path, bool]:
    """Path of the exported graph (unfused, fp32), and whether it came from the cache.

    The rewrite pass must have assigned the attention of ``source.model``.
    """

    def make(directory: Path) -> None:
        save_onnx(export_now(source), directory / MODEL_NAME)

    entry, hit = cached("export", export_key(source, layers), make)
    return entry / MODEL_NAME, hit


def export_now(source: SourceModel) -> ir.Model:
    """Export ``source.model`` with the attention that is assigned to it now."""
    inputs = ragged_inputs(source, _EXAMPLE_LENGTHS)
    return export_onnx(source.model, inputs, dynamic_axes(inputs))


def has_head_forms(layers: list[AttentionLayer]) -> bool:
    """Whether heads of one layer compute different forms, so that the graph is no longer the source model's."""
    return any(isinstance(parse_form(layer.pattern), HeadForms) for layer in layers)


def twin_of(exported: Path, key: str, layers: list[AttentionLayer], again: Callable[[], ir.Model]) -> Path:
    """Path of the dense twin of an exported graph.

    Args:
        again: exports the model with its source attention; called where the exported graph has per-head forms.
    """

    def make(directory: Path) -> None:
        model = again() if has_head_forms(layers) else ir.load(str(exported))
        restore_source_attention(model, layers)
        FuseOnnxRuntime().run(model)
        save_onnx(model, directory / MODEL_NAME)

    entry, _ = cached("twin", key, make)
    return entry / MODEL_NAME


def decode_twin_of(graph: ir.Model, key: str, layers: list[AttentionLayer]) -> Path:
    """Path of the dense twin that takes one token, see :mod:`effc.exporters.decode_twin`.

    Args:
        graph: the forward graph that takes positions (unfused, fp32); it is used up.

    Raises:
        PreconditionError: if ONNX Runtime's kernel does not know the source model's attention.
    """

    def make(directory: Path) -> None:
        restore_source_attention(graph, layers)
        keep_last_position(graph.graph)
        FuseOnnxRuntime().run(graph)
        add_shared_caches(graph)
        graph.metadata_props[DENSE_FORM_KEY] += " with caches in place"
        save_onnx(graph, directory / MODEL_NAME)

    entry, _ = cached("decode-twin", key, make)
    return entry / MODEL_NAME


def restore_source_attention(model: ir.Model, layers: list[AttentionLayer]) -> None:
    """Give every operator node the pattern that its module has in the source model, in place.

    Inputs that only the assigned form has (learned parameters, marks of tokens) go; a bias of the source model's own
    on its scores stays.
    """
    source = {layer.layer: layer.source for layer in layers}
    model.functions.clear()
    forms: set[str] = set()
    for node in model.graph:
        if is_attention(node):
            # A module that runs several times (ALBERT) has a node for each run, told apart by a number behind its name.
            name = node.name or ""
            pattern = source[name if name in source else re.sub(r"_\d+$", "", name)]
            _give_pattern(node, parse_pattern(pattern))
            forms.add(pattern)
    RemoveUnusedNodesPass()(model)
    attach_bodies(model)
    causal = any(layer.causal for layer in layers)
    kernel = "contrib GroupQueryAttention" if causal else "contrib MultiHeadAttention"
    windows = sorted(forms - {"dense"})
    model.metadata_props[DENSE_FORM_KEY] = kernel + (f", {', '.join(windows)} of the model itself" if windows else "")


def _give_pattern(node: ir.Node, pattern: Pattern) -> None:
    before = optional_inputs(geometry_of(node).form)
    given = dict(zip(before, node.inputs[3:], strict=False))
    kept = [given.get(name) if name == KEY_MASK or name in SCORE_INPUTS else None for name in optional_inputs(pattern)]
    while kept and kept[-1] is None:
        kept.pop()
    node.resize_inputs(3 + len(kept))
    for number, value in enumerate(kept, 3):
        node.replace_input_with(number, value)
    node.op_type = pattern.op_type
    node.attributes["pattern"] = ir.AttrString("pattern", str(pattern))


def _parameters(model: torch.nn.Module) -> str:
    """A hash of the learned parameters of all forms."""
    content = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if PARAMETERS in name.split("."):
            content.update(name.encode() + parameter.detach().numpy().tobytes())
    return content.hexdigest()


def describe_layers(layers: list[dict[str, Any]]) -> list[AttentionLayer]:
    """Validate what the rewrite pass says of its layers."""
    return [AttentionLayer.model_validate(layer) for layer in layers]
