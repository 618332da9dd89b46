"""The step of a compile that builds engines: graphs in half precision, profiles, the plugin, one plan per architecture.

Nothing here runs an engine. What is measured is what a CPU can show: the graphs in half precision against fp32, and
decoding token by token against the forward pass, both in ONNX Runtime; and the builder's log says what the engines are
made of.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.compiler.cache import cache_directory, cache_key, cached
from effc.compiler.engine_check import EnginePlan
from effc.compiler.engine_profiles import Profile, make_profiles
from effc.compiler.engine_proof import graph_error
from effc.compiler.engine_ranks import divide
from effc.compiler.manifest import EngineGraphRecord, EngineRecord, EnginesRecord, TensorRecord
from effc.exporters.cuda_device import device_capability
from effc.exporters.engine_build import Request, build_engine
from effc.exporters.engine_caches import EngineCache, half_caches
from effc.exporters.engine_graph import EngineGraph, make_engine_graph, save_engine_graph
from effc.exporters.engine_log import serve
from effc.exporters.tensorrt_flavours import version_of
from effc.passes.engine_settings import EngineSection
from effc.plugins.tensorrt_library import LEAST_CAPABILITY, LIBRARY_NAME, existing_library, find_compiler

ENGINES_VERSION = 1
FOLDER = "engines"
NOT_RUN = "engines not run: no device"
Tell = Callable[[str], None]


@dataclass
class EngineSource:
    """A graph to build from.

    Attributes:
        name: ``forward``, ``prefill`` or ``decode``.
        path: the graph in fp32, quantized or not, with ``effc::`` operators.
        caches: what its attention layers keep; empty for ``forward``.
        step_error: of decoding token by token, see :class:`EngineGraphRecord`.
        pads: of a decode graph, see :func:`pads_in_front`.
    """

    name: str
    path: Path
    caches: list[EngineCache] = field(default_factory=list)
    step_error: float | None = None
    pads: bool = False


def build_engines(
    plan: EnginePlan,
    settings: EngineSection,
    sources: Sequence[EngineSource],
    max_length: int | None,
    exported: Path,
    probe: dict[str, Any],
    directory: Path,
    tell: Tell,
) -> EnginesRecord:
    """Build all engines into ``directory/engines``.

    Args:
        exported: the forward graph in fp32, before quantization, which the others are compared with.
        probe: inputs that they are compared on.
        directory: of the artifact.

    Raises:
        UsageError: if a shape does not fit the model.
        MissingDependencyError, PassFailedError: if the plugin or an engine cannot be built.
    """
    folder = directory / FOLDER
    folder.mkdir()
    library: Path | None = None
    graphs: dict[str, EngineGraphRecord] = {}
    engines: list[EngineRecord] = []
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-engines-") as work:
        for source in sources:
            tell(f"{source.name}: {plan.precision} graph")
            graph = _graph(source.path, source.name, plan, settings.plugin)
            graphs[source.name] = _compare(source, plan, graph, exported, probe, Path(work))
            shares: list[tuple[int | None, Path]] = [(None, source.path)]
            if settings.tensor_parallel > 1:
                tell(f"{source.name}: shares of {settings.tensor_parallel} GPUs")
                files, error = divide(source.path, settings.tensor_parallel, probe, Path(work))
                graphs[source.name].divided_error, shares = error, list(enumerate(files))
            for rank, share in shares:
                if rank is not None:
                    graph = _graph(share, source.name, plan, settings.plugin)
                path = Path(work) / f"{source.name}{_ending(rank)}.onnx"
                profiles = make_profiles(list(graph.model.graph.inputs), settings.shapes, max_length, source.caches)
                save_engine_graph(graph, path)
                if graph.attention.plugins and library is None:
                    library = plugin_library(plan.capabilities, tell)
                for capability in plan.capabilities:
                    target = (capability, rank)
                    engines.append(
                        _build(plan, settings, source.name, graph, path, profiles, target, library, folder, tell)
                    )
            for file in Path(work).iterdir():
                file.unlink()
    copied = library is not None and not settings.embed_plugin
    if library is not None and copied:
        shutil.copy2(library, folder / LIBRARY_NAME)
    return EnginesRecord(
        flavour=plan.flavour.target,
        version=version_of(plan.flavour) or "unknown",
        precision=plan.precision,
        plugin=f"{FOLDER}/{LIBRARY_NAME}" if copied else None,
        plugin_embedded=library is not None and settings.embed_plugin,
        version_compatible=settings.version_compatible,
        tensor_parallel=settings.tensor_parallel,
        graphs=graphs,
        engines=engines,
        not_run=NOT_RUN if device_capability() is None else None,
    )


def plugin_library(capabilities: Sequence[int], tell: Tell | None = None) -> Path:
    """effc's TensorRT plugin with kernels for some architectures, compiled if it is not there yet.

    Raises:
        MissingDependencyError, PassFailedError: see :mod:`effc.plugins.tensorrt_library`.
    """
    library = existing_library()
    if library is not None:
        return library
    compiler = find_compiler()
    wanted = sorted({capability for capability in capabilities if capability >= LEAST_CAPABILITY})
    if tell is not None:
        tell(f"compiling the plugin for {', '.join(f'sm_{number}' for number in wanted)}")
    key = cache_key(**compiler.key(wanted))
    entry, _ = cached("tensorrt-plugin", key, lambda made: compiler.compile(wanted, made / LIBRARY_NAME))
    return entry / LIBRARY_NAME


def _ending(rank: int | None) -> str:
    return "" if rank is None else f".rank{rank}"


def _graph(path: Path, name: str, plan: EnginePlan, plugin: bool) -> EngineGraph:
    model = ir.load(str(path))
    as_half = half_caches(model.graph)
    return make_engine_graph(model, plan.precision, plugin=plugin, past=name == "decode", as_half=as_half)


def _compare(
    source: EngineSource, plan: EnginePlan, graph: EngineGraph, exported: Path, probe: dict[str, Any], work: Path
) -> EngineGraphRecord:
    record = EngineGraphRecord(step_error=source.step_error, pads=source.pads)
    if graph.conversion is not None:
        record.kept_in_fp32, record.clipped = graph.conversion.kept, graph.conversion.clipped
    if source.name == "decode":
        record.not_run = "it computes what the prefill graph computes"
        return record
    record.error_fp32 = graph_error(exported, source.path, probe)
    if plan.precision == "bf16":
        record.not_run = "ONNX Runtime has no bf16 on CPU"
    elif plan.precision == "fp32":
        record.error = record.error_fp32
    else:
        # Written out in standard operators: ONNX Runtime has no plugin, and effc's kernels there are fp32.
        plain = _graph(source.path, source.name, plan, False) if graph.attention.plugins else graph
        path = work / f"{source.name}-plain.onnx"
        save_engine_graph(plain, path, builder=False)
        record.error = graph_error(exported, path, probe)
    return record


def _build(
    plan: EnginePlan,
    settings: EngineSection,
    name: str,
    graph: EngineGraph,
    path: Path,
    profiles: list[Profile],
    target: tuple[int, int | None],
    library: Path | None,
    folder: Path,
    tell: Tell,
) -> EngineRecord:
    capability, rank = target
    file = folder / f"{name}.sm_{capability}{_ending(rank)}.plan"
    plugin = str(library) if library is not None and graph.attention.plugins else None
    request = Request(
        module=plan.flavour.target,
        graph=str(path),
        plan=str(file),
        log=str(path.with_suffix(".log")),
        plugin=plugin,
        embedded=plugin if settings.embed_plugin else None,
        capability=capability if plan.flavour.anywhere else None,
        profiles=profiles,
        flags=plan.flags,
        optimization_level=settings.optimization_level,
        workspace_bytes=None if settings.workspace_mib is None else settings.workspace_mib << 20,
        timing_cache=_timing_cache(plan, capability),
    )
    built = build_engine(plan.flavour, request, f"{name} sm_{capability}{_ending(rank)}", tell)
    attention = [*graph.attention.plugins, *graph.attention.written_out]
    served = serve(built.layers, attention, graph.linears, graph.attention.plugins)
    warnings = [text for text in built.warnings if "Int64 binding" not in text]
    if served.missed:
        warnings.insert(
            0,
            f"{len(served.missed)} linear layers were quantized and are computed in floats: "
            f"{', '.join(served.missed[:8])}{', ...' if len(served.missed) > 8 else ''}.",
        )
    if not built.layers:
        warnings.insert(0, "The builder's log lists no layers, so it is not known what computes what.")
    return EngineRecord(
        file=f"{FOLDER}/{file.name}",
        graph=name,
        arch=f"sm_{capability}",
        seconds=built.seconds,
        profiles=[{key: [list(shape) for shape in ranges] for key, ranges in profile.items()} for profile in profiles],
        inputs=_records(graph.model.graph.inputs),
        outputs=_records(graph.model.graph.outputs),
        attention=served.attention,
        linears=served.linears,
        low=served.low,
        warnings=warnings,
        rank=rank,
    )


def _timing_cache(plan: EnginePlan, capability: int) -> str | None:
    """Where the builder keeps what it measured; TensorRT-RTX measures nothing while it builds."""
    if plan.flavour.anywhere:
        return None
    folder = cache_directory() / "tensorrt-timing"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{plan.flavour.target}-{version_of(plan.flavour)}-sm_{capability}.bin")


def _records(values: Sequence[ir.Value]) -> list[TensorRecord]:
    return [
        TensorRecord(
            name=str(value.name),
            dtype=value.dtype.name.lower() if value.dtype is not None else "unknown",
            shape=[dim if isinstance(dim, int) else str(dim.value) for dim in (value.shape or ())],
        )
        for value in values
    ]
