"""How an artifact is to be served."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from effc.errors import UsageError
from effc.exporters.triton_config import Instances
from effc.serving.backend.heads import POOLINGS, Pooling
from effc.suggest import did_you_mean

Backend = Literal["auto", "python", "onnxruntime", "tensorrt"]
BACKENDS: tuple[Backend, ...] = ("auto", "python", "onnxruntime", "tensorrt")

_VERSION = re.compile(r"\d+(\.\d+){2,3}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class ServingOptions:
    """What ``effc triton`` can be told.

    Attributes:
        name: of the model that clients ask; the artifact's directory name when None.
        backend: who runs the graph. ``python`` is a model of effc's over the onnxruntime package with effc's native
            kernels; ``onnxruntime`` is Triton's own backend, with standard operators and requests of one length
            batched; ``tensorrt`` runs the engines that the artifact holds. ``auto`` is ``tensorrt`` for an artifact
            with engines and ``python`` for others.
        max_batch: rows that one run takes at most; of a causal model, texts that are written at once.
        instances: how many copies of the graph run, and where; ``auto`` is each GPU for engines and one copy on the
            CPU for others.
        batch_delay_us: how long a request waits for others to share its run.
        threads: computing threads of one instance; its share of the server's cores when None.
        response_cache: let the server answer repeated requests from its cache.
        max_length: tokens of a text; those the model takes (or its sentence-transformers files say) when None.
        truncate: cut longer texts; refuse them if False.
        pooling, normalize: how embeddings are made; as the model's sentence-transformers files say when None, and mean
            and False without those.
        keep: versions that stay loaded.
        variants: further artifacts of the same model by name; each request goes to the one that is fastest at its
            length.
        latency_budget_ms: let each request go to the variant that loses least quality of those that are expected to
            answer within this time, the waiting of earlier requests included; to the fastest if none is.
        engines: artifacts with engines of the same model for other GPUs.
        server_tensorrt: version of TensorRT in the server that is to run engines; not checked when None.
        cuda_graphs: shapes of which CUDA graphs are captured, ``8x128`` (batch x length).
        stages: into how many models the graph is split, one after the other; it stays whole when None.

    Raises:
        UsageError: if a value is out of range.
    """

    name: str | None = None
    backend: Backend = "auto"
    max_batch: int = 8
    instances: Instances = field(default_factory=lambda: Instances("auto"))
    batch_delay_us: int = 500
    threads: int | None = None
    response_cache: bool = False
    max_length: int | None = None
    truncate: bool = True
    pooling: Pooling | None = None
    normalize: bool | None = None
    keep: int = 2
    variants: Mapping[str, Path] = field(default_factory=dict)
    latency_budget_ms: float | None = None
    engines: Sequence[Path] = ()
    server_tensorrt: str | None = None
    cuda_graphs: Sequence[str] = ()
    stages: int | None = None

    def __post_init__(self) -> None:
        for name in (*([self.name] if self.name is not None else []), *self.variants):
            check_name(name)
        if self.backend not in BACKENDS:
            raise UsageError(f"There is no backend '{self.backend}'.", did_you_mean(self.backend, BACKENDS))
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise UsageError(f"There is no pooling '{self.pooling}'.", did_you_mean(self.pooling, POOLINGS))
        if self.latency_budget_ms is not None and not self.variants:
            raise UsageError("A latency budget chooses among variants, and there are none.", "Give --variant NAME=OUT.")
        if self.latency_budget_ms is not None and not 0 < self.latency_budget_ms < float("inf"):
            raise UsageError(f"latency-budget-ms must be above 0, not {self.latency_budget_ms}.", "Correct it.")
        if self.server_tensorrt is not None and not _VERSION.fullmatch(self.server_tensorrt):
            raise UsageError(f"'{self.server_tensorrt}' is no version of TensorRT.", "Write, for example, 10.9.0.")
        least = {"max_batch": 1, "batch_delay_us": 0, "threads": 1, "max_length": 1, "keep": 1, "stages": 1}
        for key, lowest in least.items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise UsageError(f"{key.replace('_', '-')} must be at least {lowest}, not {value}.", "Correct it.")

    def placed(self, *, engines: bool) -> ServingOptions:
        """With everything decided that was left to the artifact.

        Args:
            engines: the artifact holds engines.

        Raises:
            UsageError: if an option is for engines and others run, or the other way round.
        """
        backend = self.backend if self.backend != "auto" else "tensorrt" if engines else "python"
        runs_engines = backend == "tensorrt"
        for_engines = {
            "--engines": self.engines,
            "--server-tensorrt": self.server_tensorrt,
            "--cuda-graphs": self.cuda_graphs,
        }
        for_graphs = {
            "--threads": self.threads,
            "--variant": self.variants,
            "--stages": self.stages,
            f"--instances {self.instances.kind}": self.instances.kind == "cpu",
        }
        for flag, given in (for_graphs if runs_engines else for_engines).items():
            if given:
                problem = "no engines run" if not runs_engines else "TensorRT engines run"
                raise UsageError(f"{flag} means nothing where {problem}.", "Leave it out, or choose another --backend.")
        instances = self.instances
        if instances.kind == "auto":
            instances = Instances("gpu" if runs_engines else "cpu")
        return replace(self, backend=backend, instances=instances)


def parse_stages(text: str | None, instances: Instances) -> tuple[int | None, Instances]:
    """Number of stages and where they run: ``2``, or ``gpu:0,1`` for one on each of these GPUs.

    Args:
        instances: where they run if the text does not say it.

    Raises:
        UsageError: if it is neither, or places are given twice.
    """
    if text is None:
        return None, instances
    if text.isdecimal() and text.isascii():
        return int(text), instances
    if not text.startswith("gpu:"):
        raise UsageError(f"'{text}' says no stages.", "Give their number, or one GPU for each: gpu:0,1.")
    if instances.kind != "auto":
        raise UsageError("--stages says on which GPUs they run, and so does --instances.", "Leave out one of the two.")
    places = Instances.parse(text)
    return len(places.gpus), places


def check_name(name: str) -> str:
    """A name that can be a directory.

    Raises:
        UsageError: if it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot name a model.", "Use letters, digits, '_', '-' and '.', with a letter or digit in front."
        )
    return name
