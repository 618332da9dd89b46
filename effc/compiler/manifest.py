"""What ``effc.json`` holds: everything that was asked for, done, skipped and measured."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of all records: unknown keys are errors, so that a newer file is not half understood."""

    # Infinite errors happen (a model that returns NaN), and JSON has no number for them.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class SourceRecord(Record):
    """Where the model came from and what it is."""

    path: str
    kind: Literal["directory", "gguf", "hub"]
    revision: str | None = None
    model_type: str
    architecture: str
    task: str
    parameters: int
    max_length: int | None = None
    fingerprint: str


class Skipped(Record):
    """A module or node that a pass left alone, and why."""

    module: str
    reason: str


class OutputDeviation(Record):
    """How far one output is from its reference, over all elements that are not padding."""

    relative_error: float
    cosine: float
    top1_agreement: float | None = None


class PassRecord(Record):
    """One pass of the pipeline."""

    name: str
    version: int
    seconds: float
    modified: bool
    cached: bool = False
    changed: list[str] = Field(default_factory=list)
    skipped: list[Skipped] = Field(default_factory=list)
    metrics: dict[str, Any] = Field(default_factory=dict)
    probe: dict[str, OutputDeviation] | None = None


class AttentionLayer(Record):
    """One attention module of the source model and what became of it.

    ``source`` and ``pattern`` are pattern texts (``dense``, ``local:256``); ``causal`` says whether the module only
    looks back, ``bias`` what it adds to its scores by distance.
    """

    layer: str
    source: str
    pattern: str
    causal: bool
    num_heads: int
    kv_heads: int
    head_dim: int
    bias: str | None = None
    rewritten: bool
    reason: str | None = None


class PositionsRecord(Record):
    """How the source model's positions were changed. ``rows`` are those of each position table now.

    ``formula`` says which row a position takes where tables are sparse.
    """

    trained: int | None
    max_length: int | None
    method: str | None = None
    rows: dict[str, int] = Field(default_factory=dict)
    formula: str | None = None


class VocabularyRecord(Record):
    """A pruned vocabulary. ``file`` lists the source model's id of every token, in the order of the new ids."""

    file: str
    tokens: int
    source_tokens: int


class CompressionRecord(Record):
    """What pruning and factorization left of the weights. ``nonzero`` does not count weights that were set to zero."""

    steps: list[str]
    parameters: int
    nonzero: int
    notes: list[str] = Field(default_factory=list)
    vocabulary: VocabularyRecord | None = None


class CheckpointRecord(Record):
    """The checkpoint beside the graph. ``plain`` says whether transformers alone can load it; ``reason`` why not."""

    directory: str
    plain: bool
    architecture: str
    reason: str | None = None
    relative_error: float


class TensorRecord(Record):
    """An input or output of the graph. Symbolic dimensions are strings, ``batch`` and ``sequence`` for tokens.

    ``maximum`` is the largest value that an integer input may hold (vocabulary size - 1), where there is such a bound.
    """

    name: str
    dtype: str
    shape: list[int | str]
    maximum: int | None = None


class FileRecord(Record):
    """One file of the artifact."""

    sha256: str
    bytes: int


class ExtendedRecord(Record):
    """Quality at a length that the source model was not made for, against ``reference``."""

    reference: str
    length: int
    samples: int
    outputs: dict[str, OutputDeviation]
    quality_drop: float


class VerifyRecord(Record):
    """Quality of the artifact against the untouched source model; ``extended`` beyond the length of that."""

    data: str
    samples: int
    outputs: dict[str, OutputDeviation]
    task_metric: dict[str, Any] | None = None
    quality_drop: float
    quality_metric: str
    details: dict[str, Any] = Field(default_factory=dict)
    extended: ExtendedRecord | None = None


class Timing(Record):
    """One model at one length. Times are per run, in milliseconds; memory in MiB."""

    cpu_ms: float
    wall_ms: float
    cpu_ms_min: float
    wall_ms_min: float
    peak_rss_mib: float
    runs: int


