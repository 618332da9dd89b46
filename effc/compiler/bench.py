"""Time a compiled model against its dense twin, side by side in one run.

For every length each model gets a fresh process of its own, so that peak memory is its own. The processes take turns,
A B A B, so that whatever else the machine does hits both alike. What is compared is process CPU time, the least noisy
figure on a machine that does other work; wall time is recorded beside it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from effc.compiler.feeds import TensorSpec
from effc.compiler.kernels import attention_kernels, attention_summary, linear_kernels
from effc.compiler.machine import describe_machine, usable_cores
from effc.compiler.manifest import BenchRecord, Manifest, Timing
from effc.compiler.runtime import MODEL_NAME, check_files, loadable_native_library, model_files, read_manifest
from effc.compiler.session import KernelEvent, Profile
from effc.errors import EffcError, UsageError

DEFAULT_LENGTHS = (128, 512, 1024, 2048, 4096)
SECONDS_PER_ROUND = 0.3
"""Work per model, length and round; a run that takes longer is done once."""

DENSE_FORM_KEY = "effc.dense_form"
"""ONNX metadata key under which a dense twin says which form of attention it uses."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, steps done, steps in all)``."""


@dataclass(frozen=True)
class Candidate:
    """A model to be timed.

    Attributes:
        model: path of the .onnx file.
        library: native kernels to register, or None.
    """

    model: Path
    library: Path | None = None


def bench(
    artifact: str | Path | Any,
    *,
    lengths: Sequence[int] | None = None,
    batch: int = 1,
    rounds: int = 3,
    threads: int | None = None,
    native: bool = True,
    progress: Progress | None = None,
    twin: str | Path | None = None,
) -> BenchRecord:
    """Measure an artifact against the dense fp32 twin of its model.

    Args:
        artifact: the artifact directory, or what ``effc.compile`` returned.
        lengths: tokens per sequence; chosen from the model's maximum when None or empty.
        batch: sequences per run.
        rounds: how often the two take turns per length.
        threads: computing threads of each; as many as usable physical cores when None.
        native: use effc's native kernels where there are any.
        progress: told of every step.
        twin: an .onnx file to compare with, in place of the dense twin that effc builds.

    Returns:
        Times per run in milliseconds and peak memory in MiB per length. ``speedup`` is the twin's CPU time over the
        compiled model's, by medians; ``memory_ratio`` is the compiled model's peak over the twin's.

    Raises:
        UsageError: if a length exceeds the model's maximum, or a parameter is out of range.
        OutputError: if ``artifact`` is not an artifact or is damaged.
        EffcError: if a model cannot be run, for example for lack of memory.
    """
    directory = Path(getattr(artifact, "path", artifact))
    manifest = read_manifest(directory)
    check_files(directory, manifest, names=model_files(manifest), hashes=False)
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.", f"Leave {name} out to use the default.")
    specs = [TensorSpec.of_record(record) for record in manifest.inputs]
    chosen = choose_lengths(manifest, lengths)
    _check_batch(specs, batch)
    threads = threads or usable_cores()
    if twin is None:
        from effc.compiler.twin import dense_twin

        twin = dense_twin(manifest)
    library = loadable_native_library() if native else None
    candidates = {"dense": Candidate(Path(twin)), "compiled": Candidate(directory / MODEL_NAME, library)}

    if progress:
        progress("which kernels run", 0, len(chosen) + 1)
    profiled = {
        name: profile(name, candidate, specs, batch=batch, length=chosen[0], threads=threads)
        for name, candidate in candidates.items()
    }
    timings: dict[str, dict[str, Timing]] = {name: {} for name in candidates}
    for done, length in enumerate(chosen, start=1):
        if progress:
            progress(f"{length} tokens", done, len(chosen) + 1)
        for name, timing in measure(
            candidates, specs, length=length, batch=batch, rounds=rounds, threads=threads
        ).items():
            timings[name][str(length)] = timing
    if progress:
        progress("done", len(chosen) + 1, len(chosen) + 1)

    dense, compiled, events = timings["dense"], timings["compiled"], profiled["compiled"].events
    speedup = {key: dense[key].cpu_ms / compiled[key].cpu_ms for key in compiled}
    return BenchRecord(
        batch=batch,
        lengths=chosen,
        threads=threads,
        dense=dense,
        compiled=compiled,
        speedup=speedup,
        speedup_wall={key: dense[key].wall_ms / compiled[key].wall_ms for key in compiled},
        memory_ratio={key: compiled[key].peak_rss_mib / dense[key].peak_rss_mib for key in compiled},
        break_even_length=break_even({int(key): value for key, value in speedup.items()}),
        dense_form=profiled["dense"].metadata.get(DENSE_FORM_KEY) or attention_summary(profiled["dense"].events),
        kernels=attention_kernels(events, manifest.attention) | linear_kernels(events),
        machine=asdict(describe_machine()),
    )


def measure(
    candidates: Mapping[str, Candidate],
    specs: Sequence[TensorSpec],
    *,
    length: int,
    batch: int,
    rounds: int,
    threads: int,
    seconds: float = SECONDS_PER_ROUND,
) -> dict[str, Timing]:
    """Time any number of models on the same random inputs of one length, taking turns.

    Raises:
        EffcError: if a model cannot be run.
    """
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in candidates}
    runs = dict.fromkeys(candidates, 0)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, candidate.model)) for name, candidate in candidates.items()}
        for name, worker in workers.items():
            worker.ask(command="open", **_request(candidates[name], specs, batch, length, threads))
            worker.ask(command="run", seconds=0)
        for _ in range(rounds):
            for name, worker in workers.items():
                answer = worker.ask(command="run", seconds=seconds)
                samples[name][0].extend(answer["cpu_ms"])
                samples[name][1].extend(answer["wall_ms"])
                runs[name] += answer["runs"]
        peaks = {name: worker.ask(command="memory")["peak_rss_mib"] for name, worker in workers.items()}
    return {
        name: Timing(
            cpu_ms=median(cpu),
            wall_ms=median(wall),
            cpu_ms_min=min(cpu),
            wall_ms_min=min(wall),
            peak_rss_mib=peaks[name],
            runs=runs[name],
        )
        for name, (cpu, wall) in samples.items()
    }


