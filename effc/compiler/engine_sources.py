"""Which graphs engines are built from: the forward pass, or prefill and decode of a causal model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from effc.compiler.engine_proof import step_error
from effc.compiler.engines import EngineSource
from effc.compiler.generation_build import forward_graph, with_positions
from effc.compiler.manifest import AttentionLayer
from effc.compiler.recipe import Recipe
from effc.compiler.source import SourceModel
from effc.exporters.engine_caches import add_decode_caches, add_prefill_outputs, pads_in_front
from effc.exporters.generation_derive import keep_last_position
from effc.exporters.onnx_graph import save_onnx
from effc.passes.prepare_engine import PrepareEngine
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes


def forward_source(path: Path) -> list[EngineSource]:
    """The forward pass alone, from the artifact's own graph."""
    return [EngineSource("forward", path)]


def generation_sources(
    source: SourceModel,
    layers: list[AttentionLayer],
    recipe: Recipe,
    calibration: Sequence[dict[str, NDArray[Any]]] | None,
    quantized: tuple[Schemes, Remembered],
    exported: Path,
    forward: Path,
    work: Path,
) -> list[EngineSource]:
    """Prefill and decode graphs, quantized like the forward graph, and proved against it.

    Args:
        layers: what the rewrite pass found; ``source`` has its attention.
        exported: the exported forward graph, unfused and in fp32.
        forward: the artifact's graph.
        work: takes the files.

    Raises:
        PreconditionError: if the model cannot generate from caches; says why.
        PassFailedError: if decoding gives other numbers.
    """
    graph, _ = forward_graph(source, layers, exported)
    keep_last_position(graph.graph)
    PrepareEngine().run(graph)
    given = None if calibration is None else list(with_positions(calibration))
    for step in engine_quantizing_passes(recipe.quantization, given, *quantized):
        step.run(graph)
        step.ensures(graph)
    common = work / "common.onnx"
    save_onnx(graph, common)
    result = []
    for name, add in (("prefill", add_prefill_outputs), ("decode", add_decode_caches)):
        model, path = ir.load(str(common)), work / f"{name}.onnx"
        caches = add(model)
        # Reads its weights where they lie.
        ir.save(model, str(path))
        result.append(EngineSource(name, path, caches, pads=name == "decode" and pads_in_front(model)))
    exact = not recipe.quantization.formats & {"int8", "fp8"}
    result[1].step_error = step_error(source, forward, result[0].path, result[1].path, exact=exact, pads=result[1].pads)
    return result
