"""Run an artifact's engines on the GPU that they were built for.

No machine of the project has a GPU. What decides (which engine, which profile, whose memory, which stream, how text is
written) lies in modules that are tested without one; :mod:`effc.compiler.engine_device`, which talks to torch and
TensorRT, was run with stand-ins for both only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.engine_choice import engines_here, what_is_missing
from effc.compiler.engine_device import Device, TorchDevice
from effc.compiler.engine_runner import EngineRunner
from effc.compiler.engine_text import write_on
from effc.compiler.feeds import TensorSpec, prepare_inputs
from effc.compiler.generation import align_left_padded, split_options
from effc.compiler.manifest import Manifest
from effc.errors import MissingDependencyError, UsageError


class EngineModel:
    """The engines of an artifact. Call it with what a tokenizer gives.

    Attributes:
        path: the artifact directory.
        manifest: what ``effc.json`` holds.
    """

    def __init__(self, path: Path, manifest: Manifest, device: Device | None = None):
        assert manifest.engines is not None
        if device is None and (missing := what_is_missing(manifest.engines)) is not None:
            raise MissingDependencyError(missing, "effc.load(..., engine=False) runs the graph on the CPU.")
        self.path, self.manifest, self._record = path, manifest, manifest.engines
        used = TorchDevice(path, manifest.engines) if device is None else device
        self._runner = EngineRunner(used, path, engines_here(manifest.engines))
        self._specs = [TensorSpec.of_record(record) for record in manifest.inputs]

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Run the forward pass.

        Args:
            **inputs: by name, as numpy arrays, torch tensors or nested lists, as for :class:`CompiledModel`. Where all
                inputs of the engine are tensors on the GPU, they are used where they lie.

        Returns:
            torch tensors on the GPU, by name; ready for what is queued behind on torch's current stream.

        Raises:
            UsageError: if an input is missing, unknown or too large, or there is no engine of the forward pass.
        """
        if "forward" not in self._runner.graphs:
            raise UsageError(
                "These engines write text: prefill and decode.", "Call generate(), or compile with --no-generation."
            )
        given = {name: value for name, value in inputs.items() if value is not None}
        wanted = {tensor.name for tensor in self._runner.inputs("forward")}
        if set(given) == wanted and all(self._runner.is_here(value) for value in given.values()):
            return self._runner.run("forward", given)
        arrays = {name: _array(value) for name, value in given.items()}
        return self._runner.run("forward", prepare_inputs(arrays, self._specs, self.manifest.source.max_length))

    def capture(self, **shapes: tuple[int, ...]) -> None:
        """Record the forward pass for inputs of exactly these shapes as a CUDA graph, which calls then replay.

        Raises:
            UsageError: if an input is left out, is too large, or there is no engine of the forward pass.
        """
        if "forward" not in self._runner.graphs:
            raise UsageError("These engines write text, and their inputs grow from token to token.", "Leave it out.")
        self._runner.capture("forward", shapes)

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


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
