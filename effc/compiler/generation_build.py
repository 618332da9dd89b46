"""The generating graph of a compile: exported, proved against torch, quantized like the forward graph, and saved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from effc.compiler.artifact_files import GENERATION_NAME, MODEL_NAME
from effc.compiler.cache import cache_key, cached
from effc.compiler.exported import export_key
from effc.compiler.generation import Generator
from effc.compiler.generation_memory import Memory
from effc.compiler.inputs import ragged_inputs
from effc.compiler.manifest import (
    AttentionLayer,
    CachedLayerRecord,
    CacheGroupRecord,
    GenerationRecord,
    OutputDeviation,
)
from effc.compiler.metrics import deviation
from effc.compiler.source import SourceModel
from effc.errors import PassFailedError, PreconditionError, UsageError
from effc.exporters.generation_derive import keep_last_position, take_positions
from effc.exporters.generation_export import export_for_generation, positions_of, takes_positions
from effc.exporters.generation_graph import CachedLayer, CacheGroup, add_caches
from effc.exporters.generation_weights import save_sharing_weights
from effc.exporters.onnx_graph import save_onnx
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.quantize import quantize
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins.caches import OrderedCache, SlotCache, StateCache

GENERATION_VERSION = 3
_EXAMPLE_LENGTHS = (40, 24)
# Stands in the cache for a graph that is made from the forward graph whenever it is needed.
_FROM_FORWARD = "from-forward-graph"
# Prompts of the proof, longer than a usual window, and the tokens that are then taken one by one.
_PROOF_LENGTHS, _PROOF_STEPS = (440, 61), 8
# Relative; steps and the whole differ in the order of their sums only.
_FAITHFUL = 1e-3

Batch = Mapping[str, NDArray[Any]]


def add_generation(
    source: SourceModel,
    layers: list[AttentionLayer],
    quantization: QuantizationSection | None,
    calibration: Sequence[Batch] | None,
    exported: Path,
    directory: Path,
    schemes: Schemes | None = None,
    remembered: Remembered | None = None,
    kept_in: str = "fp32",
) -> tuple[GenerationRecord, OutputDeviation, bool]:
    """Put the generating graph beside the forward graph of an artifact.

    Args:
        source: its attention assigned by the rewrite pass.
        layers: what that pass found.
        quantization: settings, or None.
        calibration: the batches that the forward graph was calibrated with, or None.
        exported: the exported forward graph, unfused and in fp32.
        directory: holds the finished ``model.onnx``.
        schemes: the mode of every layer, where a search has chosen it.
        remembered: what quantizing the forward graph has found.
        kept_in: what keys and values are kept in.

    Returns:
        the record for ``effc.json``, how far the finished graph is from torch with the same attention, and whether
        the export came from the cache.

    Raises:
        PreconditionError: if the model cannot generate from caches; says why.
        UsageError: if no layer keeps keys and values that could be kept in another type.
        PassFailedError: if torch cannot export it, or the finished graph computes something else.
    """
    graph, hit = forward_graph(source, layers, exported)
    keep_last_position(graph.graph)
    FuseOnnxRuntime().run(graph)
    if quantization is not None:
        given = None if calibration is None else list(with_positions(calibration))
        quantize(graph, quantization, given, schemes, remembered)
    groups, cached_layers = add_caches(graph, kept_in)
    if kept_in != "fp32" and all(layer.kept_in == "fp32" for layer in cached_layers):
        raise UsageError(
            f"No layer keeps keys and values in slots that could be {kept_in}: {groups[0].pattern} does not.",
            "Leave quantization.kv_cache out, or use a pattern such as local:1024.",
        )
    path = directory / GENERATION_NAME
    shared = save_sharing_weights(graph, path, directory / MODEL_NAME)
    record = record_of(source.model, source.processor, groups, cached_layers, shared)
    found = _proof(source, record, path)
    exact = quantization is None and kept_in == "fp32"
    if not (found.relative_error <= _FAITHFUL if exact else np.isfinite(found.relative_error)):
        raise PassFailedError(
            f"The finished graph is off by {found.relative_error:.2g} from {type(source.model).__name__} in torch when "
            "it writes token by token.",
            "Compile with --no-generation, and report this model.",
        )
    return record, found, hit


def forward_graph(source: SourceModel, layers: list[AttentionLayer], exported: Path) -> tuple[ir.Model, bool]:
    """The forward graph that takes positions (unfused, fp32), proved to generate, and whether the proof was cached.

    It is made from the exported forward graph where that can be, since an export takes minutes, and exported where not.
    """

    def make(directory: Path) -> None:
        graph = _derived(source, exported)
        if graph is not None and _is_faithful(source, layers, graph, exported.parent):
            (directory / _FROM_FORWARD).touch()
            return
        inputs = ragged_inputs(source, _EXAMPLE_LENGTHS, side="left")
        path = directory / MODEL_NAME
        save_onnx(export_for_generation(source.model, inputs), path)
        found = _trial(source, layers, ir.load(str(path)), directory)
        if not found.relative_error <= _FAITHFUL:
            raise PreconditionError(
                f"Written token by token, {type(source.model).__name__} is off by {found.relative_error:.2g} from its "
                "forward pass, so it keeps something of the past besides its attention's keys and values.",
                "Only the forward graph is made; the model has no generate().",
            )

    key = cache_key(version=GENERATION_VERSION, export=export_key(source, layers))
    entry, hit = cached("generation", key, make)
    graph = _derived(source, exported) if (entry / _FROM_FORWARD).exists() else ir.load(str(entry / MODEL_NAME))
    assert graph is not None
    return graph, hit


def _derived(source: SourceModel, exported: Path) -> ir.Model | None:
    """The exported forward graph with positions as an input; None if they cannot become one."""
    graph = ir.load(str(exported))
    return graph if not takes_positions(source.model) or take_positions(graph.graph) else None


def _is_faithful(source: SourceModel, layers: list[AttentionLayer], graph: ir.Model, folder: Path) -> bool:
    try:
        return _trial(source, layers, graph, folder).relative_error <= _FAITHFUL
    except PreconditionError:
        raise
    except Exception:
        # Whatever is wrong with a derived graph, the model can still be exported as it is.
        return False


def _trial(source: SourceModel, layers: list[AttentionLayer], graph: ir.Model, folder: Path) -> OutputDeviation:
    """How far generation from ``graph``, which is used up, is from torch's forward pass.

    Args:
        folder: where the file of its weights lies; they stay there.
    """
    keep_last_position(graph.graph)
    groups, cached_layers = add_caches(graph)
    _check_complete(layers, cached_layers)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".trial-", suffix=".onnx") as trial:
        ir.save(graph, trial.name)
        record = record_of(source.model, source.processor, groups, cached_layers, 0)
        return _proof(source, record, Path(trial.name))


def _check_complete(layers: list[AttentionLayer], found: list[CachedLayer]) -> None:
    """Every attention module must have its cache.

    Raises:
        PreconditionError: naming one that has none.
    """
    names = [layer.name for layer in found]
    for layer in layers:
        if not any(name == layer.layer or name.startswith(f"{layer.layer}/") for name in names):
            raise PreconditionError(
                f"{layer.layer} keeps torch's own attention ({layer.reason}), which has no cache here.",
                "Only the forward graph is made; the model has no generate().",
            )


def with_positions(calibration: Iterable[Batch]) -> Iterable[Batch]:
    """Calibration batches with the positions that the generating graph takes besides."""
    for batch in calibration:
        mask = torch.from_numpy(np.asarray(batch["attention_mask"]))
        yield {**batch, "position_ids": positions_of(mask).numpy()}


def record_of(
    model: PreTrainedModel, processor: Any | None, groups: list[CacheGroup], layers: list[CachedLayer], shared: int
) -> GenerationRecord:
    """What ``effc.json`` says of a generating graph.

    Args:
        model, processor: tell which tokens end a text and which pad it.
        groups, layers: what :func:`add_caches` gave.
        shared: bytes of weights that lie in the forward graph's file.
    """
    ends, padding = end_and_padding(model, processor)
    return GenerationRecord(
        file=GENERATION_NAME,
        groups=[_group_record(group) for group in groups],
        layers=[
            CachedLayerRecord(
                layer=layer.name,
                group=layer.group,
                num_heads=layer.num_heads,
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                kept_in=layer.kept_in,
            )
            for layer in layers
        ],
        positions=takes_positions(model),
        eos_token_ids=ends,
        pad_token_id=padding,
        weights_shared=shared,
    )


def end_and_padding(model: PreTrainedModel, processor: Any | None) -> tuple[list[int], int]:
    """Tokens that end a text, and the one that pads it."""
    settings = model.generation_config
    owners = [owner for owner in (settings, processor, model.config) if owner is not None]
    found: Any = next((value for owner in owners if (value := getattr(owner, "eos_token_id", None)) is not None), [])
    ends = [int(end) for end in (found if isinstance(found, (list, tuple)) else [found])]
    paddings = [getattr(owner, "pad_token_id", None) for owner in owners]
    padding = next((value for value in paddings if isinstance(value, int) and value >= 0), ends[0] if ends else 0)
    return ends, padding


def _group_record(group: CacheGroup) -> CacheGroupRecord:
    cache, common = group.cache, {"pattern": group.pattern, "distance": group.distance}
    match cache:
        case SlotCache():
            return CacheGroupRecord(**common, kind="slots", sinks=cache.sinks, recent=cache.recent)
        case OrderedCache():
            return CacheGroupRecord(**common, kind="ordered", queries=cache.queries)
        case StateCache():
            shapes = {name: list(shape) for name, shape in cache.shapes}
            initial = dict(zip(shapes, cache.initial, strict=True))
            return CacheGroupRecord(**common, kind="state", state=shapes, initial=initial)


def _proof(source: SourceModel, record: GenerationRecord, path: Path) -> OutputDeviation:
    """Logits of a left-padded prompt and of tokens taken one by one, against torch's forward pass over the whole."""
    limit = source.max_length or max(_PROOF_LENGTHS) + _PROOF_STEPS
    steps = min(_PROOF_STEPS, limit // 2)
    lengths = [min(length + steps, limit) for length in _PROOF_LENGTHS]
    inputs = ragged_inputs(source, lengths, side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    extra = {"position_ids": positions_of(mask)} if record.positions else {}
    with torch.no_grad():
        whole = source.model(input_ids=ids, attention_mask=mask, **extra, use_cache=False).logits
    expected = whole[:, -steps - 1 :].numpy()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    generator = Generator(session, record, source.max_length)
    tokens, real = ids.numpy(), mask.numpy().astype(bool)
    memory = Memory(record, tokens[:, :-steps], real[:, :-steps])
    found = [generator.prefill(memory)]
    found += [generator.step(memory, tokens[:, place]) for place in range(tokens.shape[1] - steps, tokens.shape[1])]
    return deviation(expected, np.stack(found, axis=1), np.ones(expected.shape[:2]), logits=True)
