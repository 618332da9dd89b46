"""The operators for ONNX Runtime's CUDA provider, as far as a machine without that provider shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from native_build import REPOSITORY, cmake_build

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
sys.path.insert(0, str(REPOSITORY / "tests"))

import cuda_build
from attention_cases import one_node_model

import effc
from effc.compiler.native_choice import library_for
from effc.errors import MissingDependencyError, UsageError
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def library() -> Path:
    missing = cuda_build.missing_tools()
    if missing is not None:
        pytest.skip(missing)
    folder = cmake_build("cuda-c", "-DEFFC_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86", target="effc_cuda")
    return folder / "libeffc_cuda.so"


@pytest.mark.slow
def test_the_library_needs_no_cuda_runtime_and_exports_one_function(library: Path) -> None:
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "libcudart" not in needed and "onnxruntime" not in needed
    names = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    assert {line.split()[-1] for line in names.splitlines() if line.split()[1] == "T"} == {"RegisterCustomOps"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["local:16", "linear:elu"])
def test_onnxruntime_knows_the_operators_afterwards(library: Path, form: str) -> None:
    """It takes the descriptions and asks for a kernel of the provider's, which a session for the CPU has not."""
    model = one_node_model(AttentionGeometry(parse_form(form), False, 4, 2, 8, 0.35), True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="Could not find an implementation for (Sparse|Linear)Attention"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_the_library_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.touch()
    monkeypatch.setenv("EFFC_CUDA_LIBRARY", str(file))
    assert effc.native_library(CUDA) == str(file)
    with monkeypatch.context() as context:
        context.setattr("effc.compiler.native_choice._loadable", lambda library: library)
        assert library_for([(CUDA, {"device_id": 0}), "CPUExecutionProvider"]) == file
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert library_for([CUDA]) is None, "it is empty"
    monkeypatch.setenv("EFFC_NATIVE", "0")
    with pytest.raises(MissingDependencyError, match="EFFC_NATIVE=0"):
        effc.native_library(CUDA)
    assert library_for([CUDA]) is None


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFC_NATIVE", raising=False)
    monkeypatch.setenv("EFFC_CUDA_LIBRARY", "/nowhere/lib.so")
    with pytest.raises(MissingDependencyError, match="EFFC_CUDA_LIBRARY names '/nowhere/lib.so'"):
        effc.native_library(CUDA)
    monkeypatch.delenv("EFFC_CUDA_LIBRARY")
    with pytest.raises(MissingDependencyError, match="--target effc_cuda"):
        effc.native_library(CUDA)
    with pytest.raises(UsageError, match="no kernels for 'MIGraphXExecutionProvider'"):
        effc.native_library("MIGraphXExecutionProvider")
    with pytest.warns(RuntimeWarning, match="Standard operators run instead"):
        assert library_for([CUDA]) is None
