"""From a torch module with effc's attention to an ONNX graph with ``effc::`` operators and their function bodies."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from effc.errors import PassFailedError
from effc.exporters.rotary_batch import expand_rotary_caches
from effc.plugins.bodies import OPSET
from effc.plugins.function_body import attach_bodies


def export_onnx(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[int, str]]
) -> ir.Model:
    """Export one forward pass, with transformers' own exporter.

    Args:
        model: in eval mode, its attention assigned by the rewrite pass.
        inputs: example arguments of ``forward``.
        axes: for each input, which axes vary and their names (``batch``, ``sequence``).

    Raises:
        PassFailedError: if torch cannot export the model.
    """
    # The exporter takes seconds to import, and a compile that finds its graph in the cache does without.
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    dynamic = {name: {axis: torch.export.Dim.AUTO for axis in axes.get(name, {})} for name in inputs}
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, opset_version=OPSET)
    try:
        with quiet(), torch.no_grad(), without_caches(model):
            graph: ir.Model = OnnxExporter().export(model, dict(inputs), config).program
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PassFailedError(
            f"torch could not export {type(model).__name__} to ONNX: {reason.strip()[:300]}.",
            "Run again with --debug for the whole trace.",
        ) from error
    _name_axes(graph, axes)
    expand_rotary_caches(graph)
    attach_bodies(graph)
    return graph


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write ``path`` and its weights beside it as ``<name>.data``, which has no size limit."""
    ir.save(model, str(path), external_data=f"{path.name}.data")


def _name_axes(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give the symbols that torch made up the names of the axes they stand for."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name or "", {}).items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names[dim.value] = name
    for value in [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            names.get(str(d.value), d.value) if isinstance(d, ir.SymbolicDim) else d for d in value.shape
        )


@contextlib.contextmanager
def without_caches(model: PreTrainedModel) -> Iterator[None]:
    """Let no part of the model make a key/value cache; the decoder of an encoder-decoder has a config of its own."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter off the user's terminal; errors still come as exceptions."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(verbosity)
