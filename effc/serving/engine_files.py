"""Engines of one model for several GPUs: what an artifact holds, what fits together, and the model that runs them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effc.compiler.artifact_files import check_files, read_manifest
from effc.compiler.engine_choice import runs_in
from effc.compiler.manifest import TensorRecord
from effc.errors import UsageError
from effc.exporters.triton_config import ModelConfig, Tensor, WarmUp
from effc.passes.engine_settings import parse_shape
from effc.serving.engine_shares import shares
from effc.serving.options import ServingOptions
from effc.serving.plan import PlannedModel

_CAPABILITY = re.compile(r"\d{1,2}\.\d")

Graphs = Sequence[tuple[int, Mapping[str, Sequence[int]]]]
"""CUDA graphs: ``(batch, {input: shape without the batch})``."""


@dataclass(frozen=True)
class Profile:
    """One optimization profile of an engine: largest shape of every input, the batch first."""

    largest: Mapping[str, Sequence[int]]

    @property
    def batch(self) -> int:
        """Rows that it takes."""
        return min(shape[0] for shape in self.largest.values())

    def takes(self, batch: int, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether inputs of these shapes fit, given without the batch."""
        return all(
            name in self.largest
            and len(shape) == len(self.largest[name]) - 1
            and batch <= self.largest[name][0]
            and all(size <= most for size, most in zip(shape, self.largest[name][1:], strict=True))
            for name, shape in shapes.items()
        )


@dataclass(frozen=True)
class EngineSet:
    """Engines of one model, built alike for several GPUs.

    Attributes:
        files: engine by compute capability, ``{"8.9": path}``.
        inputs, outputs: without the batch dimension.
        profiles: in the order of the engines; Triton loads all of them.
        tensorrt: version that the engines were built with, ``10.9.0``.
        plugins: shared libraries that the engines need.
        cuda_graphs: ``(batch, {input: shape without the batch})`` to capture CUDA graphs for.
        newer: newer releases of the same major version run them too.
        host_code: see :func:`effc.serving.launch.tensorrt_flags`.
        ranks: engines of GPUs that compute together, in their order; ``files`` holds the first.
    """

    files: Mapping[str, Path]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    profiles: Sequence[Profile]
    tensorrt: str
    plugins: Sequence[Path] = ()
    cuda_graphs: Graphs = ()
    newer: bool = False
    host_code: bool = False
    ranks: Sequence[Path] = ()

    @property
    def widest(self) -> Profile:
        """Of the profiles that take the longest inputs, the one that takes most rows: what every request fits.

        Raises:
            UsageError: if no profile takes all that some of them take.
        """
        shapes = {
            name: [max(sizes) for sizes in zip(*(profile.largest[name][1:] for profile in self.profiles), strict=True)]
            for name in self.profiles[0].largest
        }
        fitting = [profile for profile in self.profiles if profile.takes(1, shapes)]
        if not fitting:
            raise UsageError("No profile takes the longest inputs of all the others.", "Build one that does.")
        return max(fitting, key=lambda profile: profile.batch)


def engine_set(artifact: str | Path, graph: str = "forward") -> EngineSet:
    """The engines of a compiled artifact.

    Raises:
        OutputError: if the artifact is damaged.
        UsageError: if it has no such engines, or they are TensorRT-RTX's, which Triton does not run.
    """
    path = Path(artifact)
    manifest = read_manifest(path)
    record = manifest.engines
    engines = [] if record is None else [engine for engine in record.engines if engine.graph == graph]
    if record is None or not engines:
        raise UsageError(f"'{path}' has no engine of its {graph} graph.", "Compile with --target=tensorrt.")
    if record.flavour != "tensorrt":
        raise UsageError(
            f"The engines of '{path}' are TensorRT-RTX's, and Triton's tensorrt backend runs those of full TensorRT.",
            "Compile with --target=tensorrt on the GPU that will serve; --backend python serves the ONNX graph.",
        )
    check_files(path, manifest, [name for name in manifest.files if name.startswith("engines/")])
    first = engines[0]
    ranks = [engine for engine in engines if engine.rank is not None]
    if len({engine.arch for engine in ranks}) > 1:
        raise UsageError(f"'{path}' holds the shares of more than one kind of GPU.", "Compile with one --arch.")
    portable = bool(manifest.recipe.get("engine", {}).get("version_compatible", False))
    return EngineSet(
        files={f"{engine.arch[3:-1]}.{engine.arch[-1]}": path / engine.file for engine in engines if not engine.rank},
        inputs=[_tensor(tensor) for tensor in first.inputs],
        outputs=[_tensor(tensor) for tensor in first.outputs],
        profiles=[Profile({name: most for name, (_, _, most) in profile.items()}) for profile in first.profiles],
        tensorrt=record.version,
        plugins=[path / record.plugin] if record.plugin else [],
        newer=portable,
        host_code=portable or record.plugin_embedded,
        ranks=[path / engine.file for engine in ranks],
    )


