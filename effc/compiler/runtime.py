"""Run a compiled artifact: :func:`load` and the callable it returns.

Needs ONNX Runtime, numpy and pydantic; neither torch nor transformers is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import ValidationError

from effc.compiler.engine_choice import what_is_missing
from effc.compiler.engine_runtime import EngineModel
from effc.compiler.feeds import TensorSpec, prepare_inputs, random_inputs
from effc.compiler.generation import (
    Generator,
    Prompt,
    Streamer,
    align_left_padded,
    example_step,
    generation_record,
    split_options,
    tell,
)
from effc.compiler.kernels import attention_kernels, linear_kernels, step_kernels
from effc.compiler.machine import usable_cores
from effc.compiler.manifest import Manifest
from effc.compiler.session import CPU_ONLY, profile_kernels
from effc.compiler.session import session_options as default_options
from effc.errors import EffcError, MissingDependencyError, OutputError, UsageError
from effc.plugins import native as native_kernels
from effc.suggest import did_you_mean

MANIFEST_NAME = "effc.json"
MODEL_NAME = "model.onnx"
GENERATION_NAME = "generation.onnx"
SCHEMA_VERSION = 1

_COMPILE_AGAIN = "Compile the model again, or copy the whole artifact directory again."


class Outputs(Mapping[str, Any]):
    """A model's outputs by name, attribute or position: ``out["logits"]``, ``out.logits``, ``out[0]``.

    Iterates over names, as the output classes of transformers do; :meth:`to_tuple` gives the values.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._values[key]
        return self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        # Looked up in __dict__: copying asks for attributes before __init__ has run.
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"There is no output '{name}'; there are: {', '.join(values)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={type(value).__name__}{list(value.shape)}" for name, value in self._values.items())
        return f"Outputs({shapes})"

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in the order of the model's outputs."""
        return tuple(self._values.values())


