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
    looks back.
    """

    layer: str
    source: str
    pattern: str
    causal: bool
    num_heads: int
    kv_heads: int
    head_dim: int
    rewritten: bool
    reason: str | None = None


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


class VerifyRecord(Record):
    """Quality of the artifact against the untouched source model."""

    data: str
    samples: int
    outputs: dict[str, OutputDeviation]
    task_metric: dict[str, Any] | None = None
    quality_drop: float
    quality_metric: str
    details: dict[str, Any] = Field(default_factory=dict)


class Timing(Record):
    """One model at one length. Times are per run, in milliseconds; memory in MiB."""

    cpu_ms: float
    wall_ms: float
    cpu_ms_min: float
    wall_ms_min: float
    peak_rss_mib: float
    runs: int


class BenchRecord(Record):
    """Speed against the dense twin; every mapping is keyed by the sequence length as text."""

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
    machine: dict[str, Any] = Field(default_factory=dict)


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
    passes: list[PassRecord]
    attention: list[AttentionLayer]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    files: dict[str, FileRecord]
    verification: VerifyRecord | None = None
    benchmark: BenchRecord | None = None
