"""The callable that a loaded artifact is.

Needs ONNX Runtime, numpy and pydantic; neither torch nor transformers is imported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.artifact_files import COMPILE_AGAIN, MANIFEST_NAME, MODEL_NAME, check_files
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
from effc.compiler.manifest import Manifest
from effc.compiler.outputs import Outputs
from effc.compiler.session import first_line, profile_kernels
from effc.errors import EffcError, OutputError


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
                f"ONNX Runtime {onnxruntime.__version__} cannot load '{path / MODEL_NAME}': {first_line(error)}.",
                f"The artifact was made with onnxruntime {manifest.toolchain.get('onnxruntime', '(unknown)')}; "
                "install that version, or compile the model again.",
            ) from error
        self.input_names = [argument.name for argument in self.session.get_inputs()]
        records = {record.name: record for record in manifest.inputs}
        if set(records) != set(self.input_names):
            raise OutputError(
                f"The graph takes {', '.join(self.input_names)}, but {MANIFEST_NAME} says {', '.join(records)}.",
                COMPILE_AGAIN,
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
                f"ONNX Runtime failed on inputs of shape {shapes}: {first_line(error)}.",
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
