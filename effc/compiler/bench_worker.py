"""One model in one process, so that its peak memory and CPU time are its own: ``python -m effc.compiler.bench_worker``.

Reads one JSON request per line from standard input and answers each with one JSON line on standard output:

``{"command": "open", "model", "threads", "library", "inputs", "batch", "length", "seed"}`` -> ``{}``
``{"command": "run", "seconds"}`` -> ``{"cpu_ms": [...], "wall_ms": [...], "runs"}``, at least one run and ``seconds``
of them; a sample is one run, or the mean of those that fit into the time below which the CPU clock is too coarse
``{"command": "profile", ...as open}`` -> ``{"events": [[node, operator, provider, dtype], ...], "metadata": {...}}``
``{"command": "memory"}`` -> ``{"peak_rss_mib"}``
``{"command": "open steps", "model", "threads", "library", "record", "batch"}`` -> ``{"metadata"}``: a graph that
writes, effc's where ``record`` says what it keeps, and otherwise one whose caches are written in place
``{"command": "context", "length"}`` -> ``{}``: from here on ``run`` takes one token behind so many
``{"command": "profile step", "model", "threads", "library", "record"}`` -> as ``profile``

Imports only ONNX Runtime, numpy and the standard library. Ends when its input ends, even in the middle of a run, so
that no worker outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from effc.compiler.decode_steps import CompiledSteps, SharedCacheSteps, Steps, feeds_of_step
from effc.compiler.feeds import TensorSpec, random_inputs
from effc.compiler.session import profile_kernels, session_options

# Some kernels and sandboxes count a process's CPU time in steps of a millisecond or more: one run of a tiny model would
# read 0.
SECONDS_PER_SAMPLE = 0.02


def main() -> None:
    """Serve requests until standard input ends."""
    # A library that prints must not break the protocol: whatever goes to standard output lands on standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = _read_requests()
    run: Callable[[], object] | None = None
    steps: Steps | None = None
    try:
        while True:
            request = requests.get()
            answer: dict[str, Any]
            match request["command"]:
                case "open":
                    session, feeds = _session(request), _feeds(request)
                    feeds = {argument.name: feeds[argument.name] for argument in session.get_inputs()}
                    run, answer = partial(session.run, None, feeds), {}
                case "open steps":
                    session = _session(request)
                    steps, answer = _steps(session, request), {"metadata": session.get_modelmeta().custom_metadata_map}
                    run = steps.run
                case "context":
                    assert steps is not None
                    steps.prepare(request["length"])
                    answer = {}
                case "run":
                    assert run is not None
                    answer = _run(run, request["seconds"])
                case "profile" | "profile step" as command:
                    given = _feeds(request) if command == "profile" else feeds_of_step(request["record"])
                    profile = profile_kernels(Path(request["model"]), _options(request), given)
                    answer = {"events": [astuple(event) for event in profile.events], "metadata": profile.metadata}
                case "memory":
                    answer = {"peak_rss_mib": _peak_rss_mib()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _read_requests() -> queue.SimpleQueue[dict[str, Any]]:
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def _session(request: dict[str, Any]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(request["model"], _options(request), providers=["CPUExecutionProvider"])


def _steps(session: onnxruntime.InferenceSession, request: dict[str, Any]) -> Steps:
    record, batch = request["record"], request["batch"]
    return SharedCacheSteps(session, batch) if record is None else CompiledSteps(session, record, batch)


def _options(request: dict[str, Any]) -> onnxruntime.SessionOptions:
    options = session_options(request["threads"], spinning=False)
    if request["library"]:
        options.register_custom_ops_library(request["library"])
    return options


def _feeds(request: dict[str, Any]) -> dict[str, Any]:
    specs = [TensorSpec.from_json(values) for values in request["inputs"]]
    return random_inputs(specs, batch=request["batch"], length=request["length"], seed=request["seed"])


def _run(run: Callable[[], object], seconds: float) -> dict[str, Any]:
    cpu_ms: list[float] = []
    wall_ms: list[float] = []
    total = 0
    end = time.perf_counter() + seconds
    while not wall_ms or time.perf_counter() < end:
        runs = 0
        cpu, wall = time.process_time(), time.perf_counter()
        while not runs or time.perf_counter() - wall < min(seconds, SECONDS_PER_SAMPLE):
            run()
            runs += 1
        wall_ms.append((time.perf_counter() - wall) * 1e3 / runs)
        cpu_ms.append((time.process_time() - cpu) * 1e3 / runs)
        total += runs
    return {"cpu_ms": cpu_ms, "wall_ms": wall_ms, "runs": total}


def _peak_rss_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    try:
        # Not ru_maxrss: on Linux a process inherits that from the one that started it.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    main()
