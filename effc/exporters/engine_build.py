"""Building engines: each in a process of its own, with progress, and what it is made of read from its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effc.errors import PassFailedError
from effc.exporters.engine_log import EngineLayer, read_layers
from effc.exporters.tensorrt_flavours import Flavour, library_folder

Range = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, best and largest shape of an input."""
Tell = Callable[[str], None]

# The parser loads the libraries under the names that an installation has and a Python package lacks.
_LINKED = (".so.1", ".so.2", ".so.10", ".so.11")


@dataclass(frozen=True)
class Request:
    """What the builder is told; see :mod:`effc.exporters.engine_worker`.

    Attributes:
        module: of TensorRT, ``tensorrt_rtx``.
        graph, plan, log: files; the graph is read, the others are written.
        plugin: library to load, or None.
        embedded: library to put into the plan, or None.
        capability: 89 for sm_89; None for the GPU that is there.
        profiles: for each optimization profile, the shapes of every input.
        flags: names of builder flags.
        timing_cache: file, or None.
    """

    module: str
    graph: str
    plan: str
    log: str
    plugin: str | None
    embedded: str | None
    capability: int | None
    profiles: Sequence[Mapping[str, Range]]
    flags: Sequence[str] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: str | None = None


@dataclass(frozen=True)
class Built:
    """A finished engine: its layers, how long it took, and TensorRT's warnings."""

    layers: list[EngineLayer]
    seconds: float
    warnings: list[str]


def build_engine(flavour: Flavour, request: Request, name: str, tell: Tell | None = None) -> Built:
    """Build one engine.

    Args:
        name: of the engine, for messages.
        tell: told of progress.

    Raises:
        PassFailedError: if TensorRT does not build it; says why in its words.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(flavour, Path(folder), request.capability)
        process = subprocess.Popen(
            [sys.executable, "-m", "effc.exporters.engine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        complaints: list[str] = []
        assert process.stderr is not None
        listener = threading.Thread(target=lambda stream: complaints.extend(stream), args=(process.stderr,))
        listener.start()
        try:
            answer = _converse(process, request, name, tell)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            listener.join()
    if answer is None or "error" in answer:
        raise PassFailedError(
            f"{flavour.name} did not build the engine '{name}': {_reason(flavour, answer, process, complaints)}",
            "Run again with --debug, and report this model. --target=onnxruntime takes the same recipe.",
        )
    log = Path(request.log).read_text(encoding="utf-8", errors="replace")
    return Built(read_layers(log), float(answer["seconds"]), [_short(text) for text in answer["warnings"]])


def _converse(process: subprocess.Popen[str], request: Request, name: str, tell: Tell | None) -> dict[str, Any] | None:
    """The worker's result, or None if it ended without one."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asdict(request)))
        process.stdin.close()
    result: dict[str, Any] | None = None
    shown = ""
    for line in process.stdout:
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if "result" in answer:
            result = answer["result"]
        elif tell is not None and answer["steps"]:
            share = f"{name}: {answer['phase']}, {100 * answer['done'] // answer['steps']} %"
            if share != shown:
                shown = share
                tell(share)
    return result


def _environment(flavour: Flavour, folder: Path, capability: int | None) -> dict[str, str]:
    environment = dict(os.environ)
    # The package may be a checkout that is only on sys.path.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["PYTHONWARNINGS"] = "ignore::DeprecationWarning"
    if capability is not None:
        environment["EFFC_TARGET_SM"] = str(capability)
    libraries = library_folder(flavour)
    if libraries is not None and sys.platform != "win32":
        for file in libraries.iterdir():
            for ending in _LINKED:
                if file.name.endswith(ending):
                    (folder / file.name.removesuffix(ending)).with_suffix(".so").symlink_to(file)
        former = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), str(libraries), former]))
    return environment


def _reason(
    flavour: Flavour, answer: dict[str, Any] | None, process: subprocess.Popen[str], complaints: list[str]
) -> str:
    # The plugin complains on stderr where TensorRT gives it no logger.
    own = [line.strip() for line in complaints if line.startswith("effc::")]
    if answer is not None:
        return " ".join(dict.fromkeys([*own, _short(str(answer["error"]))]))
    last = next((line.strip() for line in reversed(complaints) if line.strip()), "it said nothing")
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
    return " ".join([*dict.fromkeys(own), f"its builder ended with {how}: {_short(last)}"])


def _short(text: str) -> str:
    """One line, without what TensorRT says of a GPU that is not there."""
    parts = [part.strip() for part in text.replace("\n", " ").split("; ")]
    kept = [part for part in parts if "cudaError 35" not in part] or parts
    line = "; ".join(kept)
    return (line if len(line) <= 600 else f"{line[:600]}...").rstrip(".") + "."
