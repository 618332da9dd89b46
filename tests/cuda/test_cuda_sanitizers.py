"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_cases
import linear_cases
import numpy as np
import pytest
from cuda_cases import CudaCase
from emulated_build import LINEAR, PROGRAM, SELFTEST, emulated_build
from emulated_run import Stopped
from linear_cases import LinearCase

SANITIZERS = ["address;undefined", "thread"]
WAYS = [[], ["reverse"], ["eager"], ["reverse", "eager"]]
MASK = np.random.default_rng(0).random((2, 131)) < 0.7
MARKS = np.random.default_rng(1).random((2, 131)) < 0.05
CASES = [
    CudaCase("local:20|random:1", q_len=131, num_heads=1, head_dim=64),
    CudaCase("dilated:5:9|sinks:3", True, 2, 70, 131, 4, 2, head_dim=80, key_mask=MASK, bias_reach=9, sloped=True),
    CudaCase("local:9|global:sep", False, 2, 131, num_heads=1, head_dim=96, marks=MARKS, number="bfloat16"),
    CudaCase("strided:9", True, 1, 1, 500, 8, 2, head_dim=128),
    CudaCase("block:16", q_len=70, num_heads=1, head_dim=256),
    CudaCase("dense", q_len=70, num_heads=1, head_dim=40),
    CudaCase("local:20|global:2", True, 2, 20, 131, 2, 1, key_mask=MASK, number="float"),
    CudaCase("dilated:5:9|sinks:3", True, 2, 70, 131, 4, 2, 80, key_mask=MASK, bias_reach=9, number="e4m3"),
    CudaCase("local:9|global:sep", False, 2, 131, None, 1, None, 64, marks=MARKS, number="e4m3", output="bfloat16"),
    CudaCase("strided:9", True, 1, 1, 500, 8, 2, 128, number="e4m3"),
    CudaCase("block:16", False, 1, 70, None, 1, None, 256, number="e4m3"),
]
LEFT_PADDED = np.arange(270)[None] >= 90
# Every kernel of linear attention: the sums of keys, their segments, the reading of both, for each head size and for
# scalars, and the step.
LINEAR_CASES = [
    LinearCase("elu", True, 1, 20, 270, 2, 1, 64, LEFT_PADDED, past=3, present=True),
    LinearCase("relu", False, 1, 70, 131, head_dim=80, number="bfloat16"),
    LinearCase("elu", True, 1, 10, 260, head_dim=128),
    LinearCase("relu", True, 1, 10, 260, head_dim=24),
    LinearCase("elu", False, 1, 65, 70, head_dim=96),
    LinearCase("relu", False, 1, 5, 70, head_dim=256, number="bfloat16"),
    LinearCase("elu", True, 1, 10, 260, head_dim=33, number="float"),
    LinearCase("elu", True, 2, 1, 1, 4, 2, 72, past=3, present=True),
    LinearCase("relu", True, 1, 1, 1, 2, 1, 33, past=3, present=True, number="float"),
]


def build(sanitize: str) -> Path:
    return emulated_build("cuda-" + sanitize.replace(";", "-"), f"-DEFFC_SANITIZE={sanitize}")


@pytest.mark.slow
@pytest.mark.parametrize("ways", WAYS, ids="-".join)
@pytest.mark.parametrize("sanitize", SANITIZERS)
def test_nothing_to_complain_about(sanitize: str, ways: list[str]) -> None:
    program = build(sanitize) / PROGRAM
    for case in CASES:
        cuda_cases.check(program, case, *ways, "multiprocessors=16")


@pytest.mark.slow
@pytest.mark.parametrize("ways", WAYS, ids="-".join)
@pytest.mark.parametrize("sanitize", SANITIZERS)
def test_nothing_to_complain_about_in_linear_attention(sanitize: str, ways: list[str]) -> None:
    program = build(sanitize) / LINEAR
    for case in LINEAR_CASES:
        linear_cases.check(program, case, *ways)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, run, case", [(PROGRAM, cuda_cases.run, CASES[0]), (LINEAR, linear_cases.run, LINEAR_CASES[1])]
)
def test_missing_barriers_are_races(program: str, run: Callable[..., Any], case: CudaCase | LinearCase) -> None:
    with pytest.raises(Stopped, match="data race"):
        run(build("thread") / program, case, "forget_barriers")


@pytest.mark.slow
def test_a_missing_barrier_is_a_race() -> None:
    done = subprocess.run([str(build("thread") / SELFTEST), "missing_barrier"], capture_output=True, text=True)
    assert "data race" in done.stderr
    assert "read_neighbour" in done.stderr, "and the report names the kernel"


@pytest.mark.slow
def test_overruns_are_found() -> None:
    with pytest.raises(Stopped, match="heap-buffer-overflow"):
        cuda_cases.run(build("address;undefined") / PROGRAM, CASES[0], "missing_shared_bytes=32")
