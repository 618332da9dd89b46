"""Running a problem of attention on the CUDA kernels under the emulator, whatever its form."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from native_cases import CallSizes
from numpy.typing import NDArray

NUMBERS: dict[str, Any] = {
    "float": np.float32,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
}
# Of the largest number of the expected output: what the plan of the kernels allows.
TOLERANCE = {"float": 1e-5, "half": 1e-3, "bfloat16": 1e-2, "e4m3": 0.05}


class Refused(Exception):
    """The kernels do not take the problem, and say why."""


class Stopped(Exception):
    """The emulator or a sanitizer has stopped the kernel."""


def rounded(tensor: NDArray[Any], number: str) -> NDArray[np.float32]:
    """To the numbers that the kernels are given, so that the reference gets the same."""
    return tensor.astype(NUMBERS[number]).astype(np.float32)


def run_problem(
    program: Path,
    sizes: CallSizes,
    number: str,
    fields: Mapping[str, object],
    feeds: Mapping[str, NDArray[Any]],
    others: Iterable[NDArray[Any]],
    options: Sequence[str],
    output_number: str | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, int]]:
    """Output ``[batch, q_len, num_heads * head_dim]``, the fp32 numbers behind it, and the emulator's counters.

    ``fields`` are those of the form; ``others`` the tensors that its program reads behind query, key and value.
    The output has ``number`` too, unless there is an ``output_number``.
    """
    kind = np.dtype(NUMBERS[number])
    output_kind = np.dtype(NUMBERS[output_number or number])
    fields = {
        **{name: getattr(sizes, name) for name in ("batch", "q_len", "num_heads", "head_dim")},
        "kv_len": sizes.keys,
        "kv_num_heads": sizes.kv_heads,
        "causal": int(sizes.causal),
        "number": list(NUMBERS).index(number),
        **fields,
    }
    tensors = [*(feeds[name].astype(kind) for name in ("query", "key", "value")), *others]
    with tempfile.TemporaryDirectory() as directory:
        problem, result = Path(directory) / "problem", Path(directory) / "result"
        lines = "".join(f"{name} {value}\n" for name, value in fields.items())
        problem.write_bytes(b"".join([lines.encode(), b"data\n", *(tensor.tobytes() for tensor in tensors)]))
        done = subprocess.run([str(program), str(problem), str(result), *options], capture_output=True, text=True)
        if done.returncode == 2:
            raise Refused(done.stderr.strip())
        if done.returncode != 0:
            raise Stopped(done.stderr.strip())
        data = result.read_bytes()
    shape = (sizes.batch, sizes.q_len, sizes.num_heads * sizes.head_dim)
    output = np.frombuffer(data, output_kind, int(np.prod(shape)))
    rest = np.frombuffer(data, np.float32, offset=output.nbytes)
    return output.astype(np.float32).reshape(shape), rest, json.loads(done.stdout)


def check_close(found: NDArray[Any], wanted: NDArray[Any], number: str, what: object) -> None:
    """Hold what the kernels found, given such numbers, to what they should have; ``what`` it is, for the message."""
    largest = max(np.abs(wanted).max(initial=0.0), 1e-30)
    error = np.abs(found - wanted).max(initial=0.0) / largest
    assert error <= TOLERANCE[number], f"relative error {error:.2e} of {what}"
