"""Run an artifact's engines on the GPU that they were built for.

Thin, because it could only be written and not be run: no machine of the project has a GPU. What it decides (which
engine, which profile, how text is written) lies in modules that are tested without one.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.engine_choice import choose_profile, engines_here, what_is_missing
from effc.compiler.engine_text import write_on
from effc.compiler.feeds import TensorSpec, prepare_inputs
from effc.compiler.generation import align_left_padded, split_options
from effc.compiler.manifest import EngineRecord, EnginesRecord, Manifest
from effc.errors import EffcError, MissingDependencyError, OutputError, UsageError


class EngineModel:
    """The engines of an artifact. Call it with what a tokenizer gives.

    Attributes:
        path: the artifact directory.
        manifest: what ``effc.json`` holds.
    """

    def __init__(self, path: Path, manifest: Manifest):
        assert manifest.engines is not None
        if (missing := what_is_missing(manifest.engines)) is not None:
            raise MissingDependencyError(missing, "effc.load(..., engine=False) runs the graph on the CPU.")
        self.path, self.manifest, self._record = path, manifest, manifest.engines
        self._runner = EngineRunner(path, manifest.engines)
        self._specs = [TensorSpec.of_record(record) for record in manifest.inputs]

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Run the forward pass.

        Args:
            **inputs: by name, as numpy arrays, torch tensors or nested lists, as for :class:`CompiledModel`.

        Returns:
            torch tensors on the GPU, by name.

        Raises:
            UsageError: if an input is missing, unknown or too large, or there is no engine of the forward pass.
        """
        if "forward" not in self._runner.graphs:
            raise UsageError(
                "These engines write text: prefill and decode.", "Call generate(), or compile with --no-generation."
            )
        arrays = {name: _array(value) for name, value in inputs.items() if value is not None}
        return self._runner.run("forward", prepare_inputs(arrays, self._specs, self.manifest.source.max_length))

    def stream(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[NDArray[np.int64]]:
        """Write on from a batch of prompts, each step's tokens ``[batch]`` as soon as they are there.

        Args:
            **options: as for :meth:`CompiledModel.stream`.

        Raises:
            UsageError: if an option is unknown, the text gets too long, or these engines write no text.
        """
        if "decode" not in self._runner.graphs:
            raise UsageError("This artifact has no engines that write text.", "Compile a causal language model.")
        own, sampling = split_options(options)
        ends = own.pop("eos_token_id", None)
        padding = own.pop("pad_token_id", None)
        ids = np.asarray(_array(input_ids), dtype=np.int64)
        mask = None if attention_mask is None else np.asarray(_array(attention_mask)).astype(bool)
        return write_on(
            self._runner,
            align_left_padded(ids, mask),
            max_length=self._longest(),
            ends=self._record.eos_token_ids if ends is None else np.atleast_1d(ends).tolist(),
            padding=self._record.pad_token_id if padding is None else padding,
            sampling=sampling,
            **own,
        )

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> NDArray[np.int64]:
        """The prompts and what was written, ``[batch, length + new]``; see :meth:`stream`."""
        ids = np.asarray(_array(input_ids), dtype=np.int64)
        new = list(self.stream(ids, attention_mask, **options))
        return np.concatenate([ids, *(tokens[:, None] for tokens in new)], axis=1)

    def _longest(self) -> int:
        profiles = self._runner.graphs["decode"].profiles
        return max(profile["attention_mask"][2][1] for profile in profiles)


class EngineRunner:
    """TensorRT's runtime with torch's tensors, on torch's current stream."""

    def __init__(self, path: Path, record: EnginesRecord):
        import torch

        if not torch.cuda.is_available():
            raise MissingDependencyError(
                "This build of torch sees no GPU, and the engines' tensors are torch's.",
                "Install torch with CUDA: https://pytorch.org/get-started.",
            )
        self._torch = torch
        self._trt = trt = importlib.import_module(record.flavour)
        self._logger = trt.Logger(trt.Logger.WARNING)
        if record.plugin is not None:
            trt.get_plugin_registry().load_library(str(path / record.plugin))
        self._runtime = trt.Runtime(self._logger)
        if record.plugin_embedded and hasattr(self._runtime, "engine_host_code_allowed"):
            # The library inside the plan is code; the artifact's hashes have been checked.
            self._runtime.engine_host_code_allowed = True
        self.graphs: dict[str, EngineRecord] = engines_here(record)
        self._engines = {name: self._load(path / engine.file) for name, engine in self.graphs.items()}
        self._contexts = {
            (name, number): engine.create_execution_context()
            for name, engine in self._engines.items()
            for number in range(engine.num_optimization_profiles)
        }
        self._lock = threading.Lock()

    def run(self, graph: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, on the GPU; see :class:`effc.compiler.engine_text.Runner`."""
        torch, trt, engine = self._torch, self._trt, self._engines[graph]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        given = {name: self._tensor(engine, name, feeds[name]) for name in inputs}
        number = choose_profile(self.graphs[graph], {name: tuple(value.shape) for name, value in given.items()})
        context, stream = self._contexts[graph, number], torch.cuda.current_stream()
        with self._lock:
            if context.active_optimization_profile != number:
                context.set_optimization_profile_async(number, stream.cuda_stream)
            for name, value in given.items():
                context.set_input_shape(name, tuple(value.shape))
                context.set_tensor_address(name, value.data_ptr())
            results = {}
            for name in names:
                if name not in given:
                    shape, dtype = tuple(context.get_tensor_shape(name)), self._dtype(engine, name)
                    results[name] = torch.empty(shape, dtype=dtype, device="cuda")
                    context.set_tensor_address(name, results[name].data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise EffcError(f"TensorRT failed on the engine '{graph}'.", "Its messages are on stderr.")
            # The inputs' memory may be used again once this returns.
            stream.synchronize()
        return results

    def numpy(self, value: Any) -> NDArray[Any]:
        """A tensor as a numpy array."""
        array: NDArray[Any] = value.float().cpu().numpy()
        return array

    def _load(self, file: Path) -> Any:
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise OutputError(
                f"TensorRT {self._trt.__version__} cannot load '{file}'; its messages are on stderr.",
                "Compile the model again with this version and for this GPU.",
            )
        return engine

    def _tensor(self, engine: Any, name: str, value: Any) -> Any:
        torch = self._torch
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        return tensor.to("cuda", self._dtype(engine, name)).contiguous()

    def _dtype(self, engine: Any, name: str) -> Any:
        torch, trt = self._torch, self._trt
        kinds = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
            trt.DataType.INT32: torch.int32,
            trt.DataType.BOOL: torch.bool,
        }
        return kinds[engine.get_tensor_dtype(name)]


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
