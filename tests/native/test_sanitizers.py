"""The native self-test, plain and under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from native_build import cmake_build


def selftest(name: str, sanitize: str, rounds: int) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    directory = cmake_build(name, "-DEFFC_BUILD_TESTS=ON", f"-DEFFC_SANITIZE={sanitize}", target="effc_selftest")
    result = subprocess.run([str(directory / "effc_selftest"), str(rounds), "7"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok" in result.stdout


def test_selftest() -> None:
    selftest("release", "", 30)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address;undefined", "thread"])
def test_selftest_under_sanitizers(sanitize: str) -> None:
    selftest(sanitize.replace(";", "-"), sanitize, 40)
