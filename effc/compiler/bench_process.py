"""The processes that a benchmark runs models in, and how they take turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from effc.compiler.manifest import Timing
from effc.errors import EffcError

DENSE_FORM_KEY = "effc.dense_form"
"""ONNX metadata key under which a dense twin says which form of attention it uses."""


@dataclass(frozen=True)
class Candidate:
    """A model to be timed.

    Attributes:
        model: path of the .onnx file.
        library: native kernels to register, or None.
    """

    model: Path
    library: Path | None = None

    def to_json(self) -> dict[str, str | None]:
        """As plain JSON values."""
        return {"model": str(self.model), "library": str(self.library) if self.library else None}


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


def take_turns(workers: Mapping[str, Worker], rounds: int, seconds: float) -> dict[str, Timing]:
    """Time what the workers have open, A B A B, ``seconds`` each per round; the first run of each is not counted."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in workers}
    runs = dict.fromkeys(workers, 0)
    for worker in workers.values():
        worker.ask(command="run", seconds=0)
    for _ in range(rounds):
        for name, worker in workers.items():
            answer = worker.ask(command="run", seconds=seconds)
            samples[name][0].extend(answer["cpu_ms"])
            samples[name][1].extend(answer["wall_ms"])
            runs[name] += answer["runs"]
    return {
        name: Timing(
            cpu_ms=median(cpu),
            wall_ms=median(wall),
            cpu_ms_min=min(cpu),
            wall_ms_min=min(wall),
            peak_rss_mib=workers[name].ask(command="memory")["peak_rss_mib"],
            runs=runs[name],
        )
        for name, (cpu, wall) in samples.items()
    }
