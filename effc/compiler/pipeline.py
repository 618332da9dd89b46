"""``compile``: which passes run, in which order, each timed, probed and recorded; all or nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from effc import __version__
from effc.compiler.artifact import check_output, record_files, staged, write_manifest
from effc.compiler.attention_search import SEARCH_VERSION, needs_search, resolved, search
from effc.compiler.bench import bench, choose_lengths
from effc.compiler.bench_ratios import unmet_speed
from effc.compiler.calibrate_forms import calibrate_forms
from effc.compiler.calibration_data import CalibrationData
from effc.compiler.compress import Compression, Probe, compresses, run_torch
from effc.compiler.engine_check import EnginePlan, check_engine
from effc.compiler.engine_sources import forward_source, generation_sources
from effc.compiler.engine_torch import build_torch_program
from effc.compiler.engines import ENGINES_VERSION, build_engines
from effc.compiler.exported import (
    EXPORT_VERSION,
    decode_twin_of,
    describe_layers,
    export_key,
    export_now,
    exported_graph,
    has_head_forms,
    twin_of,
)
from effc.compiler.generation_build import GENERATION_VERSION, add_generation, end_and_padding, forward_graph
from effc.compiler.inputs import graph_inputs, ragged_inputs, token_mask
from effc.compiler.manifest import (
    AttentionLayer,
    AttentionSearch,
    BenchRecord,
    EnginesRecord,
    GenerationRecord,
    Manifest,
    OutputDeviation,
    PassRecord,
    Skipped,
    TensorRecord,
    VerifyRecord,
)
from effc.compiler.metrics import compare_outputs
from effc.compiler.positions import extend_positions, thin_positions
from effc.compiler.pruned_checkpoint import check_savable, save_checkpoint
from effc.compiler.quantization_search import CHOOSE, CHOOSE_VERSION, choose_quantization
from effc.compiler.recipe import Recipe, build_recipe, default_output, load_recipe, merge
from effc.compiler.recover import RECOVER, RECOVER_VERSION, Recovery, recover
from effc.compiler.recovery import refuse_untrained
from effc.compiler.runtime import MODEL_NAME
from effc.compiler.sentence_transformers import copy_modules
from effc.compiler.source import SourceModel, load, locate
from effc.compiler.toolchain import toolchain
from effc.compiler.twin import check_decode, dense_decode_twin, dense_twin
from effc.compiler.verify import verify
from effc.errors import EffcError, OutputError, PassFailedError, PreconditionError, RequirementError, UsageError
from effc.exporters.generation_export import positions_of
from effc.exporters.onnx_graph import save_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.base import PassResult
from effc.passes.engine_settings import TORCH_TARGET
from effc.passes.extend_positions import ExtendPositions
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.observed_attention import ObservedAttention
from effc.passes.prepare_engine import PrepareEngine
from effc.passes.quantize import GraphPass, quantizing_passes
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes
from effc.passes.rewrite_attention import RewriteAttention, describe
from effc.passes.sparse_positions import SparsePositions
from effc.plugins.function_body import OPSET

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, steps done, steps in all)``."""

# Two sequences of a batch: one longer than a span of a window of 256, so that the blocked form is what runs.
_PROBE_LENGTHS = (448, 61)
# Default lengths of the measurement that every compile makes; `effc bench` measures more.
_QUICK_LENGTHS = 3


@dataclass(frozen=True)
class Artifact:
    """A finished compile.

    Attributes:
        path: the artifact directory.
        manifest: what ``effc.json`` holds.
        unmet: requirements that the result misses and layers that could not be rewritten, as full sentences.
    """

    path: Path
    manifest: Manifest
    unmet: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rewritten:
    """The record of the rewrite pass and the layers it found."""

    result: PassResult[Any]
    layers: list[AttentionLayer]
    unwanted: list[tuple[str, str]]
    observed: ObservedAttention


