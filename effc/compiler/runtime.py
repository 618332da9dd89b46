"""Load a compiled artifact to run it.

Needs ONNX Runtime, numpy and pydantic; neither torch nor transformers is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import onnxruntime

from effc.compiler.artifact_files import check_files, model_files, read_manifest
from effc.compiler.compiled_model import CompiledModel
from effc.compiler.engine_choice import what_is_missing
from effc.compiler.engine_runtime import EngineModel
from effc.compiler.machine import usable_cores
from effc.compiler.manifest import Manifest
from effc.compiler.native_choice import library_for
from effc.compiler.session import CPU_ONLY
from effc.compiler.session import session_options as default_options
from effc.errors import UsageError
from effc.suggest import did_you_mean


@overload
def load(
    path: str | Path,
    *,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    native: bool = True,
    session_options: onnxruntime.SessionOptions | None = None,
    verify_files: bool = True,
    engine: Literal[False],
) -> CompiledModel: ...


@overload
def load(
    path: str | Path,
    *,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    native: bool = True,
    session_options: onnxruntime.SessionOptions | None = None,
    verify_files: bool = True,
    engine: bool | None = None,
) -> CompiledModel | EngineModel: ...


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    native: bool = True,
    session_options: onnxruntime.SessionOptions | None = None,
    verify_files: bool = True,
    engine: bool | None = None,
) -> CompiledModel | EngineModel:
    """Load an artifact directory.

    Args:
        path: the directory that ``effc compile -o`` wrote.
        threads: computing threads; as many as physical cores this process may use when None.
        providers: ONNX Runtime execution providers in order of preference; the CPU when None.
        native: use effc's native kernels where this installation has them. The model runs without them too.
        session_options: ONNX Runtime options to use in place of effc's; effc's kernels are registered on them.
        verify_files: compare the SHA-256 of the graph and its weights with ``effc.json``, about a second per GiB.
            Sizes are compared in any case.
        engine: run the artifact's TensorRT engines; None for where they can run, with a warning that says what is
            missing where they cannot. The graph that they were built from runs on the CPU then.

    Raises:
        MissingDependencyError: if ``engine`` is True and the engines cannot run here; says what is missing.
        OutputError: if this is no artifact, a file is missing or changed, or a newer effc wrote it.
        UsageError: if a parameter is out of range.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    check_files(directory, manifest, names=model_files(manifest), hashes=verify_files)
    if engine or (engine is None and manifest.engines is not None):
        loaded = _load_engines(directory, manifest, bool(engine))
        if loaded is not None:
            return loaded
    providers = _known_providers(providers)
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}.", "Leave it out to use every core.")
    library = library_for(providers) if native else None
    if session_options is None:
        options = default_options(threads or usable_cores())
    else:
        options = session_options
        if threads is not None:
            options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return CompiledModel(directory, manifest, options, providers, library)


def _load_engines(directory: Path, manifest: Manifest, wanted: bool) -> EngineModel | None:
    if manifest.engines is None:
        raise UsageError("This artifact has no engines.", "Compile with --target=tensorrt_rtx, or leave engine out.")
    missing = what_is_missing(manifest.engines)
    if missing is None or wanted:
        check_files(directory, manifest, [file for file in manifest.files if file.startswith("engines/")])
        return EngineModel(directory, manifest)
    warnings.warn(f"{missing} The graph runs on the CPU instead.", RuntimeWarning, stacklevel=3)
    return None


def _known_providers(providers: Sequence[Any] | None) -> tuple[Any, ...]:
    available = onnxruntime.get_available_providers()
    for provider in providers or ():
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise UsageError(
                f"This onnxruntime has no execution provider '{name}'.",
                f"{did_you_mean(name, available)} GPU providers come with: pip install 'effc[gpu]'.",
            )
    return tuple(providers) if providers else CPU_ONLY
