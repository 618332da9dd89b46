"""What a compile tells and records of its steps, one after another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effc.compiler.manifest import PassRecord, Skipped
from effc.compiler.progress import Progress
from effc.errors import EffcError, PassFailedError
from effc.passes.base import PassResult


class StepLog:
    """Keeps the records of all passes, and tells of the steps.

    Attributes:
        records: of the passes that have run, in order.
        steps: how many there will be in all.
        progress: told of every step, or None.
    """

    def __init__(self, steps: int, progress: Progress | None):
        self.records: list[PassRecord] = []
        self.steps, self.progress, self._done = steps, progress, 0

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Tell of a step, and let an error say which step it was and what came before."""
        self.tell(name)
        try:
            yield Step(self.records, name)
        except (EffcError, OSError):
            raise
        except Exception as error:
            before = ", ".join(record.name for record in self.records) or "no other pass"
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PassFailedError(
                f"The pass '{name}' failed after {before}: {reason.strip()[:300]}.",
                "Run again with --debug for the trace.",
            ) from error
        self._done += 1

    def tell(self, what: str) -> None:
        """Tell of something within the step that runs."""
        if self.progress:
            self.progress(what, self._done, self.steps)


class Step:
    """One step while it runs."""

    def __init__(self, records: list[PassRecord], name: str):
        self._records, self._name, self._started = records, name, time.perf_counter()

    def record(self, version: int, result: PassResult[Any], cached: bool = False) -> PassRecord:
        """Record the pass that this step has run, with the time since the step began."""
        record = PassRecord(
            name=self._name,
            version=version,
            seconds=time.perf_counter() - self._started,
            modified=result.modified,
            cached=cached,
            changed=result.changed,
            skipped=[Skipped(module=module, reason=reason) for module, reason in result.skipped],
            metrics=result.metrics,
        )
        self._records.append(record)
        return record
