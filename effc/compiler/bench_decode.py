"""Time what it takes to write one token, with the artifact's generating graph and with a dense twin of it.

Each model has one process for all lengths, shortest first, so that its peak memory at a length is what it needed up to
there. The two take turns, as in :mod:`effc.compiler.bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from effc.compiler.bench_process import DENSE_FORM_KEY, Candidate, Worker, take_turns
from effc.compiler.bench_ratios import compared
from effc.compiler.kernels import step_kernels
from effc.compiler.manifest import GenerationRecord, SpeedRecord, Timing
from effc.compiler.session import KernelEvent


def bench_decode(
    dense: Candidate,
    compiled: Candidate,
    record: GenerationRecord,
    *,
    lengths: Sequence[int],
    batch: int,
    rounds: int,
    threads: int,
    seconds: float,
    tell: Callable[[str], None],
) -> SpeedRecord:
    """Measure the token that makes a text ``lengths`` long.

    Args:
        dense: a graph of :mod:`effc.exporters.decode_twin`.
        compiled: the generating graph that ``record`` describes.
        seconds: work per model, length and round.
        tell: told before each step of the measurement.

    Raises:
        EffcError: if a model cannot be run.
    """
    candidates = {"dense": dense, "compiled": compiled}
    given = {"dense": None, "compiled": record.model_dump(mode="json")}
    timings: dict[str, dict[str, Timing]] = {name: {} for name in candidates}
    tell("which kernels write")
    with Worker("writing", compiled.model) as worker:
        answer = worker.ask(command="profile step", **compiled.to_json(), threads=threads, record=given["compiled"])
    events = [KernelEvent(*event) for event in answer["events"]]
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, candidate.model)) for name, candidate in candidates.items()}
        metadata = {
            name: worker.ask(
                command="open steps", **candidates[name].to_json(), threads=threads, batch=batch, record=given[name]
            )["metadata"]
            for name, worker in workers.items()
        }
        for length in sorted(lengths):
            tell(f"writing token {length}")
            for worker in workers.values():
                worker.ask(command="context", length=max(1, length - 1))
            for name, timing in take_turns(workers, rounds, seconds).items():
                timings[name][str(length)] = timing
    return SpeedRecord(
        **compared(timings["dense"], timings["compiled"]),
        batch=batch,
        threads=threads,
        dense_form=metadata["dense"].get(DENSE_FORM_KEY, "not named"),
        kernels=step_kernels(events, record.layers),
    )