def profile(
    name: str, candidate: Candidate, specs: Sequence[TensorSpec], *, batch: int, length: int, threads: int
) -> Profile:
    """List the kernels of one run, in a process of its own: profiling costs time and memory.

    Raises:
        EffcError: if the model cannot be run; the message calls it by ``name``.
    """
    with Worker(name, candidate.model) as worker:
        answer = worker.ask(command="profile", **_request(candidate, specs, batch, length, threads))
    return Profile([KernelEvent(*event) for event in answer["events"]], answer["metadata"])


def choose_lengths(manifest: Manifest, lengths: Sequence[int] | None) -> list[int]:
    """Sorted lengths to measure: those asked for, or a spread up to the model's maximum.

    A model of fixed input shape (images, say) has one length only: its number of positions.

    Raises:
        UsageError: if a length is out of range; the message names the maximum.
    """
    fixed = _fixed_length(manifest)
    if fixed is not None:
        if lengths and set(lengths) != {fixed}:
            raise UsageError(
                f"This model takes inputs of one size only, {fixed} positions, not {_join(lengths)}.",
                "Leave the lengths out.",
            )
        return [fixed]
    maximum = manifest.source.max_length
    if lengths:
        for length in lengths:
            if length < 1:
                raise UsageError(f"A length must be at least 1, not {length}.", "Give lengths such as 512,1024.")
            if maximum is not None and length > maximum:
                raise UsageError(
                    f"The model takes at most {maximum} tokens, so it cannot be measured at {length}.",
                    f"Give lengths up to {maximum}.",
                )
        return sorted(set(lengths))
    top = DEFAULT_LENGTHS[-1] if maximum is None else min(maximum, DEFAULT_LENGTHS[-1])
    chosen = [length for length in DEFAULT_LENGTHS if length <= top]
    # The maximum itself is worth a measurement unless a round number lies close below it.
    if not chosen or top > 1.25 * chosen[-1]:
        chosen.append(top)
    return chosen


def break_even(speedup: Mapping[int, float]) -> int | None:
    """The shortest length from which on the compiled model is faster, interpolated between measured lengths.

    The shortest measured length if it is faster there already; None if it is not faster at any.
    """
    previous: tuple[int, float] | None = None
    for length, ratio in sorted(speedup.items()):
        if ratio > 1:
            if previous is None:
                return length
            shorter, below = previous
            return math.ceil(shorter + (length - shorter) * (1 - below) / (ratio - below))
        previous = length, ratio
    return None


class Worker:
    """A process that runs one model, see ``bench_worker``. Ends with the ``with`` block, however that is left."""

    def __init__(self, name: str, model: Path):
        self._name = name
        self._model = model

    def __enter__(self) -> Worker:
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            self.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            # Ctrl-C reaches this process only, which then ends the worker without a traceback of the worker's own.
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass

    def command(self) -> list[str]:
        """What to run."""
        return [sys.executable, "-m", "effc.compiler.bench_worker"]

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            EffcError: if the worker has died; the message ends with what it wrote last.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> EffcError:
        status = self._process.wait()
        self._errors.seek(0)
        tail = " ".join(self._errors.read().strip().split())[-600:]
        if status == -signal.SIGKILL:
            why = "was killed by the system, most likely for lack of memory"
        elif status < 0:
            why = f"was ended by {signal.Signals(-status).name}"
        else:
            why = f"ended with status {status}"
        said = f", saying: {tail.rstrip('.')}." if tail else "."
        memory = status == -signal.SIGKILL or "alloc" in tail
        return EffcError(
            f"The process that ran the {self._name} model '{self._model}' {why}{said}",
            "Give shorter lengths or a smaller batch." if memory else "Compile the model again.",
        )


def _request(
    candidate: Candidate, specs: Sequence[TensorSpec], batch: int, length: int, threads: int
) -> dict[str, Any]:
    return {
        "model": str(candidate.model),
        "library": str(candidate.library) if candidate.library else None,
        "threads": threads,
        "inputs": [spec.to_json() for spec in specs],
        "batch": batch,
        "length": length,
        "seed": length,
    }


def _fixed_length(manifest: Manifest) -> int | None:
    """Positions of a model whose input sizes are all fixed (but for the batch), else None."""
    if any(isinstance(size, str) for record in manifest.inputs for size in record.shape[1:]):
        return None
    for record in manifest.outputs + manifest.inputs:
        if len(record.shape) == 3 and isinstance(record.shape[1], int):
            return record.shape[1]
    for record in manifest.inputs:
        if len(record.shape) == 2 and isinstance(record.shape[1], int):
            return record.shape[1]
    return manifest.source.max_length or 1


def _check_batch(specs: Sequence[TensorSpec], batch: int) -> None:
    for spec in specs:
        if spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] != batch:
            raise UsageError(
                f"The input '{spec.name}' has a fixed batch of {spec.shape[0]}, not {batch}.",
                f"Give a batch of {spec.shape[0]}.",
            )


def _join(lengths: Sequence[int]) -> str:
    return ", ".join(str(length) for length in lengths)