class SpeedRecord(Record):
    """Speed against a dense twin; every mapping is keyed by a number of tokens as text."""

    batch: int
    lengths: list[int]
    threads: int
    dense: dict[str, Timing]
    compiled: dict[str, Timing]
    speedup: dict[str, float]
    speedup_wall: dict[str, float]
    memory_ratio: dict[str, float]
    break_even_length: int | None = None
    dense_form: str
    kernels: dict[str, str] = Field(default_factory=dict)


class BenchRecord(SpeedRecord):
    """Speed of the forward pass by length, and of writing a token by the tokens before it.

    ``not_written`` says why ``decode`` is missing for a model that writes.
    """

    machine: dict[str, Any] = Field(default_factory=dict)
    decode: SpeedRecord | None = None
    not_written: str | None = None


class CacheGroupRecord(Record):
    """Layers of a generating graph that compute the same form, and what each of them keeps of the past.

    ``slots``: the first ``sinks`` positions and a ring of the last ``recent`` ones, or every position if that is None.
    ``ordered``: every position, read by the form's operator together with the last ``queries`` queries. ``state``:
    tensors of the shapes ``state``, the batch left out, that start as ``initial``.
    """

    pattern: str
    kind: Literal["slots", "ordered", "state"]
    sinks: int = 0
    recent: int | None = None
    queries: int = 1
    state: dict[str, list[int]] = Field(default_factory=dict)
    initial: dict[str, float] = Field(default_factory=dict)
    distance: bool = False


class CachedLayerRecord(Record):
    """One attention operator of a generating graph; its place in the list is the suffix of its inputs' names."""

    layer: str
    group: int
    num_heads: int
    kv_heads: int
    head_dim: int
    kept_in: Literal["fp32", "fp16", "int8"] = "fp32"


class GenerationRecord(Record):
    """The graph that generates text. ``weights_shared`` counts bytes that it reads from the forward graph's file."""

    file: str
    groups: list[CacheGroupRecord]
    layers: list[CachedLayerRecord]
    positions: bool
    eos_token_ids: list[int] = Field(default_factory=list)
    pad_token_id: int = 0
    weights_shared: int = 0


class EngineRecord(Record):
    """One engine.

    Attributes:
        graph: ``forward``, ``prefill`` or ``decode``.
        rank: which of several GPUs it is for that compute together; None if it is for one alone.
        arch: the GPU architecture that it is for, ``sm_89``.
        profiles: for each optimization profile, smallest, best and largest shape of every input.
        inputs, outputs: as the engine has them.
        attention, linears: which kernel computes each layer, as the builder's log says; the first profile's.
        low: matrix products in INT8 or FP8 by type, all profiles counted; products that read one input may be one.
        warnings: of effc and of TensorRT.
    """

    file: str
    graph: str
    arch: str
    seconds: float
    profiles: list[dict[str, list[list[int]]]]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    attention: dict[str, str]
    linears: dict[str, str]
    low: dict[str, int]
    warnings: list[str] = Field(default_factory=list)
    rank: int | None = None


class EngineGraphRecord(Record):
    """A graph that engines are built from, run by ONNX Runtime on CPU.

    ``error`` is the relative error of the graph in the engine's precision to the same graph in fp32 before it was
    quantized; None where that could not be run, which ``not_run`` explains. ``error_fp32`` is that of quantization
    alone, with everything else in fp32. ``step_error`` is that of decoding token by token, in fp32, to the forward
    pass. ``clipped`` counts constants beyond the range of fp16. ``pads``: texts of different lengths may share a run of
    a decode graph, padded in front. ``divided_error`` is that of the shares of several GPUs taken together.
    """

    error: float | None = None
    error_fp32: float | None = None
    not_run: str | None = None
    step_error: float | None = None
    kept_in_fp32: list[str] = Field(default_factory=list)
    clipped: int = 0
    pads: bool = False
    divided_error: float | None = None


class EnginesRecord(Record):
    """Engines of an artifact. ``plugin`` is the library's file, or None if they need none or hold it themselves.

    ``tensor_parallel``: GPUs that compute every layer together. ``version_compatible``: newer releases of TensorRT of
    the same major version run them too.
    """

    flavour: str
    version: str
    precision: str
    plugin: str | None = None
    plugin_embedded: bool = False
    version_compatible: bool = False
    tensor_parallel: int = 1
    graphs: dict[str, EngineGraphRecord]
    engines: list[EngineRecord]
    eos_token_ids: list[int] = Field(default_factory=list)
    pad_token_id: int = 0
    not_run: str | None = None

    @property
    def writes(self) -> bool:
        """Whether they write text."""
        return any(engine.graph == "decode" for engine in self.engines)