def graphs_of(texts: Sequence[str], engines: EngineSet) -> list[tuple[int, Mapping[str, Sequence[int]]]]:
    """The CUDA graphs of shapes as a user writes them, ``8x128``.

    Raises:
        UsageError: if one is none, or lacks the length that the engines need.
    """
    found: list[tuple[int, Mapping[str, Sequence[int]]]] = []
    for text in texts:
        try:
            batch, length = parse_shape(text)
        except ValueError as error:
            raise UsageError(f"{error}.", "Correct --cuda-graphs.") from None
        if length is None and any(-1 in tensor.dims for tensor in engines.inputs):
            raise UsageError(f"The CUDA graph '{text}' says no length.", f"Write, for example, {batch}x128.")
        shapes = {
            tensor.name: [length or 1 if size == -1 else size for size in tensor.dims] for tensor in engines.inputs
        }
        found.append((batch, shapes))
    return found


def engine_model(
    name: str,
    engines: EngineSet,
    options: ServingOptions,
    warm_up: Sequence[WarmUp] = (),
) -> PlannedModel:
    """The model that Triton's tensorrt backend runs.

    Raises:
        UsageError: if versions, shapes or names do not fit each other.
    """
    _check(engines, options)
    named = {capability: f"sm{capability.replace('.', '')}.plan" for capability in engines.files}
    files = {named[capability]: path for capability, path in engines.files.items()}
    instances, parameters = options.instances, dict[str, str]()
    if engines.ranks:
        together = shares(engines.ranks, instances)
        named, files, instances, parameters = {}, together.files, together.instances, together.parameters
    config = ModelConfig(
        name=name,
        backend="tensorrt",
        inputs=engines.inputs,
        outputs=engines.outputs,
        max_batch=options.max_batch,
        instances=instances,
        batch_delay_us=options.batch_delay_us if options.max_batch > 1 else None,
        response_cache=options.response_cache,
        warm_up=warm_up,
        profiles=range(len(engines.profiles)),
        engines=named,
        cuda_graphs=engines.cuda_graphs,
        parameters=parameters,
    )
    return PlannedModel(config, {**files, **{path.name: path for path in engines.plugins}})


def _tensor(record: TensorRecord) -> Tensor:
    dims = tuple(dim if isinstance(dim, int) else -1 for dim in record.shape[1:])
    return Tensor(record.name, "float32" if record.dtype == "float" else record.dtype, dims)


def _check(engines: EngineSet, options: ServingOptions) -> None:
    if not engines.files or not engines.profiles:
        raise UsageError("There is no engine, or no profile.", "Give at least one of each.")
    for capability, path in engines.files.items():
        if not _CAPABILITY.fullmatch(capability):
            raise UsageError(f"'{capability}' is no compute capability.", "Write, for example, 8.9.")
        if not path.is_file():
            raise UsageError(f"There is no engine '{path}'.", "Build it first.")
    for path in engines.plugins:
        if not path.is_file() or not re.fullmatch(r"[\w.+-]+", path.name):
            raise UsageError(f"'{path}' is no plugin library that can be named to Triton.", "Correct the path.")
    if options.server_tensorrt is not None and not runs_in(engines.tensorrt, options.server_tensorrt, engines.newer):
        newer = " or a newer one of that major version" if engines.newer else ""
        raise UsageError(
            f"The engines were built with TensorRT {engines.tensorrt}, and the server has {options.server_tensorrt}.",
            f"Build them with the server's version, or take a server with theirs{newer}.",
        )
    names = {tensor.name: len(tensor.dims) + 1 for tensor in engines.inputs}
    for number, profile in enumerate(engines.profiles):
        if {name: len(shape) for name, shape in profile.largest.items()} != names:
            raise UsageError(f"Profile {number} does not describe the inputs {', '.join(names)}.", "Name each.")
    batch = engines.widest.batch
    if batch < options.max_batch:
        raise UsageError(
            f"The engines take {batch} rows of the longest inputs, and the server would hand over {options.max_batch}.",
            f"Give max_batch={batch}, or build the engine for more.",
        )
    if engines.ranks and engines.cuda_graphs:
        raise UsageError("Triton captures no CUDA graphs of GPUs that compute together.", "Leave --cuda-graphs out.")
    for rows, shapes in engines.cuda_graphs:
        fits = any(profile.takes(rows, shapes) for profile in engines.profiles)
        if not fits or not set(shapes) <= set(names):
            raise UsageError(f"The CUDA graph of batch {rows} and {dict(shapes)} fits no profile.", "Correct it.")
        if rows > options.max_batch:
            raise UsageError(
                f"A CUDA graph of {rows} rows is never used where {options.max_batch} are handed over at most.",
                "Correct --cuda-graphs or --max-batch.",
            )