def compile(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    attention: str | Mapping[str, Any] | None = None,
    quantization: str | Mapping[str, Any] | None = None,
    prune: str | Sequence[str | Mapping[str, Any]] | None = None,
    low_rank: float | str | Mapping[str, Any] | None = None,
    target: str | None = None,
    task: str | None = None,
    revision: str | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overwrite: bool = False,
    check: bool = False,
    progress: Progress | None = None,
    calibration: Iterable[Any] | None = None,
    **sections: Mapping[str, Any],
) -> Artifact:
    """Compile a Hugging Face model into an artifact directory.

    Args:
        model: local directory, GGUF file or hub name.
        output: the directory to make; ``<model name>.effc`` in the working directory when None.
        attention: pattern text such as ``local:256``, or the recipe's section.
        quantization: ``none``, ``int8`` or another mode, or the recipe's section.
        prune: texts such as ``heads:0.25`` and ``2:4``, or the recipe's list.
        low_rank: ``0.5`` (share of parameters), ``rank:64``, ``energy:0.95``, or the recipe's section.
        target: what the artifact runs on.
        task: detected from the config when None.
        revision: branch, tag or commit on the hub.
        recipe: a recipe file or its values; the other arguments override it.
        overwrite: replace an artifact that is already at ``output``.
        check: raise :class:`RequirementError` if a requirement is missed; the artifact stays.
        progress: told of every step.
        calibration: what activations are calibrated on, in place of the recipe's file: any iterable of texts, rows such
            as ``{"text": "..."}``, or inputs of the model by name.
        sections: further recipe sections, such as ``bench={"enabled": False}``.

    Raises:
        UsageError, SourceModelError, DataError, PreconditionError, OutputError, PassFailedError: see each; nothing is
            left at ``output`` then.
    """
    flags: dict[str, Any] = {key: dict(value) for key, value in sections.items()}
    spec = {"path": str(model) if model is not None else None, "task": task, "revision": revision}
    flags["model"] = {key: value for key, value in spec.items() if value is not None}
    given = {"attention": attention, "quantization": quantization, "prune": prune, "low_rank": low_rank}
    flags |= {key: value for key, value in {**given, "target": target}.items() if value is not None}
    whole = _whole_recipe(recipe, flags)
    artifact = run(
        whole,
        Path(output or default_output(whole)),
        overwrite=overwrite,
        progress=progress,
        calibration_items=calibration,
    )
    if check and artifact.unmet:
        raise RequirementError(" ".join(artifact.unmet), f"The artifact is at '{artifact.path}'.")
    return artifact


