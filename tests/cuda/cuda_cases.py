"""Running a case of effc::SparseAttention on the CUDA kernels under the emulator, and holding it to the reference."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from native_cases import OPTIONAL, Case, reference
from numpy.typing import NDArray

NUMBERS: dict[str, Any] = {"float": np.float32, "half": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Of the largest number of the expected output: what the plan of the kernels allows.
TOLERANCE = {"float": 1e-5, "half": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class CudaCase(Case):
    """One call of the kernels. Queries, keys and values are rounded to ``number`` before they go anywhere.

    ``key_blocks [batch, kv_heads, query blocks, count]``: what content-based selection chose.
    """

    number: str = "half"
    key_blocks: NDArray[np.int32] | None = field(default=None, repr=False)
    block_size: int = 0

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        feeds = super().inputs()
        for name in ("query", "key", "value"):
            feeds[name] = feeds[name].astype(NUMBERS[self.number]).astype(np.float32)
        return feeds


@dataclass(frozen=True)
class Outcome:
    output: NDArray[np.float32]
    log_sum_exp: NDArray[np.float32]
    counters: dict[str, int]


class Refused(Exception):
    """The kernels do not take the problem, and say why."""


class Stopped(Exception):
    """The emulator or a sanitizer has stopped the kernel."""


def write_problem(path: Path, case: CudaCase, feeds: dict[str, NDArray[np.generic]]) -> None:
    fields = {
        "batch": case.batch,
        "q_len": case.q_len,
        "kv_len": case.keys,
        "num_heads": case.num_heads,
        "kv_num_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "bias_reach": case.bias_reach or 0,
        "scale": repr(float(case.used_scale)),
        "number": list(NUMBERS).index(case.number),
        "pattern": case.pattern,
        "causal": int(case.causal),
        "log_sum_exp": 1,
        "key_block_count": 0 if case.key_blocks is None else case.key_blocks.shape[-1],
        "block_lists": 0 if case.key_blocks is None else int(np.prod(case.key_blocks.shape[:-1])),
        "block_size": case.block_size,
        **{name: int(name in feeds) for name in OPTIONAL},
    }
    with path.open("wb") as file:
        file.write("".join(f"{name} {value}\n" for name, value in fields.items()).encode() + b"data\n")
        for name in ("query", "key", "value", *OPTIONAL):
            if name not in feeds:
                continue
            kind = NUMBERS[case.number] if name in ("query", "key", "value") else feeds[name].dtype
            file.write(feeds[name].astype(kind).tobytes())
        if case.key_blocks is not None:
            file.write(case.key_blocks.astype(np.int32).tobytes())


def run(program: Path, case: CudaCase, *options: str, feeds: dict[str, NDArray[np.generic]] | None = None) -> Outcome:
    """Run one case; ``options`` are the program's."""
    with tempfile.TemporaryDirectory() as directory:
        problem, result = Path(directory) / "problem", Path(directory) / "result"
        write_problem(problem, case, feeds if feeds is not None else case.inputs())
        done = subprocess.run([str(program), str(problem), str(result), *options], capture_output=True, text=True)
        if done.returncode == 2:
            raise Refused(done.stderr.strip())
        if done.returncode != 0:
            raise Stopped(done.stderr.strip())
        data = result.read_bytes()
    rows = case.batch * case.q_len * case.num_heads
    kind = np.dtype(NUMBERS[case.number])
    output = np.frombuffer(data, kind, rows * case.head_dim)
    statistics = np.frombuffer(data, np.float32, rows, offset=output.nbytes)
    return Outcome(
        output.astype(np.float32).reshape(case.batch, case.q_len, case.num_heads * case.head_dim),
        statistics.reshape(case.batch, case.num_heads, case.q_len),
        json.loads(done.stdout),
    )


def check(program: Path, case: CudaCase, *options: str) -> Outcome:
    """Run one case and compare output and log-sum-exp with the reference."""
    outcome = run(program, case, *options)
    expected, expected_statistics = reference(case)
    largest = max(np.abs(expected).max(initial=0.0), 1e-30)
    error = np.abs(outcome.output - expected).max(initial=0.0) / largest
    assert error <= TOLERANCE[case.number], f"relative error {error:.2e} of {case}"
    np.testing.assert_allclose(outcome.log_sum_exp, expected_statistics, rtol=0, atol=1e-4, err_msg=str(case))
    return outcome
