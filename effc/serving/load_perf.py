"""Load tests of models that take tensors, with NVIDIA's perf_analyzer.

It is given real inputs: texts that the server's own tokenizer model encodes. Where the server has none, zeros of the
texts' lengths.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc.errors import EffcError, MissingDependencyError, UsageError
from effc.serving.load_endpoint import Endpoint
from effc.serving.load_result import Latencies, LoadResult
from effc.serving.packaged import packaged_perf_analyzer

PROGRAM = "perf_analyzer"
_MODEL, _TOKENIZER = "_model", "_tokenizer"
_DISTINCT = 100
_START_S = 60
_ONES = ("attention_mask", "pixel_mask")


@dataclass(frozen=True)
class PerfAnalyzer:
    """How perf_analyzer is started: the program, and variables to set."""

    program: str
    environment: Mapping[str, str]


def find_perf_analyzer() -> PerfAnalyzer | None:
    """perf_analyzer in PATH, or beside the packaged server."""
    program = shutil.which(PROGRAM)
    if program is not None:
        return PerfAnalyzer(program, {})
    packaged = packaged_perf_analyzer()
    return None if packaged is None else PerfAnalyzer(str(packaged[0]), packaged[1])


def perf_test(
    endpoint: Endpoint,
    model: str,
    texts: Sequence[str],
    *,
    requests: int,
    concurrency: int,
    rate: float | None,
    timeout_s: float,
) -> LoadResult:
    """Let perf_analyzer send requests of one row and read what it measured.

    Args:
        texts: that requests are made of, in turns.
        rate: requests per second that come at random times; as fast as the clients get answers when None.
        timeout_s: for one answer.

    Raises:
        MissingDependencyError: if there is no perf_analyzer here; says how to get it.
        UsageError: if the model answers a request more than once.
        EffcError: if it fails; with its own words.
    """
    config = endpoint.config(model)
    if config.get("model_transaction_policy", {}).get("decoupled"):
        raise UsageError(f"'{model}' streams its answers, which effc measures itself.", "Leave out --perf-analyzer.")
    analyzer = find_perf_analyzer()
    if analyzer is None:
        raise MissingDependencyError(
            f"'{model}' is measured with NVIDIA's {PROGRAM}, and it is not on this machine.",
            "Install it with the packaged server: effc serve --install-server. Or put it into PATH.",
        )
    with tempfile.TemporaryDirectory(prefix="effc-perf-") as folder:
        data, result = Path(folder) / "data.json", Path(folder) / "result.json"
        data.write_text(json.dumps({"data": _inputs(endpoint, model, config, texts[:_DISTINCT])}), encoding="utf-8")
        load = ["--request-rate-range", f"{rate:g}", "--request-distribution", "poisson"] if rate is not None else [
            "--concurrency-range", str(min(concurrency, requests))
        ]  # fmt: skip
        command = [
            analyzer.program, "-m", model, "-u", f"{endpoint.host}:{endpoint.port}", "-i", endpoint.scheme, "-b", "1",
            "--input-data", str(data), "--request-count", str(requests), "--profile-export-file", str(result), *load,
        ]  # fmt: skip
        _run(analyzer, command, _START_S + timeout_s * requests)
        exported = json.loads(result.read_text(encoding="utf-8"))
    return _result(model, "closed" if rate is None else "open", exported["experiments"][0]["requests"])


def _inputs(endpoint: Endpoint, model: str, config: Mapping[str, Any], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Requests as perf_analyzer reads them, without the batch dimension."""
    wanted = {entry["name"]: entry for entry in config["input"]}
    if set(wanted) == {"text"}:
        return [{"text": [text]} for text in texts]
    tokenizer = model.removesuffix(_MODEL) + _TOKENIZER
    if model.endswith(_MODEL) and tokenizer in endpoint.models():
        encoded = [endpoint.infer_text(tokenizer, text) for text in texts]
        return [
            {name: {"content": values, "shape": shape} for name, (values, shape) in one.items() if name in wanted}
            for one in encoded
        ]
    return [
        {name: _filled(name, entry, len(text.split())) for name, entry in wanted.items() if not entry.get("optional")}
        for text in texts
    ]


def _filled(name: str, entry: Mapping[str, Any], length: int) -> dict[str, Any]:
    shape = [length if int(size) == -1 else int(size) for size in entry["dims"]]
    count = 1
    for size in shape:
        count *= size
    return {"content": [int(name in _ONES)] * count, "shape": shape}


def _run(analyzer: PerfAnalyzer, command: Sequence[str], timeout_s: float) -> None:
    environment = dict(os.environ)
    for name, value in analyzer.environment.items():
        environment[name] = ":".join(filter(None, (value, environment.get(name, ""))))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise EffcError(f"{PROGRAM} did not end within {timeout_s:.0f} s.", "Give fewer --requests.") from None
    except OSError as error:
        raise EffcError(f"{PROGRAM} cannot be started: {error}.", "Install it again.") from None
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise EffcError(f"{PROGRAM} failed: {' '.join(said)[-500:].rstrip('.')}.", "Look at the server's log.")


def _result(model: str, mode: str, requests: Sequence[Mapping[str, Any]]) -> LoadResult:
    answered = [entry for entry in requests if entry["response_timestamps"]]
    starts = [entry["timestamp"] / 1e9 for entry in answered]
    ends = [entry["response_timestamps"][-1] / 1e9 for entry in answered]
    seconds = max(ends) - min(starts) if answered else 0.0
    taken = [end - start for start, end in zip(starts, ends, strict=True)]
    failed = len(requests) - len(answered)
    return LoadResult(
        model=model,
        mode=mode,
        requests=len(requests),
        failed=failed,
        seconds=seconds,
        throughput=len(answered) / seconds if seconds else 0.0,
        latency=Latencies.of(taken) if taken else None,
        first_token=None,
        tokens_per_s=0.0,
        errors={"no answer": failed} if failed else {},
        samples=tuple((_length(entry), time) for entry, time in zip(answered, taken, strict=True)),
        tool=PROGRAM,
    )


def _length(entry: Mapping[str, Any]) -> int:
    """Tokens of a request, or words of its text."""
    inputs = entry.get("request_inputs", {})
    if "text" in inputs:
        return len(str(inputs["text"]).split())
    return max((len(values) if isinstance(values, list) else 1 for values in inputs.values()), default=0)