class CompiledModel:
    """A loaded artifact. Call it with what a tokenizer gives; may be called from several threads at once.

    Attributes:
        path: the artifact directory.
        manifest: what ``effc.json`` holds.
        session: the ONNX Runtime session.
        native_library: effc's native kernels, or None where the standard-op bodies run.
        input_names, output_names: in the order of the graph.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        options: onnxruntime.SessionOptions,
        providers: Sequence[Any],
        native_library: Path | None,
    ):
        self.path = path
        self.manifest = manifest
        self.native_library = native_library
        self._options = options
        self._providers = tuple(providers)
        self._kernels: dict[str, str] | None = None
        self._kernels_lock = threading.Lock()
        self._generator: Generator | None = None
        self._generator_lock = threading.Lock()
        try:
            self.session = onnxruntime.InferenceSession(str(path / MODEL_NAME), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own.
            raise OutputError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load '{path / MODEL_NAME}': {_first_line(error)}.",
                f"The artifact was made with onnxruntime {manifest.toolchain.get('onnxruntime', '(unknown)')}; "
                "install that version, or compile the model again.",
            ) from error
        self.input_names = [argument.name for argument in self.session.get_inputs()]
        records = {record.name: record for record in manifest.inputs}
        if set(records) != set(self.input_names):
            raise OutputError(
                f"The graph takes {', '.join(self.input_names)}, but {MANIFEST_NAME} says {', '.join(records)}.",
                _COMPILE_AGAIN,
            )
        self._specs = [TensorSpec.of_record(records[name]) for name in self.input_names]
        self.output_names = [argument.name for argument in self.session.get_outputs()]

    def __call__(self, **inputs: Any) -> Outputs:
        """Run the model.

        Args:
            **inputs: by name, as numpy arrays, torch tensors or nested lists: ``input_ids`` int ``[batch, length]``
                and so on. A missing ``attention_mask`` is all ones, missing ``token_type_ids`` are zeros, and what a
                tokenizer gives beyond the graph's inputs is dropped.

        Returns:
            Torch tensors if any input was one, numpy arrays otherwise.

        Raises:
            UsageError: if an input is missing, unknown, or of a shape, type or value the model does not take.
            EffcError: if ONNX Runtime fails, for example for lack of memory.
        """
        arrays = {name: _to_numpy(value) for name, value in inputs.items() if value is not None}
        feeds = prepare_inputs(arrays, self._specs, self.manifest.source.max_length)
        try:
            values = self.session.run(None, feeds)
        except Exception as error:  # see __init__
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise EffcError(
                f"ONNX Runtime failed on inputs of shape {shapes}: {_first_line(error)}.",
                "If memory ran out, give a smaller batch or shorter sequences.",
            ) from error
        device = next((value.device for value in inputs.values() if _is_torch(value)), None)
        if device is not None:
            torch = sys.modules["torch"]
            values = [torch.from_numpy(value).to(device) for value in values]
        return Outputs(dict(zip(self.output_names, values, strict=True)))

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        streamer: Streamer | Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> Any:
        """Write on from a batch of prompts.

        Args:
            input_ids: int ``[batch, length]``.
            attention_mask: ``[batch, length]``, 0 for padding. Padding that is not in front of its prompt is moved
                there.
            streamer: a streamer of transformers, which is told the prompts too, or a function of each step's tokens
                ``[batch]``.
            **options: as for :meth:`stream`.

        Returns:
            The prompts and what was written, ``[batch, length + new]``; a torch tensor if ``input_ids`` was one.

        Raises:
            UsageError, OutputError: see :meth:`stream`.
        """
        prompt = self._prompt(input_ids, attention_mask)
        new = self._stream(prompt, options)
        if streamer is not None and hasattr(streamer, "put"):
            streamer.put(prompt.tokens)
        steps = [prompt.tokens]
        for tokens in new:
            tell(streamer, tokens)
            steps.append(tokens[:, None])
        if streamer is not None and hasattr(streamer, "end"):
            streamer.end()
        return _like_input(np.concatenate(steps, axis=1), input_ids)

    def stream(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[Any]:
        """Write on from a batch of prompts, and hand out each step's tokens ``[batch]`` as soon as they are there.

        Args:
            input_ids, attention_mask: as for :meth:`generate`.
            **options: ``max_new_tokens``, ``eos_token_id``, ``pad_token_id`` (see :meth:`Generator.stream`) and
                ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``, ``seed`` (see
                :class:`SamplingSettings`). Without any of the latter each token is the most likely one.

        Raises:
            UsageError: if this is no artifact that generates, an option is unknown or out of range, or the text would
                be longer than the model's positions.
            OutputError: if the generating graph is missing or damaged.
        """
        new = self._stream(self._prompt(input_ids, attention_mask), options)
        return (_like_input(tokens, input_ids) for tokens in new)

    def generator(self) -> Generator:
        """The generating graph, loaded on first use.

        Raises:
            UsageError: if the artifact has none.
            OutputError: if its files are missing or damaged.
        """
        with self._generator_lock:
            if self._generator is None:
                record = generation_record(self.manifest)
                names = [name for name in self.manifest.files if name.startswith(record.file)]
                check_files(self.path, self.manifest, names)
                session = onnxruntime.InferenceSession(
                    str(self.path / record.file), self._options, providers=list(self._providers)
                )
                self._generator = Generator(session, record, self.manifest.source.max_length)
            return self._generator

    def _prompt(self, input_ids: Any, attention_mask: Any) -> Prompt:
        generation_record(self.manifest)
        given = {"input_ids": _to_numpy(input_ids), "attention_mask": _to_numpy(attention_mask)}
        known = {name: value for name, value in given.items() if value is not None}
        feeds = prepare_inputs(known, self._specs, self.manifest.source.max_length)
        mask = feeds.get("attention_mask")
        return align_left_padded(feeds["input_ids"], None if mask is None else mask.astype(bool))

    def _stream(self, prompt: Prompt, options: Mapping[str, Any]) -> Iterator[Any]:
        own, sampling = split_options(options)
        return self.generator().stream(prompt, sampling=sampling, **own)

    def kernels(self) -> dict[str, str]:
        """What really runs, from a profile of one short run: attention layers first, then matrix products.

        Keyed by layer or node name; values such as ``"native effc::SparseAttention"``, ``"standard-op body"``,
        ``"onnxruntime MultiHeadAttention"``, ``"int8 DynamicQuantizeMatMul"`` and ``"float MatMul"``. Of a model that
        generates, ``"<layer>/step"`` is what serves the layer when a token is written. The first call opens second
        sessions for a moment.
        """
        with self._kernels_lock:
            if self._kernels is None:
                length = min(self.manifest.source.max_length or 32, 32)
                feeds = random_inputs(self._specs, batch=1, length=length, seed=0)
                events = profile_kernels(self.path / MODEL_NAME, self._options, feeds, self._providers).events
                self._kernels = attention_kernels(events, self.manifest.attention) | linear_kernels(events)
                if (generation := self.manifest.generation) is not None:
                    step = example_step(generation)
                    profile = profile_kernels(self.path / generation.file, self._options, step, self._providers)
                    self._kernels |= step_kernels(profile.events, generation.layers)
            return dict(self._kernels)

    def __repr__(self) -> str:
        source = self.manifest.source
        return f"CompiledModel('{self.path}', {source.architecture}, task={source.task})"


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
    library = _native_library(providers) if native else None
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


def _native_library(providers: Sequence[Any]) -> Path | None:
    """The kernels for a session with these providers: it takes those for the CPU or those for CUDA.

    With the CUDA provider and no kernels for it, attention runs there through its function bodies: kernels for the CPU
    would take it away from the GPU.
    """
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if native_kernels.CUDA_PROVIDER not in names:
        return loadable_native_library()
    library = native_kernels.library_path(native_kernels.CUDA_PROVIDER)
    if library is None and os.environ.get("EFFC_NATIVE") != "0":
        try:
            native_kernels.native_library(native_kernels.CUDA_PROVIDER)
        except MissingDependencyError as missing:
            warnings.warn(f"{missing} Standard operators run instead.", RuntimeWarning, stacklevel=3)
    return None if library is None else _loadable(library)


def loadable_native_library() -> Path | None:
    """effc's native kernels, or None, with a warning where they are there but cannot be loaded.

    Raises:
        MissingDependencyError: if ``EFFC_NATIVE_LIBRARY`` names no file.
    """
    library = native_kernels.library_path()
    if library is None:
        if os.environ.get("EFFC_NATIVE") != "0" and os.environ.get("EFFC_NATIVE_LIBRARY"):
            native_kernels.native_library()  # says what is wrong with that variable
        return None
    return _loadable(library)


def _loadable(library: Path) -> Path | None:
    try:
        # Tried on options of its own, because a failure would leave the caller's half registered.
        onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:
        warnings.warn(
            f"effc's native kernels ({library}) cannot be loaded: {_first_line(error)}. Slower standard operators run "
            "instead; `effc doctor` says more.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return library


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check the ``effc.json`` of an artifact directory.

    Raises:
        OutputError: if there is none, it is damaged, or a newer effc wrote it.
    """
    directory = Path(directory)
    file = directory / MANIFEST_NAME
    if not directory.exists():
        raise OutputError(f"There is no artifact at '{directory}'.", "Check the path, or make one: effc compile MODEL.")
    if not directory.is_dir():
        raise OutputError(f"'{directory}' is a file, not an artifact.", "Give the directory that holds effc.json.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(
            f"'{directory}' is not an effc artifact: it has no {MANIFEST_NAME}.",
            f"Give the directory that `effc compile MODEL -o DIRECTORY` wrote, or run: effc compile {directory}.",
        ) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"'{file}' cannot be read: {error}.", _COMPILE_AGAIN) from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise OutputError(
            f"'{file}' was written by effc {values.get('effc_version', '(unknown)')} in format {version}; this effc "
            f"reads format {SCHEMA_VERSION}.",
            "Upgrade: pip install --upgrade effc.",
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"]) or "the file"
        raise OutputError(
            f"'{file}' is not what effc writes: {where}: {detail['msg']}.",
            f"{_COMPILE_AGAIN} If a newer effc wrote it, upgrade: pip install --upgrade effc.",
        ) from None


def check_files(
    directory: Path, manifest: Manifest, names: Sequence[str] | None = None, *, hashes: bool = True
) -> None:
    """Compare files of an artifact with ``effc.json``: presence and size, and the SHA-256 where ``hashes`` is set.

    Args:
        names: which files; all of them when None.

    Raises:
        OutputError: naming the first file that is missing, truncated or changed.
    """
    for name in manifest.files if names is None else names:
        record, file = manifest.files[name], directory / name
        try:
            size = file.stat().st_size
        except OSError:
            raise OutputError(f"The artifact '{directory}' lacks its file '{name}'.", _COMPILE_AGAIN) from None
        if size != record.bytes:
            what = "truncated" if size < record.bytes else "changed"
            raise OutputError(
                f"'{file}' is {what}: it has {size:,} bytes, {MANIFEST_NAME} says {record.bytes:,}.", _COMPILE_AGAIN
            )
        if hashes:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != record.sha256:
                raise OutputError(
                    f"'{file}' is damaged or was changed: its SHA-256 is not the one in {MANIFEST_NAME}.",
                    _COMPILE_AGAIN,
                )


def model_files(manifest: Manifest) -> list[str]:
    """The graph and its external data: what a run depends on. A report, say, may be edited.

    Raises:
        OutputError: if the manifest lists no graph.
    """
    names = [name for name in manifest.files if name == MODEL_NAME or name.startswith(f"{MODEL_NAME}.")]
    if MODEL_NAME not in names:
        raise OutputError(f"{MANIFEST_NAME} lists no {MODEL_NAME}.", _COMPILE_AGAIN)
    return names


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


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _to_numpy(value: Any) -> NDArray[Any] | Any:
    if not _is_torch(value):
        return value
    value = value.detach().cpu()
    # numpy knows no bfloat16.
    return (value.float() if value.is_floating_point() else value).numpy()


def _like_input(tokens: NDArray[Any], given: Any) -> Any:
    return sys.modules["torch"].from_numpy(tokens).to(given.device) if _is_torch(given) else tokens


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", line)
