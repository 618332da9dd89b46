"""Write several texts at once: requests join between two tokens and leave when they are done.

One thread owns the model. Between two steps it takes in one waiting prompt at most, so that texts in progress do not
stand still for long; a prompt itself runs whole, since the model takes it in one run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from effc.compiler.rows import Rows
from effc.compiler.sampling import Sampler
from effc.errors import EffcError, UsageError
from effc.serving.backend.sampling_parameters import Wanted

Finish = Literal["stop", "length", "cancelled"]


@dataclass
class Job:
    """One text to write.

    Attributes:
        prompt: token ids ``[length]``.
        emit: called with each token, from the scheduler's thread; returns True where the text is to end there.
        done: called once, with why it ended or what went wrong; nothing is emitted after it.
        cancelled: asked between tokens.
    """

    prompt: NDArray[np.int64]
    wanted: Wanted
    emit: Callable[[int], bool]
    done: Callable[[Finish | Exception], None]
    cancelled: Callable[[], bool]
    tokens: list[int] = field(default_factory=list)
    sampler: Sampler | None = None

    @property
    def text(self) -> NDArray[np.int64]:
        """Prompt and what was written, ``[1, length]``."""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int64)])[None]


class Scheduler:
    """Owns the texts in progress.

    Args:
        rows: no other thread works with them any more.
        ends: tokens that end a text.
        vocabulary: token ids are below it; None if that is not known.
        max_length: positions of the model; None if nothing bounds them.
        max_waiting: jobs that may wait for a row; more are refused.
    """

    def __init__(
        self, rows: Rows, ends: Sequence[int], vocabulary: int | None, max_length: int | None, max_waiting: int = 256
    ):
        self._rows, self._ends, self._vocabulary = rows, frozenset(ends), vocabulary
        self._max_length, self._max_waiting = max_length, max_waiting
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._logits: list[NDArray[np.float32]] = []
        self._wake = threading.Condition()
        self._closed = False
        self.steps = 0
        self.stepped_tokens = 0
        self._thread = threading.Thread(target=self._work, name="effc-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job in.

        Raises:
            UsageError: if it does not fit the model, or too many wait.
        """
        length = len(job.prompt)
        if length == 0:
            raise UsageError("The prompt is empty.", "Give some text.")
        low, high = int(job.prompt.min()), int(job.prompt.max())
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            raise UsageError(f"The prompt has a token id out of range: {low if low < 0 else high}.", "Correct it.")
        self._check_length(length, job.wanted.max_tokens)
        job.sampler = Sampler(job.wanted.sampling)
        with self._wake:
            if self._closed:
                raise UsageError("The server is stopping.", "Try again.")
            if len(self._waiting) >= self._max_waiting:
                raise UsageError(f"{self._max_waiting} requests wait already.", "Try again later.")
            self._waiting.append(job)
            self._wake.notify()

    def _check_length(self, length: int, new: int) -> None:
        remedy = "Shorten the prompt, or ask for fewer tokens."
        limits = (
            (self._max_length, "positions of the model", remedy),
            (self._rows.longest, "that the engines take in all", f"{remedy} Larger --shapes take longer texts."),
        )
        for most, what, then in limits:
            if most is not None and length + new > most:
                raise UsageError(f"{length} tokens of prompt and {new} new ones are more than the {most} {what}.", then)

    def close(self) -> None:
        """End all jobs with an error, and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._active or self._closed):
                    self._wake.wait()
                if self._closed:
                    left = [*self._active, *self._waiting]
                    break
                joining = self._waiting.popleft() if self._waiting and len(self._rows) < self._rows.capacity else None
            if joining is not None:
                self._start(joining)
            if self._active:
                self._advance()
        for job in left:
            _tell(job, EffcError("The server is stopping.", "Try again."))

    def _start(self, job: Job) -> None:
        try:
            if job.cancelled():
                _tell(job, "cancelled")
                return
            logits = self._rows.add(job.prompt)
        except Exception as error:
            _tell(job, error)
            return
        self._active.append(job)
        self._logits.append(logits)

    def _advance(self) -> None:
        """Choose a token for every row, let go of those that are done, and step the others."""
        for row in reversed(range(len(self._active))):
            finish = self._choose(self._active[row], self._logits[row])
            if finish is not None:
                self._leave(row, finish)
        if not self._active:
            return
        try:
            logits = self._rows.step([job.tokens[-1] for job in self._active])
        except Exception as error:
            for row in reversed(range(len(self._active))):
                self._leave(row, error)
            return
        self.steps += 1
        self.stepped_tokens += len(self._active)
        self._logits = list(logits)

    def _choose(self, job: Job, logits: NDArray[np.float32]) -> Finish | Exception | None:
        try:
            if job.cancelled():
                return "cancelled"
            assert job.sampler is not None
            text = job.text
            token = int(job.sampler.choose(logits[None], text, np.ones_like(text, dtype=bool))[0])
            if token in self._ends and not job.wanted.ignore_eos:
                return "stop"
            job.tokens.append(token)
            if job.emit(token):
                return "stop"
            return "length" if len(job.tokens) == job.wanted.max_tokens else None
        except Exception as error:
            return error

    def _leave(self, row: int, finish: Finish | Exception) -> None:
        """The last row takes the number of the one that leaves, here as in the caches."""
        job = self._active[row]
        self._rows.remove(row)
        self._active[row], self._logits[row] = self._active[-1], self._logits[-1]
        self._active.pop()
        self._logits.pop()
        _tell(job, finish)


def _tell(job: Job, finish: Finish | Exception) -> None:
    # Nobody may be there to hear it any more, which is no reason for the other texts to end.
    with suppress(Exception):
        job.done(finish)
