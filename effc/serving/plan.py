"""Which models a Triton repository gets for an artifact, and what files each of them needs. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effc.compiler.artifact_files import MODEL_NAME, check_files, model_files, read_manifest
from effc.compiler.feeds import TensorSpec
from effc.compiler.manifest import Manifest, TensorRecord
from effc.errors import OutputError, UsageError
from effc.exporters.triton_config import EnsembleConfig, ModelConfig, Tensor, WarmUp
from effc.plugins import native
from effc.serving import backend_files
from effc.serving.backend.forward import ForwardSettings
from effc.serving.backend.version import SETTINGS_NAME
from effc.serving.external_data import check_external_data
from effc.serving.options import ServingOptions, check_name
from effc.serving.requirements import PACKAGES

LIBRARY_NAME = "libeffc_cpu.so"
_WARM_UP_LENGTHS = (8, 128)


File = Path | bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Graph:
    """A graph that is served, whole or a part.

    Attributes:
        inputs, outputs: with the batch first.
        files: it and its weights.
        pads: requests of different lengths may be padded to share a run.
    """

    inputs: Sequence[TensorRecord]
    outputs: Sequence[TensorRecord]
    files: Mapping[str, File]
    pads: bool = True


@dataclass(frozen=True)
class PlannedModel:
    """One model of a repository.

    Attributes:
        files: of the version's directory, by path inside it: where each is copied from, its content, or what writes it
            and files beside it.
    """

    config: ModelConfig | EnsembleConfig
    files: Mapping[str, File] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All models of one artifact.

    Attributes:
        name: what clients ask.
        models: in the order in which they can be loaded, ``name`` last.
        notes: what the user should know, as full sentences.
        plugins: TensorRT plugin libraries among the files of the models, ``(model, file)``.
        host_code: see :func:`effc.serving.launch.tensorrt_flags`.
        packages: what the models import inside the server, as pip names it.
    """

    name: str
    task: str
    models: tuple[PlannedModel, ...]
    notes: tuple[str, ...] = ()
    plugins: tuple[tuple[str, str], ...] = ()
    host_code: bool = False
    packages: tuple[str, ...] = PACKAGES


@dataclass(frozen=True)
class Opened:
    """An artifact whose files were checked."""

    path: Path
    manifest: Manifest

    @property
    def config(self) -> dict[str, Any]:
        """The model's own configuration, empty if the artifact has none."""
        file = self.path / "config.json"
        if not file.is_file():
            return {}
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return values

    @property
    def padding(self) -> int:
        """The id that fills ``input_ids`` behind a text."""
        return int(self.config.get("pad_token_id") or 0)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file, None if the artifact has none that a server can read."""
        file = self.path / "tokenizer.json"
        return file if file.is_file() else None


def open_artifact(path: Path) -> Opened:
    """Read ``effc.json`` and compare every file of the artifact with it.

    Raises:
        OutputError: if something is missing or changed, or a graph reads files outside of the artifact.
    """
    manifest = read_manifest(path)
    check_files(path, manifest)
    for name in manifest.files:
        if name.endswith(".onnx"):
            check_external_data(path / name)
    return Opened(path, manifest)


def plan_name(artifact: Path, options: ServingOptions) -> str:
    """The name that clients ask."""
    if options.name is not None:
        return options.name
    return check_name(artifact.resolve().name.removesuffix(".effc"))


def plan_forward(name: str, opened: Opened, options: ServingOptions) -> PlannedModel:
    """The model that runs the artifact's graph, tensors in and out."""
    manifest = opened.manifest
    files: dict[str, File] = {file: opened.path / file for file in model_files(manifest)}
    return plan_graph(name, opened, options, Graph(manifest.inputs, manifest.outputs, files))


def plan_graph(name: str, opened: Opened, options: ServingOptions, graph: Graph) -> PlannedModel:
    """The model that runs a graph of an artifact.

    Raises:
        UsageError: if the graph takes no batches.
    """
    manifest = opened.manifest
    for record in (*graph.inputs, *graph.outputs):
        if not record.shape or (isinstance(record.shape[0], int) and options.max_batch != record.shape[0]):
            raise UsageError(
                f"'{record.name}' has the fixed shape {record.shape}, and a server batches requests.",
                "Compile the model with a batch of any size.",
            )
    python = options.backend == "python"
    pads = python and graph.pads
    config = ModelConfig(
        name=name,
        backend="python" if python else "onnxruntime",
        inputs=[_tensor(record, ragged=pads, optional=pads) for record in graph.inputs],
        outputs=[_tensor(record) for record in graph.outputs],
        max_batch=options.max_batch,
        instances=options.instances,
        batch_delay_us=options.batch_delay_us if options.max_batch > 1 else None,
        response_cache=options.response_cache,
        warm_up=warm_ups(graph.inputs, manifest.source.max_length, everything=not pads),
        parameters={} if python or options.threads is None else {"intra_op_thread_count": str(options.threads)},
    )
    files = dict(graph.files)
    if not python:
        return PlannedModel(config, files)
    library = native.library_path()
    if library is not None:
        files[LIBRARY_NAME] = library
    settings = ForwardSettings(
        file=MODEL_NAME,
        library=LIBRARY_NAME if library is not None else None,
        inputs=tuple(TensorSpec.of_record(record) for record in graph.inputs),
        outputs=tuple(TensorSpec.of_record(record) for record in graph.outputs),
        max_length=manifest.source.max_length,
        max_batch=options.max_batch,
        padding={"input_ids": opened.padding},
        pads=graph.pads,
    )
    files |= python_files("forward", forward=settings.to_json(), threads=options.threads)
    return PlannedModel(config, files)


def python_files(kind: str, **settings: Any) -> dict[str, File]:
    """The sources and settings of a model that the python backend runs."""
    text = json.dumps(settings, indent=1, default=list) + "\n"
    return {**backend_files.model_files(kind), SETTINGS_NAME: text.encode()}


def _tensor(record: TensorRecord, *, ragged: bool = False, optional: bool = False) -> Tensor:
    dims = tuple(size if isinstance(size, int) else -1 for size in record.shape[1:])
    varies = -1 in dims
    # What prepare_inputs fills in where a client leaves it out.
    may_miss = optional and record.name in ("attention_mask", "token_type_ids", "position_ids", "pixel_mask")
    return Tensor(record.name, record.dtype, dims, optional=may_miss, ragged=ragged and varies)


def warm_ups(inputs: Sequence[TensorRecord], longest: int | None, *, everything: bool) -> list[WarmUp]:
    """Requests of zeros; masks are left out where they may be, because one of zeros hides all.

    Args:
        longest: tokens that are taken; None if nothing bounds them.
        everything: all inputs have to be sent.
    """
    limit = longest or max(_WARM_UP_LENGTHS)
    lengths = sorted({min(length, limit) for length in _WARM_UP_LENGTHS})
    if not any(isinstance(size, str) for record in inputs for size in record.shape[1:]):
        lengths = lengths[:1]
    return [
        WarmUp(
            f"{length} tokens",
            {
                record.name: (
                    record.dtype,
                    tuple(size if isinstance(size, int) else length for size in record.shape[1:]),
                )
                for record in inputs
                if everything or not _tensor(record, optional=True).optional
            },
        )
        for length in lengths
    ]


def require_tokenizer(opened: Opened) -> Path:
    """The tokenizer's file.

    Raises:
        OutputError: if the artifact has none.
    """
    if opened.tokenizer is None:
        raise OutputError(
            f"'{opened.path}' has no tokenizer.json, which a server needs to take text.",
            "Compile a checkpoint that has a fast tokenizer.",
        )
    return opened.tokenizer