def _whole_recipe(recipe: str | Path | Mapping[str, Any] | Recipe | None, flags: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    base = load_recipe(recipe) if isinstance(recipe, (str, Path)) else dict(recipe or {})
    return build_recipe(merge(base, flags), origin=f"'{recipe}'" if isinstance(recipe, (str, Path)) else "the recipe")


class _Log:
    """Runs steps one after another and keeps their records."""

    def __init__(self, steps: int, progress: Progress | None):
        self.records: list[PassRecord] = []
        self.steps, self._progress, self._done = steps, progress, 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Tell of a step, and let an error say which step it was and what came before."""
        if self._progress:
            self._progress(name, self._done, self.steps)
        try:
            yield
        except (EffcError, OSError):
            raise
        except Exception as error:
            before = ", ".join(record.name for record in self.records) or "no other pass"
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PassFailedError(
                f"The pass '{name}' failed after {before}: {reason.strip()[:300]}.",
                "Run again with --debug for the trace.",
            ) from error
        self._done += 1

    def tell(self, what: str) -> None:
        """Tell of something within the step that runs."""
        if self._progress:
            self._progress(what, self._done, self.steps)

    def add(self, name: str, version: int, started: float, result: PassResult[Any], cached: bool = False) -> PassRecord:
        """Record a finished pass."""
        record = PassRecord(
            name=name,
            version=version,
            seconds=time.perf_counter() - started,
            modified=result.modified,
            cached=cached,
            changed=result.changed,
            skipped=[Skipped(module=module, reason=reason) for module, reason in result.skipped],
            metrics=result.metrics,
        )
        self.records.append(record)
        return record


def run(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration_items: Iterable[Any] | None = None,
) -> Artifact:
    """Compile as the recipe says; see :func:`compile`."""
    check_output(output, overwrite)
    if recipe.require.min_speedup is not None and not recipe.bench.enabled:
        raise UsageError("A minimum speed-up is required but speed is not measured.", "Leave --no-bench out.")
    if recipe.require.min_decode_speedup is not None and not (recipe.bench.enabled and recipe.bench.decode):
        raise UsageError(
            "A minimum speed-up per token is required but not measured.", "Leave --no-bench and bench.decode out."
        )
    engine = check_engine(recipe, calibration_items is not None)
    quantize = recipe.quantization.active
    quantizers = quantizing_passes if engine is None else engine_quantizing_passes
    # An engine is timed on the GPU that it is for.
    benches = recipe.bench.enabled and engine is None
    log = _Log(
        6
        + len(list(quantizers(recipe.quantization, None)))
        + benches
        + (engine is not None)
        + needs_search(recipe.attention),
        progress,
    )
    data = CalibrationData(recipe, calibration_items) if quantize else None
    with log.step("load"):
        source = load(locate(recipe.model))
    generates = recipe.generation.enabled and source.task.name == "causal-lm"
    _check_kv_cache(recipe, generates)
    if generates and recipe.engine.tensor_parallel > 1:
        raise UsageError(
            "Engines that write text keep caches, which several GPUs cannot share as they are served.",
            "Leave --tensor-parallel out, or build the forward pass alone with --no-generation.",
        )
    log.steps += generates and engine is None
    if recipe.checkpoint.enabled:
        check_savable(source)
    calibration = None if data is None else data.batches(source)
    recovery = Recovery.read(recipe, source) if recipe.recover.enabled else None
    log.steps += recovery is not None
    probe = ragged_inputs(source, _probe_lengths(source))
    mask = token_mask(probe)
    mask = None if mask is None else mask.numpy()
    untouched = run_torch(source, probe)

    compression = None
    if compresses(recipe):
        compression = Compression(source, recipe, Probe(probe, untouched), log.tell)
        log.steps += len(compression.steps)
        for asked in compression.steps:
            with log.step(compression.name(asked)):
                started = time.perf_counter()
                compressed = compression.run(asked)
                record = log.add(compression.name(asked), compression.version(asked), started, compressed)
                record.probe = compression.deviation()
        probe, untouched, mask = dict(compression.probe.inputs), compression.probe.untouched, compression.probe.mask
        if compression.kept_tokens is not None and data is not None:
            calibration = data.batches(source)
    if recipe.positions.max_length is not None:
        log.steps += 1
        with log.step(ExtendPositions.name):
            started = time.perf_counter()
            extended = extend_positions(source, recipe.positions, recipe.attention)
            record = log.add(ExtendPositions.name, ExtendPositions.version, started, extended)
            record.probe = compare_outputs(untouched, run_torch(source, probe), mask)
    attention, observed, found = recipe.attention, observe_attention(source), None
    if needs_search(attention):
        with log.step("choose-attention"):
            found = _search(source, observed, recipe, log, progress)
        attention = resolved(attention, found)
    with log.step(RewriteAttention.name):
        started = time.perf_counter()
        rewritten = rewrite(source, attention, observed)
        if found is None and recovery is None:
            refuse_untrained(source, observed, recipe)
        rewritten.result.metrics.update(calibrate_forms(source, observed, recipe))
        record = log.add(RewriteAttention.name, RewriteAttention.version, started, rewritten.result)
        record.probe = compare_outputs(untouched, run_torch(source, probe), mask)
    layers = rewritten.layers
    if recipe.positions.sparse:
        log.steps += 1
        with log.step(SparsePositions.name):
            started = time.perf_counter()
            thinned = thin_positions(source, recipe.positions, layers)
            record = log.add(SparsePositions.name, SparsePositions.version, started, thinned)
            record.probe = compare_outputs(untouched, run_torch(source, probe), mask)

    if recovery is not None:
        with log.step(RECOVER):
            started = time.perf_counter()
            kept_tokens = None if compression is None else compression.kept_tokens
            recovered, hit = recover(recovery, source, observed, layers, kept_tokens, progress)
            record = log.add(RECOVER, RECOVER_VERSION, started, recovered, cached=hit)
            record.probe = compare_outputs(untouched, run_torch(source, probe), mask)

    with log.step("export"):
        started = time.perf_counter()
        exported, hit = exported_graph(source, layers)
        key = export_key(source, layers)
        log.add("export", EXPORT_VERSION, started, PassResult(None, True, metrics={"opset": OPSET}), cached=hit)

    with staged(output, overwrite) as staging:
        path = staging / MODEL_NAME
        graph = ir.load(str(exported))
        fuse: GraphPass = FuseOnnxRuntime() if engine is None else PrepareEngine()
        with log.step(fuse.name):
            started = time.perf_counter()
            fused = fuse.run(graph)
            fuse.ensures(graph)
            save_onnx(graph, path)
            record = log.add(fuse.name, fuse.version, started, fused)
            record.probe = _probe_graph(path, probe, untouched, mask)
        schemes, remembered, selection = Schemes(recipe.quantization), Remembered(), None
        if recipe.quantization.budget is not None:
            log.steps += 1
            with log.step(CHOOSE):
                started = time.perf_counter()
                selection, result = choose_quantization(source, recipe, path, calibration, remembered, log.tell)
                schemes = Schemes(recipe.quantization, selection.reasons())
                log.add(CHOOSE, CHOOSE_VERSION, started, result)
        for quantizer in quantizers(recipe.quantization, calibration, schemes, remembered) if quantize else ():
            with log.step(quantizer.name):
                started = time.perf_counter()
                graph = ir.load(str(path))
                quantized = quantizer.run(graph)
                quantizer.ensures(graph)
                _replace(graph, path)
                record = log.add(quantizer.name, quantizer.version, started, quantized)
                record.probe = _probe_graph(path, probe, untouched, mask)
        generation, engines = None, None
        if engine is not None:
            with log.step("engines"):
                given = (schemes, remembered)
                engines = _engines(
                    engine, source, layers, recipe, calibration, exported, staging, probe, log, generates, given
                )
        elif generates:
            with log.step("generation"):
                given = (schemes, remembered)
                generation = _generation(source, layers, recipe, calibration, exported, staging, log, given)
        if recipe.target == TORCH_TARGET:
            log.steps += 1
            with log.step("torch-tensorrt"):
                started = time.perf_counter()
                program = build_torch_program(source, recipe.engine, staging, log.tell)
                done: PassResult[Any] = PassResult(None, True, [f"{program.parent.name}/{program.name}"])
                log.add("torch-tensorrt", ENGINES_VERSION, started, done)
        _save_source_files(source, staging)
        checkpoint = None
        if recipe.checkpoint.enabled:
            log.steps += 1
            with log.step("checkpoint"):
                checkpoint = save_checkpoint(source, staging, probe)
        manifest = Manifest(
            effc_version=__version__,
            created=datetime.now(UTC),
            target=recipe.target,
            source=source.record(),
            recipe=recipe.model_dump(mode="json"),
            toolchain=toolchain(),
            export_key=key,
            passes=log.records,
            attention=layers,
            attention_search=found,
            quantization_search=selection,
            positions=source.positions,
            compression=None if compression is None else compression.record(staging),
            checkpoint=checkpoint,
            inputs=graph_inputs(source),
            outputs=_output_records(path),
            files=record_files(staging),
            generation=generation,
            engines=engines,
        )
        write_manifest(staging, manifest)
        with log.step("verify"):
            manifest.verification = verify(staging, trust_remote_code=recipe.model.trust_remote_code)
        if benches:
            with log.step("bench"):
                manifest.benchmark = _bench(staging, recipe, manifest, exported, key, source, observed)
        write_manifest(staging, manifest)
    if progress:
        progress("done", 1, 1)
    return Artifact(output, manifest, tuple(_unmet(recipe, manifest, rewritten)))


def _check_kv_cache(recipe: Recipe, generates: bool) -> None:
    kept_in = recipe.quantization.kv_cache
    if kept_in != "fp32" and not (generates and recipe.target == "onnxruntime"):
        raise UsageError(
            f"quantization.kv_cache {kept_in} is for models that write text on the target onnxruntime, with a "
            "generating graph.",
            "Leave it out.",
        )


def _generation(
    source: SourceModel,
    layers: list[AttentionLayer],
    recipe: Recipe,
    calibration: list[dict[str, NDArray[Any]]] | None,
    exported: Path,
    staging: Path,
    log: _Log,
    quantized: tuple[Schemes, Remembered],
) -> GenerationRecord | None:
    """Make the generating graph; a model that cannot generate from caches is compiled without one, and told so."""
    started = time.perf_counter()
    quantization = recipe.quantization if recipe.quantization.active else None
    try:
        record, proof, hit = add_generation(
            source,
            layers,
            quantization,
            calibration,
            exported,
            staging,
            *quantized,
            kept_in=recipe.quantization.kv_cache,
        )
    except PreconditionError as error:
        result: PassResult[Any] = PassResult(None, False, skipped=[(type(source.model).__name__, error.problem)])
        log.add("generation", GENERATION_VERSION, started, result)
        return None
    changed = [layer.layer for layer in record.layers]
    metrics = {
        "bytes_shared": record.weights_shared,
        "relative_error_to_torch": proof.relative_error,
        "top1_agreement_with_torch": proof.top1_agreement,
    }
    done: PassResult[Any] = PassResult(None, True, changed, metrics=metrics)
    log.add("generation", GENERATION_VERSION, started, done, cached=hit)
    return record


def _engines(
    plan: EnginePlan,
    source: SourceModel,
    layers: list[AttentionLayer],
    recipe: Recipe,
    calibration: list[dict[str, NDArray[Any]]] | None,
    exported: Path,
    staging: Path,
    probe: Mapping[str, torch.Tensor],
    log: _Log,
    generates: bool,
    quantized: tuple[Schemes, Remembered],
) -> EnginesRecord:
    """Build the engines; a model that cannot generate from caches gets that of its forward pass, and is told so."""
    started, path = time.perf_counter(), staging / MODEL_NAME
    skipped: list[tuple[str, str]] = []
    given = {name: value.numpy() for name, value in probe.items()}
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f".{staging.name}-graphs-") as work:
        sources = forward_source(path)
        if generates:
            log.tell("prefill and decode graphs")
            try:
                sources = generation_sources(source, layers, recipe, calibration, quantized, exported, path, Path(work))
            except PreconditionError as error:
                skipped.append((type(source.model).__name__, error.problem))
        mask = probe.get("attention_mask")
        if mask is not None:
            given["position_ids"] = positions_of(mask).numpy()
        record = build_engines(plan, recipe.engine, sources, source.max_length, exported, given, staging, log.tell)
    if sources[0].name != "forward":
        record.eos_token_ids, record.pad_token_id = end_and_padding(source.model, source.processor)
    changed = [engine.file for engine in record.engines]
    result: PassResult[Any] = PassResult(None, True, changed, skipped)
    log.add("engines", ENGINES_VERSION, started, result)
    return record


def observe_attention(source: SourceModel) -> ObservedAttention:
    """Switch ``source.model`` to effc's attention, every module computing what it always did."""
    inputs = ragged_inputs(source, _probe_lengths(source))
    return ObservedAttention(source.model, inputs, source.processor, source.max_length)


def rewrite(source: SourceModel, settings: AttentionSection, observed: ObservedAttention | None = None) -> Rewritten:
    """Assign the attention of ``source.model`` as the recipe says.

    Args:
        settings: must name a form for every layer, not a search.
        observed: the model's modules, where they have been observed already.
    """
    observed = observed or observe_attention(source)
    attention = RewriteAttention(settings, {}, observed=observed)
    result = attention.run(source.model)
    return Rewritten(result, describe_layers(describe(attention.layers)), attention.unwanted(), observed)


def _search(
    source: SourceModel, observed: ObservedAttention, recipe: Recipe, log: _Log, progress: Progress | None
) -> AttentionSearch:
    started = time.perf_counter()
    found, hit = search(source, observed, recipe, progress)
    chosen = [row.layer for row in found.layers if row.chosen != "dense"]
    metrics = {"error": found.error, "error_name": found.error_name, "cost_share": found.cost_share}
    result: PassResult[Any] = PassResult(None, bool(chosen), chosen, metrics=metrics)
    log.add("choose-attention", SEARCH_VERSION, started, result, cached=hit)
    return found


def _probe_lengths(source: SourceModel) -> tuple[int, ...]:
    limit = source.max_length or max(_PROBE_LENGTHS)
    return tuple(min(length, limit) for length in _PROBE_LENGTHS)


def _probe_graph(
    path: Path, inputs: Mapping[str, torch.Tensor], reference: Mapping[str, NDArray[Any]], mask: NDArray[Any] | None
) -> dict[str, OutputDeviation]:
    """The graph against the untouched model on the probe inputs.

    Raises:
        PassFailedError: if an output is not finite.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    outputs = dict(zip(names, session.run(None, feed), strict=True))
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise PassFailedError(
                f"The graph's output '{name}' is not finite after this pass.", "Exclude layers, or report this model."
            )
    return compare_outputs(reference, outputs, mask)


def _replace(graph: ir.Model, path: Path) -> None:
    """Write a graph over the files that its own weights are still read from."""
    with tempfile.TemporaryDirectory(dir=path.parent) as fresh:
        save_onnx(graph, Path(fresh) / path.name)
        for file in sorted(Path(fresh).iterdir()):
            file.replace(path.with_name(file.name))


def _save_source_files(source: SourceModel, directory: Path) -> None:
    source.config.save_pretrained(directory)
    if source.processor is not None:
        source.processor.save_pretrained(directory)
    copy_modules(source.located.directory, directory)


def _output_records(path: Path) -> list[TensorRecord]:
    graph = ir.load(str(path)).graph
    return [
        TensorRecord(
            name=value.name or "",
            dtype=str(value.dtype.numpy()) if value.dtype is not None else "unknown",
            shape=[dim if isinstance(dim, int) else str(dim.value) for dim in (value.shape or ())],
        )
        for value in graph.outputs
    ]


def _bench(
    staging: Path,
    recipe: Recipe,
    manifest: Manifest,
    exported: Path,
    key: str,
    source: SourceModel,
    observed: ObservedAttention,
) -> BenchRecord:
    def dense_export() -> ir.Model:
        with observed.using({}):
            return export_now(source)

    def dense_decode() -> Path:
        if source.weights is not None or has_head_forms(manifest.attention):
            return dense_decode_twin(manifest, trust_remote_code=recipe.model.trust_remote_code)
        check_decode(manifest)
        return decode_twin_of(forward_graph(source, manifest.attention, exported)[0], key, manifest.attention)

    if source.weights is not None:
        # The model in memory is no longer the one to compare with.
        twin = dense_twin(manifest, trust_remote_code=recipe.model.trust_remote_code)
    else:
        twin = twin_of(exported, key, manifest.attention, dense_export)
    lengths = list(recipe.bench.lengths) or choose_lengths(manifest, None)[:_QUICK_LENGTHS]
    return bench(
        staging,
        lengths=lengths,
        batch=recipe.bench.batch,
        rounds=recipe.bench.rounds,
        decode=recipe.bench.decode,
        twin=twin,
        decode_twin=dense_decode,
    )


def _unmet(recipe: Recipe, manifest: Manifest, rewritten: Rewritten) -> Iterator[str]:
    if rewritten.unwanted and not recipe.attention.allow_partial:
        layers = "; ".join(f"{layer} ({reason})" for layer, reason in rewritten.unwanted[:5])
        yield f"{len(rewritten.unwanted)} attention modules could not be rewritten: {layers}."
    chosen = manifest.quantization_search
    if chosen is not None and not chosen.met:
        yield f"The quality drop of {chosen.request} ({chosen.drop_name}) is {chosen.drop:.4f}, above its budget."
    if manifest.benchmark is not None:
        yield from unmet_speed(manifest.benchmark, recipe.require.min_speedup, recipe.require.min_decode_speedup)
    if recipe.require.max_quality_drop is not None and manifest.verification is not None:
        drop = manifest.verification.quality_drop
        if not drop <= recipe.require.max_quality_drop:
            yield (
                f"The quality drop ({manifest.verification.quality_metric}) is {drop:.4f}, above the allowed "
                f"{recipe.require.max_quality_drop:g}."
            )


def remeasured(
    directory: Path, *, verification: VerifyRecord | None = None, benchmark: BenchRecord | None = None
) -> Manifest:
    """Store a new measurement in an artifact's ``effc.json`` and report."""
    from effc.compiler.runtime import read_manifest

    manifest = read_manifest(directory)
    if verification is not None:
        manifest.verification = verification
    if benchmark is not None:
        manifest.benchmark = benchmark
    # A read-only artifact can still be measured; the figures are the caller's.
    with suppress(OutputError):
        write_manifest(directory, manifest)
    return manifest
