"""Builds one engine, in a process of its own: ``python -m effc.exporters.engine_worker``, a request on stdin.

TensorRT keeps plugins registered for a process's life and ends the process where a library is missing; neither may
happen to the user's. Imports the standard library and one TensorRT only. Answers are JSON, one a line, on stdout.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ERROR, _WARNING = 1, 2


def build(request: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Build as the request says (see :class:`effc.exporters.engine_build.Request`).

    Returns:
        ``{"error": text}`` or ``{"seconds": float, "warnings": [text]}``; plan and log are files then.
    """
    trt = importlib.import_module(request["module"])
    messages: list[tuple[int, str]] = []
    logger = _logger(trt, messages)
    if request["plugin"] is not None:
        # The registry that the builder uses, given this process's logger.
        trt.init_libnvinfer_plugins(logger, "") if hasattr(trt, "init_libnvinfer_plugins") else None
        trt.get_plugin_registry().load_library(request["plugin"])
    started = time.perf_counter()
    try:
        plan = _plan(trt, request, logger, messages, tell)
    except _Failed as failed:
        return {"error": str(failed)}
    finally:
        Path(request["log"]).write_text("\n".join(text for _, text in messages), encoding="utf-8")
    Path(request["plan"]).write_bytes(plan)
    warnings = [text for severity, text in messages if severity == _WARNING]
    return {"seconds": time.perf_counter() - started, "warnings": list(dict.fromkeys(warnings))}


class _Failed(Exception):
    pass


def _plan(trt: Any, request: dict[str, Any], logger: Any, messages: list[tuple[int, str]], tell: Any) -> Any:
    builder = trt.Builder(logger)
    if builder is None:
        raise _Failed(_complaints(messages) or "the builder could not be made")
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["graph"]):
        raise _Failed("; ".join(_parser_error(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    for ranges in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in ranges.items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise _Failed(_complaints(messages) or "an optimization profile does not fit the graph")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for flag in request["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if request["capability"] is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['capability']}"), 0)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    if request["embedded"] is not None:
        config.plugins_to_serialize = [request["embedded"]]
    config.progress_monitor = _monitor(trt, tell)
    with _timing_cache(config, request["timing_cache"]):
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _Failed(_complaints(messages) or "TensorRT gave no plan and no reason")
    return plan


def _logger(trt: Any, messages: list[tuple[int, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.append((int(severity), text))

    return Logger()


def _monitor(trt: Any, tell: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.open: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.open[phase_name] = (0, num_steps)
            tell({"phase": phase_name, "done": 0, "steps": num_steps})

        def phase_finish(self, phase_name: str) -> None:
            self.open.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell({"phase": phase_name, "done": step + 1, "steps": self.open.get(phase_name, (0, 0))[1]})
            return True

    return Monitor()


@contextlib.contextmanager
def _timing_cache(config: Any, path: str | None) -> Iterator[None]:
    """Measurements of kernels, kept between builds."""
    if path is None:
        yield
        return
    file = Path(path)
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None and known:
        cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    yield
    grown = config.get_timing_cache()
    if grown is None:
        return
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.is_file() and (others := config.create_timing_cache(file.read_bytes())) is not None:
            grown.combine(others, True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(bytes(grown.serialize()))
        partial.replace(file)


def _parser_error(error: Any) -> str:
    """What the parser says, and of which node; its own description is a line of C++."""
    name, operator = error.node_name(), error.node_operator()
    return f"{error.desc()} ({operator} '{name}')" if name or operator else str(error.desc())


def _complaints(messages: list[tuple[int, str]]) -> str:
    found = [text.strip().replace("\n", " ") for severity, text in messages if severity <= _ERROR]
    return "; ".join(dict.fromkeys(found))


def main() -> None:
    """Read a request from stdin and answer on what was stdout when the process began."""
    # TensorRT's libraries print to stdout as well.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    answer = build(json.load(sys.stdin), tell)
    tell({"result": answer})
    answers.flush()
    # The interpreter's shutdown destroys TensorRT's objects in an order that it does not always survive.
    os._exit(0)


if __name__ == "__main__":
    main()
