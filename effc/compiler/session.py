"""Open ONNX Runtime sessions, and say which kernels a session really runs.

Shared by ``effc.load`` and the benchmark's worker, whose memory is measured: imports only ONNX Runtime, numpy and the
standard library.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

CPU_ONLY = ("CPUExecutionProvider",)

# ONNX Runtime's log level for fatal errors alone: all others reach us as exceptions, and warnings speak of things
# that a user cannot change.
_FATAL_ONLY = 4


@dataclass(frozen=True)
class KernelEvent:
    """One kernel of one run: graph node, operator that ran (after fusion), its provider and first input's type."""

    node: str
    operator: str
    provider: str
    dtype: str


@dataclass(frozen=True)
class Profile:
    """What one run of a model executed, in order, and the metadata of its file."""

    events: list[KernelEvent]
    metadata: dict[str, str]


def session_options(threads: int, *, spinning: bool = True) -> onnxruntime.SessionOptions:
    """Options for one model run at a time on ``threads`` threads.

    Args:
        spinning: let idle threads wait actively. Lowers latency, and charges waiting as CPU time; off for measuring.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return options


def profile_kernels(
    model: Path,
    options: onnxruntime.SessionOptions,
    feeds: Mapping[str, NDArray[Any]],
    providers: Sequence[Any] = CPU_ONLY,
) -> Profile:
    """Run a model once in a session of its own with profiling on. Feeds that the graph does not take are left out.

    ``options`` may have been used for another session before, and is left as it was.
    """
    with tempfile.TemporaryDirectory(prefix="effc-profile-") as folder:
        before = options.enable_profiling, options.profile_file_prefix
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "run"))
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=list(providers))
        finally:
            options.enable_profiling, options.profile_file_prefix = before
        session.run(None, {argument.name: feeds[argument.name] for argument in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [_event(entry) for entry in events if entry.get("name", "").endswith("_kernel_time")]
    return Profile(kernels, session.get_modelmeta().custom_metadata_map)


def _event(entry: dict[str, Any]) -> KernelEvent:
    arguments = entry.get("args", {})
    inputs = arguments.get("input_type_shape") or [{}]
    return KernelEvent(
        node=entry["name"].removesuffix("_kernel_time"),
        operator=arguments.get("op_name", ""),
        provider=arguments.get("provider", ""),
        dtype=next(iter(inputs[0]), ""),
    )


def first_line(error: Exception) -> str:
    """What ONNX Runtime says of an error, in a line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", line)
