"""Model repositories for TensorRT engines: one engine per compute capability, plugins, profiles, CUDA graphs.

An engine file does not say what Triton has to know of it: the caller does, or effc.json (:func:`engine_set`). The
configuration is checked by Triton's schema and the files by their hashes; whether an engine runs shows on the GPU that
it was built for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effc.compiler.manifest import TensorRecord
from effc.compiler.runtime import check_files, read_manifest
from effc.errors import UsageError
from effc.exporters.triton_config import Instances, ModelConfig, Tensor
from effc.serving.options import ServingOptions, check_name
from effc.serving.plan import Plan, PlannedModel
from effc.serving.repository import Deployed, write_plan

_CAPABILITY = re.compile(r"\d{1,2}\.\d")


@dataclass(frozen=True)
class Profile:
    """One optimization profile of an engine: largest shape of every input, the batch first."""

    largest: Mapping[str, Sequence[int]]


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
    """

    files: Mapping[str, Path]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    profiles: Sequence[Profile]
    tensorrt: str
    plugins: Sequence[Path] = ()
    cuda_graphs: Sequence[tuple[int, Mapping[str, Sequence[int]]]] = ()


def engine_set(artifact: str | Path, graph: str = "forward") -> EngineSet:
    """The engines of a compiled artifact, for :func:`write_engines`.

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
            "Triton's tensorrt backend runs engines of full TensorRT, and these are TensorRT-RTX's.",
            "Compile with --target=tensorrt on the GPU that will serve.",
        )
    check_files(path, manifest, [name for name in manifest.files if name.startswith("engines/")])
    first = engines[0]
    return EngineSet(
        files={f"{engine.arch[3:-1]}.{engine.arch[-1]}": path / engine.file for engine in engines},
        inputs=[_tensor(tensor) for tensor in first.inputs],
        outputs=[_tensor(tensor) for tensor in first.outputs],
        profiles=[Profile({name: most for name, (_, _, most) in profile.items()}) for profile in first.profiles],
        tensorrt=record.version,
        plugins=[path / record.plugin] if record.plugin else [],
    )


def _tensor(record: TensorRecord) -> Tensor:
    dims = tuple(dim if isinstance(dim, int) else -1 for dim in record.shape[1:])
    return Tensor(record.name, "float32" if record.dtype == "float" else record.dtype, dims)


def write_engines(
    engines: EngineSet,
    repository: str | Path,
    name: str,
    *,
    max_batch: int,
    server_tensorrt: str,
    gpus: tuple[int, ...] = (),
    batch_delay_us: int = 500,
) -> Deployed:
    """Add engines to a model repository as the next version of ``name``.

    Plugins are copied beside the engines, and the launch script names them: Triton loads them for the whole backend.

    Args:
        server_tensorrt: version of TensorRT in the server that is to run them; an engine runs in that version only.
        gpus: numbers of the GPUs; all of them if empty.

    Raises:
        UsageError: if versions, shapes or names do not fit each other.
        OutputError: see :func:`effc.write_repository`.
    """
    _check(engines, max_batch, server_tensorrt)
    options = ServingOptions(name=check_name(name), max_batch=max_batch, batch_delay_us=batch_delay_us)
    files = {f"sm{capability.replace('.', '')}.plan": path for capability, path in engines.files.items()}
    config = ModelConfig(
        name=name,
        backend="tensorrt",
        inputs=engines.inputs,
        outputs=engines.outputs,
        max_batch=max_batch,
        instances=Instances("gpu", 1, gpus),
        batch_delay_us=batch_delay_us if max_batch > 1 else None,
        profiles=range(len(engines.profiles)),
        engines={capability: f"sm{capability.replace('.', '')}.plan" for capability in engines.files},
        cuda_graphs=engines.cuda_graphs,
    )
    libraries = {path.name: path for path in engines.plugins}
    plan = Plan(name, "tensorrt", (PlannedModel(config, {**files, **libraries}),))
    return write_plan(plan, repository, options, tuple(libraries))


def _check(engines: EngineSet, max_batch: int, server_tensorrt: str) -> None:
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
    if engines.tensorrt != server_tensorrt:
        raise UsageError(
            f"The engines were built with TensorRT {engines.tensorrt}, and the server has {server_tensorrt}.",
            "Build them with the server's version.",
        )
    names = {tensor.name: len(tensor.dims) + 1 for tensor in engines.inputs}
    for number, profile in enumerate(engines.profiles):
        if {name: len(shape) for name, shape in profile.largest.items()} != names:
            raise UsageError(f"Profile {number} does not describe the inputs {', '.join(names)}.", "Name each.")
        batch = min(shape[0] for shape in profile.largest.values())
        if batch < max_batch:
            raise UsageError(
                f"Profile {number} takes {batch} rows, and the server would hand over {max_batch}.",
                f"Give max_batch={batch}, or build the engine for more.",
            )
    for batch, shapes in engines.cuda_graphs:
        fits = any(
            batch <= profile.largest[name][0]
            and len(shape) == len(profile.largest[name]) - 1
            and all(size <= most for size, most in zip(shape, profile.largest[name][1:], strict=True))
            for profile in engines.profiles
            for name, shape in shapes.items()
            if name in names
        )
        if not fits or not set(shapes) <= set(names):
            raise UsageError(f"The CUDA graph of batch {batch} and {dict(shapes)} fits no profile.", "Correct it.")
