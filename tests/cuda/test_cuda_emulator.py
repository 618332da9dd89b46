"""The emulator computes what the hardware would, and notices what the hardware would not forgive."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_cases import CudaCase, check, reference, run
from emulated_run import TOLERANCE, Stopped

CASE = CudaCase("local:40|sinks:3", q_len=150, head_dim=64)
E4M3_CASE = CudaCase("local:40|sinks:3", q_len=150, head_dim=64, number="e4m3")


def run_selftest(program: Path, name: str) -> tuple[int, str]:
    done = subprocess.run([str(program), name], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["matrix_product", "e4m3_product", "e4m3_rounding", "bank_conflicts", "barrier"])
def test_right_kernels_run(selftest: Path, name: str) -> None:
    assert run_selftest(selftest, name) == (0, "")


def test_missing_barrier_gives_wrong_numbers(selftest: Path) -> None:
    assert run_selftest(selftest, "missing_barrier")[0] == 1


@pytest.mark.parametrize(
    "name, says",
    [
        ("barriers_at_different_places", "different __syncthreads"),
        ("return_before_barrier", "deadlock"),
        ("shuffle_without_some", "deadlock"),
        ("disagree", "disagree"),
        ("copy_misaligned", "not aligned"),
        ("copy_and_return", "before its copies were waited for"),
        ("write_behind", "wrote behind its shared memory"),
    ],
)
def test_wrong_kernels_are_stopped(selftest: Path, name: str, says: str) -> None:
    status, message = run_selftest(selftest, name)
    assert status == 99
    assert says in message


def goes_wrong(program: Path, case: CudaCase, *options: str) -> bool:
    """Whether the kernel is stopped or its numbers are wrong."""
    try:
        outcome = run(program, case, *options)
    except Stopped:
        return True
    expected = reference(case)[0]
    return not abs(outcome.output - expected).max() <= TOLERANCE[case.number] * abs(expected).max()


BOTH = pytest.mark.parametrize("case", [CASE, E4M3_CASE], ids=["half", "e4m3"])


@BOTH
def test_without_mistakes_nothing_goes_wrong(emulated: Path, case: CudaCase) -> None:
    check(emulated, case)
    assert not goes_wrong(emulated, case)


@BOTH
@pytest.mark.parametrize("order", [[], ["reverse"], ["shuffled=5"]], ids=["forward", "reverse", "shuffled"])
def test_forgotten_barriers_go_wrong(emulated: Path, order: list[str], case: CudaCase) -> None:
    assert goes_wrong(emulated, case, "forget_barriers", *order)


@BOTH
def test_forgotten_waits_go_wrong_if_copies_land_late(emulated: Path, case: CudaCase) -> None:
    assert goes_wrong(emulated, case, "forget_waits")


def test_forgotten_waits_are_hidden_if_copies_land_at_once(emulated: Path) -> None:
    """Why both ways are tested."""
    assert not goes_wrong(emulated, CASE, "forget_waits", "eager")


@BOTH
def test_overrun_of_shared_memory_is_stopped(emulated: Path, case: CudaCase) -> None:
    with pytest.raises(Stopped, match="wrote behind its shared memory"):
        run(emulated, case, "missing_shared_bytes=32")
