"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import CudaCase, Stopped, check, run
from emulated_build import PROGRAM, SELFTEST, emulated_build

SANITIZERS = ["address;undefined", "thread"]
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
]


def build(sanitize: str) -> Path:
    return emulated_build("cuda-" + sanitize.replace(";", "-"), f"-DEFFC_SANITIZE={sanitize}")


@pytest.mark.slow
@pytest.mark.parametrize("ways", [[], ["reverse"], ["eager"], ["reverse", "eager"]], ids="-".join)
@pytest.mark.parametrize("sanitize", SANITIZERS)
def test_nothing_to_complain_about(sanitize: str, ways: list[str]) -> None:
    program = build(sanitize) / PROGRAM
    for case in CASES:
        check(program, case, *ways, "multiprocessors=16")


@pytest.mark.slow
def test_missing_barriers_are_races() -> None:
    with pytest.raises(Stopped, match="data race"):
        run(build("thread") / PROGRAM, CASES[0], "forget_barriers")


@pytest.mark.slow
def test_a_missing_barrier_is_a_race() -> None:
    done = subprocess.run([str(build("thread") / SELFTEST), "missing_barrier"], capture_output=True, text=True)
    assert "data race" in done.stderr
    assert "read_neighbour" in done.stderr, "and the report names the kernel"


@pytest.mark.slow
def test_overruns_are_found() -> None:
    with pytest.raises(Stopped, match="heap-buffer-overflow"):
        run(build("address;undefined") / PROGRAM, CASES[0], "missing_shared_bytes=32")
