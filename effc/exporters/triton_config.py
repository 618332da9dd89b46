"""Triton model configurations, through Triton's own protobuf: fields that Triton does not know cannot be written.

Needs the package tritonclient (``effc[serve]``). Knows nothing of artifacts: :mod:`effc.serving` says what to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from effc.errors import EffcError, MissingDependencyError, UsageError

TEXT = "bytes"
"""The ``dtype`` of a :class:`Tensor` that holds text."""

Kind = Literal["auto", "cpu", "gpu", "model"]


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        dtype: numpy's name, or :data:`TEXT`.
        dims: without the batch where the model has one; -1 for what varies.
        ragged: requests of different shapes may be handed over together.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False


@dataclass(frozen=True)
class Instances:
    """How many copies of a model run, and where.

    Attributes:
        kind: ``auto`` leaves it to the model; no configuration says so. ``model``: the backend knows where.
        count: copies, on each GPU if ``kind`` is gpu.
        gpus: numbers of the GPUs; all of them if empty.
    """

    kind: Kind = "cpu"
    count: int = 1
    gpus: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Instances:
        """Read ``auto``, ``cpu``, ``cpu:2``, ``gpu`` or ``gpu:0,1``.

        Raises:
            UsageError: if it is none of these.
        """
        kind, _, rest = text.partition(":")
        try:
            numbers = tuple(int(part) for part in rest.split(",")) if rest else ()
        except ValueError:
            numbers = (-1,)
        if text == "auto":
            return cls("auto")
        if kind == "cpu" and (not rest or (len(numbers) == 1 and numbers[0] >= 1)):
            return cls("cpu", numbers[0] if numbers else 1)
        if kind == "gpu" and all(number >= 0 for number in numbers) and len(set(numbers)) == len(numbers):
            return cls("gpu", 1, numbers)
        raise UsageError(f"'{text}' says no place to run on.", "Write cpu, cpu:2 (two copies), gpu or gpu:0,1.")


@dataclass(frozen=True)
class WarmUp:
    """A made-up request that runs before a model counts as ready: zeros, or empty texts.

    Attributes:
        inputs: name to dtype and shape without the batch.
    """

    name: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class ModelConfig:
    """One model that a backend runs.

    Attributes:
        backend: ``python``, ``onnxruntime`` or ``tensorrt``.
        max_batch: rows that one run takes at most; 0 for a model without a batch dimension.
        batch_delay_us: how long the first request waits for others; None for no dynamic batching.
        response_cache: answer a repeated request from Triton's cache, where the server has one.
        decoupled: may answer a request any number of times.
        profiles: TensorRT optimization profiles to load, by number.
        engines: engine file by compute capability, as ``{"8.9": "sm89.plan"}``.
        cuda_graphs: ``(batch, {input: shape})`` of every shape to capture a CUDA graph for.
        parameters: what the backend itself is told.
    """

    name: str
    backend: Literal["python", "onnxruntime", "tensorrt"]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    max_batch: int = 0
    instances: Instances = field(default_factory=Instances)
    batch_delay_us: int | None = None
    response_cache: bool = False
    decoupled: bool = False
    warm_up: Sequence[WarmUp] = ()
    profiles: Sequence[int] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    cuda_graphs: Sequence[tuple[int, Mapping[str, Sequence[int]]]] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EnsembleStep:
    """One model of an ensemble. The maps lead from its tensors to those of the ensemble."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class EnsembleConfig:
    """Models whose tensors are handed on by the server."""

    name: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    steps: Sequence[EnsembleStep]
    max_batch: int = 0


def config_text(config: ModelConfig | EnsembleConfig, active: Sequence[int] = (), keep: int = 2) -> str:
    """The content of ``config.pbtxt``.

    Args:
        active: the versions to load; the newest ``keep`` if empty.

    Raises:
        MissingDependencyError: if tritonclient is not installed.
    """
    schema = _schema()
    message = schema.ModelConfig(name=config.name, max_batch_size=config.max_batch)
    if active:
        message.version_policy.specific.versions.extend(active)
    else:
        message.version_policy.latest.num_versions = keep
    for tensor in config.inputs:
        entry = message.input.add(name=tensor.name, data_type=_type(schema, tensor.dtype), dims=tensor.dims)
        entry.optional, entry.allow_ragged_batch = tensor.optional, tensor.ragged
    for tensor in config.outputs:
        message.output.add(name=tensor.name, data_type=_type(schema, tensor.dtype), dims=tensor.dims)
    if isinstance(config, EnsembleConfig):
        message.platform = "ensemble"
        for step in config.steps:
            message.ensemble_scheduling.step.add(
                model_name=step.model, model_version=-1, input_map=step.inputs, output_map=step.outputs
            )
    else:
        _fill(schema, message, config)
    return _written(schema, message)


def parse_config(text: str) -> Any:
    """The protobuf of a ``config.pbtxt``.

    Raises:
        UsageError: if Triton does not know what it says.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, _schema().ModelConfig())
    except text_format.ParseError as error:
        raise UsageError(f"This is no Triton model configuration: {error}.", "Let effc triton write it.") from None


def _fill(schema: Any, message: Any, config: ModelConfig) -> None:
    message.backend = config.backend
    group = message.instance_group.add(count=config.instances.count)
    kinds = {"gpu": group.KIND_GPU, "model": group.KIND_MODEL}
    group.kind = kinds.get(config.instances.kind, group.KIND_CPU)
    group.gpus.extend(config.instances.gpus)
    group.profile.extend(str(number) for number in config.profiles)
    if config.batch_delay_us is not None:
        message.dynamic_batching.max_queue_delay_microseconds = config.batch_delay_us
    message.response_cache.enable = config.response_cache
    message.model_transaction_policy.decoupled = config.decoupled
    for warm_up in config.warm_up:
        entry = message.model_warmup.add(name=warm_up.name, batch_size=min(config.max_batch, 1))
        for name, (dtype, dims) in warm_up.inputs.items():
            made = entry.inputs[name]
            made.data_type, made.zero_data = _type(schema, dtype), True
            made.dims.extend(dims)
    for capability, file in config.engines.items():
        message.cc_model_filenames[capability] = file
    for key, value in config.parameters.items():
        message.parameters[key].string_value = value
    if config.cuda_graphs:
        message.optimization.cuda.graphs = True
        for batch, shapes in config.cuda_graphs:
            spec = message.optimization.cuda.graph_spec.add(batch_size=batch)
            for name, shape in shapes.items():
                spec.input[name].dim.extend(shape)


def _type(schema: Any, dtype: str) -> Any:
    if dtype == TEXT:
        return schema.DataType.Value("TYPE_STRING")
    import numpy as np
    from tritonclient.utils import np_to_triton_dtype

    name = np_to_triton_dtype(np.dtype(dtype))
    if name is None:
        raise UsageError(f"Triton has no tensors of type {dtype}.", "Leave this input or output out.")
    return schema.DataType.Value(f"TYPE_{name}")


def _written(schema: Any, message: Any) -> str:
    from google.protobuf import text_format

    text = text_format.MessageToString(message)
    if text_format.Parse(text, schema.ModelConfig()) != message:
        raise EffcError(f"The configuration of '{message.name}' does not survive being written.", "Report this.")
    return str(text)


def _schema() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise MissingDependencyError(
            "Writing Triton configurations needs the package tritonclient.", "Install it: pip install 'effc[serve]'."
        ) from None
    return model_config_pb2
