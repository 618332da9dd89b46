"""The emulator computes what the hardware would, and notices what the hardware would not forgive."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_cases import CudaCase, check, reference, run
from emulated_run import TOLERANCE, Stopped

CASE = CudaCase("local:40|sinks:3", q_len=150, head_dim=64)


def run_selftest(program: Path, name: str) -> tuple[int, str]:
    done = subprocess.run([str(program), name], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["matrix_product", "bank_conflicts", "barrier"])
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


def goes_wrong(program: Path, *options: str) -> bool:
    """Whether the kernel is stopped or its numbers are wrong."""
    try:
        outcome = run(program, CASE, *options)
    except Stopped:
        return True
    expected = reference(CASE)[0]
    return not abs(outcome.output - expected).max() <= TOLERANCE["half"] * abs(expected).max()


def test_without_mistakes_nothing_goes_wrong(emulated: Path) -> None:
    check(emulated, CASE)
    assert not goes_wrong(emulated)


@pytest.mark.parametrize("order", [[], ["reverse"], ["shuffled=5"]], ids=["forward", "reverse", "shuffled"])
def test_forgotten_barriers_go_wrong(emulated: Path, order: list[str]) -> None:
    assert goes_wrong(emulated, "forget_barriers", *order)


def test_forgotten_waits_go_wrong_if_copies_land_late(emulated: Path) -> None:
    assert goes_wrong(emulated, "forget_waits")


def test_forgotten_waits_are_hidden_if_copies_land_at_once(emulated: Path) -> None:
    """Why both ways are tested."""
    assert not goes_wrong(emulated, "forget_waits", "eager")


def test_overrun_of_shared_memory_is_stopped(emulated: Path) -> None:
    with pytest.raises(Stopped, match="wrote behind its shared memory"):
        run(emulated, CASE, "missing_shared_bytes=32")