class LayerSensitivity(Record):
    """What was measured of one layer when its attention was chosen.

    ``values`` holds, for each column of the search, what that choice alone changes: the relative error of the model's
    output (auto) or the importance of a head (duo); None where it was not measured. ``attention_errors`` and ``drops``
    are the relative error at the attention module's output and the quality lost, where they were measured.
    """

    layer: str
    values: list[float | None]
    attention_errors: list[float | None] = Field(default_factory=list)
    drops: list[float | None] = Field(default_factory=list)
    chosen: str
    kept: list[int] = Field(default_factory=list)


class AttentionSearch(Record):
    """How the form of every layer (``auto``) or head (``duo``) was chosen.

    Attributes:
        request: what was asked for, ``auto:0.02`` or ``duo:0.5:256:4``.
        columns: the candidates, or the numbers of the key/value heads.
        error: what the whole choice loses together, measured; ``error_name`` says what that is.
        output_error: relative error of the model's output under the whole choice.
        cost_share: arithmetic of the attention chosen over that of the source, at ``target_length`` tokens.
        longest: tokens of the longest text that was measured on.
        runs: forward passes of a batch.
    """

    request: str
    data: str
    samples: int
    tokens: int
    longest: int
    target_length: int
    columns: list[str]
    layers: list[LayerSensitivity]
    error: float
    error_name: str
    output_error: float
    cost_share: float
    runs: int
    seconds: float

    def assignment(self) -> dict[str, str]:
        """The form chosen for each layer, as ``attention.layers`` of a recipe takes it."""
        return {layer.layer: layer.chosen for layer in self.layers}


class QuantizedLayer(Record):
    """A layer, and what was found when it was chosen whether to quantize it.

    ``error`` is the estimated change of the model's output when it alone is quantized, ``speedup`` its own against
    fp32; None where it was not measured. ``weights`` is its size, ``reason`` says why it stays in fp32.
    """

    layer: str
    weights: int
    quantized: bool
    reason: str | None = None
    error: float | None = None
    speedup: float | None = None


class QuantizationSearch(Record):
    """How the layers to quantize were chosen: ``drop`` is what the whole choice loses, against ``budget``.

    ``error_name`` says what the errors of the layers are, ``measured`` how many choices were run.
    """

    request: str
    mode: str
    budget: float
    data: str
    samples: int
    tokens: int
    layers: list[QuantizedLayer]
    error_name: str
    drop: float
    drop_name: str
    output_error: float
    met: bool
    measured: int
    seconds: float

    @property
    def quantized_share(self) -> float:
        """The share of the layers' weights that is quantized."""
        return sum(layer.weights for layer in self.layers if layer.quantized) / max(
            1, sum(layer.weights for layer in self.layers)
        )

    def reasons(self) -> dict[str, tuple[str, str]]:
        """Mode and reason of every layer that stays in fp32."""
        return {layer.layer: ("none", layer.reason or "") for layer in self.layers if not layer.quantized}


class Manifest(Record):
    """The whole of ``effc.json``."""

    schema_version: Literal[1] = 1
    effc_version: str
    created: datetime
    target: str
    source: SourceRecord
    recipe: dict[str, Any]
    toolchain: dict[str, str]
    export_key: str
    twin_key: str | None = None
    passes: list[PassRecord]
    attention: list[AttentionLayer]
    positions: PositionsRecord | None = None
    compression: CompressionRecord | None = None
    checkpoint: CheckpointRecord | None = None
    attention_search: AttentionSearch | None = None
    quantization_search: QuantizationSearch | None = None
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    files: dict[str, FileRecord]
    generation: GenerationRecord | None = None
    engines: EnginesRecord | None = None
    verification: VerifyRecord | None = None
    benchmark: BenchRecord | None = None
