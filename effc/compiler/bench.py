"""Time a compiled model against its dense twin, side by side in one run.

For every length each model gets a fresh process of its own, so that peak memory is its own. The processes take turns,
A B A B, so that whatever else the machine does hits both alike. What is compared is process CPU time, the least noisy
figure on a machine that does other work; wall time is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from effc.compiler.artifact_files import MODEL_NAME, check_files, model_files, read_manifest
from effc.compiler.bench_decode import bench_decode
from effc.compiler.bench_process import DENSE_FORM_KEY, Candidate, Worker, take_turns
from effc.compiler.bench_ratios import compared
from effc.compiler.feeds import TensorSpec
from effc.compiler.kernels import attention_kernels, attention_summary, linear_kernels
from effc.compiler.machine import describe_machine, usable_cores
from effc.compiler.manifest import BenchRecord, Manifest, Timing
from effc.compiler.native_choice import loadable_native_library
from effc.compiler.progress import Progress
from effc.compiler.session import KernelEvent, Profile
from effc.compiler.twin import dense_decode_twin, dense_twin
from effc.errors import PreconditionError, UsageError

DEFAULT_LENGTHS = (128, 512, 1024, 2048, 4096)
SECONDS_PER_ROUND = 0.3
"""Work per model, length and round; a run that takes longer is done once."""


def bench(
    artifact: str | Path | Any,
    *,
    lengths: Sequence[int] | None = None,
    batch: int = 1,
    rounds: int = 3,
    threads: int | None = None,
    native: bool = True,
    progress: Progress | None = None,
    decode: bool = True,
    twin: str | Path | None = None,
    decode_twin: Callable[[], Path] | None = None,
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
        decode: of a model that writes text also measure what a token costs, behind as many tokens as ``lengths`` say.
        twin: an .onnx file to compare with, in place of the dense twin that effc builds.
        decode_twin: gives an .onnx file of :mod:`effc.exporters.decode_twin`; made by effc when None.

    Returns:
        Times per run in milliseconds and peak memory in MiB per length. ``speedup`` is the twin's CPU time over the
        compiled model's, by medians; ``memory_ratio`` is the compiled model's peak over the twin's. ``decode`` holds
        the same for one token.

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
        twin = dense_twin(manifest)
    library = loadable_native_library() if native else None
    candidates = {"dense": Candidate(Path(twin)), "compiled": Candidate(directory / MODEL_NAME, library)}
    generation = manifest.generation if decode else None
    steps, told = len(chosen) + 1 + (0 if generation is None else len(chosen) + 2), count()

    def tell(what: str) -> None:
        if progress:
            progress(what, next(told), steps)

    tell("which kernels run")
    profiled = {
        name: profile(name, candidate, specs, batch=batch, length=chosen[0], threads=threads)
        for name, candidate in candidates.items()
    }
    timings: dict[str, dict[str, Timing]] = {name: {} for name in candidates}
    for length in chosen:
        tell(f"{length} tokens")
        for name, timing in measure(
            candidates, specs, length=length, batch=batch, rounds=rounds, threads=threads
        ).items():
            timings[name][str(length)] = timing
    written, why = None, None
    if generation is not None:
        tell("the dense model that writes")
        try:
            baseline = dense_decode_twin(manifest) if decode_twin is None else decode_twin()
        except PreconditionError as error:
            why = error.problem
        else:
            written = bench_decode(
                Candidate(baseline),
                Candidate(directory / generation.file, library),
                generation,
                lengths=chosen,
                batch=batch,
                rounds=rounds,
                threads=threads,
                seconds=SECONDS_PER_ROUND,
                tell=tell,
            )
    if progress:
        progress("done", steps, steps)
    events = profiled["compiled"].events
    return BenchRecord(
        **compared(timings["dense"], timings["compiled"]),
        batch=batch,
        threads=threads,
        dense_form=profiled["dense"].metadata.get(DENSE_FORM_KEY) or attention_summary(profiled["dense"].events),
        kernels=attention_kernels(events, manifest.attention) | linear_kernels(events),
        machine=asdict(describe_machine()),
        decode=written,
        not_written=why,
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
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, candidate.model)) for name, candidate in candidates.items()}
        for name, worker in workers.items():
            worker.ask(command="open", **_request(candidates[name], specs, batch, length, threads))
        return take_turns(workers, rounds, seconds)


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


def _request(
    candidate: Candidate, specs: Sequence[TensorSpec], batch: int, length: int, threads: int
) -> dict[str, Any]:
    return {
        **candidate.to_json(),
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
