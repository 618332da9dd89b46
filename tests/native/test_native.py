"""Finding the library, and what kind of library it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from effc.errors import MissingDependencyError
from effc.plugins import native


def test_override(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFC_NATIVE", raising=False)
    monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(library))
    assert native.library_path() == library.resolve()
    assert native.native_library() == str(library.resolve())
    for isa in ("portable", native.isa()):
        monkeypatch.setenv("EFFC_ISA", isa)
        assert native.isa() == isa


def test_unknown_isa(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(library))
    monkeypatch.setenv("EFFC_ISA", "sparc")
    with pytest.raises(MissingDependencyError, match="'sparc'"):
        native.isa()


def test_disabled(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(library))
    monkeypatch.setenv("EFFC_NATIVE", "0")
    assert native.library_path() is None
    with pytest.raises(MissingDependencyError, match="Unset"):
        native.native_library()


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_NATIVE_LIBRARY", str(tmp_path / "nothing.so"))
    assert native.library_path() is None
    with pytest.raises(MissingDependencyError, match="not a file"):
        native.native_library()
    monkeypatch.delenv("EFFC_NATIVE_LIBRARY")
    monkeypatch.setattr(native, "_DIRECTORY", tmp_path)
    with pytest.raises(MissingDependencyError, match="pip install"):
        native.native_library()


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_amx", "avx512_bf16", "portable"])
def test_kernels_share_no_code_between_instruction_sets(library: Path, isa: str) -> None:
    """A function that the linker may merge with another file's would be run on CPUs it was not compiled for."""
    objects = list(library.parent.glob(f"CMakeFiles/effc_kernels.dir/cpp_plugins/cpu/attention_{isa}.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object file or no nm")
    symbols = subprocess.run(["nm", "-C", str(objects[0])], capture_output=True, text=True, check=True).stdout
    merged = [line for line in symbols.splitlines() if line[17:18] in set("WVuwv")]
    assert merged == []
    exported = [line for line in symbols.splitlines() if line[17:18] == "T"]
    assert len(exported) == 1 and f"{isa}_kernels" in exported[0]
