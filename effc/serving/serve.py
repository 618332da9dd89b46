"""``effc serve``: from an artifact to a server that answers, in one call."""

from __future__ import annotations

import shlex
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from effc.compiler.artifact_files import read_manifest
from effc.errors import UsageError
from effc.exporters.tensorrt_flavours import FLAVOURS
from effc.serving.launch import LAUNCH_NAME
from effc.serving.options import ServingOptions
from effc.serving.packaged import ServerProgram
from effc.serving.repository import check_repository, write_repository
from effc.serving.repository_record import deployment, engine_flags, wants_cache
from effc.serving.requirements import REQUIREMENTS_NAME
from effc.serving.server import Ports, Server, find_server

_LANGUAGE_MODEL = "causal-lm"
# A server that crashes so often would only do so again.
_CRASHES, _CRASHES_WITHIN_S = 5, 60


@dataclass(frozen=True)
class Serving:
    """A server that is ready.

    Attributes:
        name: of the model that clients ask.
        kind: of the server, ``installed`` or ``packaged``.
        notes: what the user should know, as full sentences.
        curl, python: a request as a command line and as a program.
    """

    server: Server
    name: str
    kind: str
    notes: tuple[str, ...]
    curl: str
    python: str

    def run(self, told: Callable[[str], None]) -> int:
        """Wait until the server ends; one that a signal ended (a crash) is started again, up to 4 times a minute.

        Args:
            told: called with what has happened.

        Returns:
            its exit status.
        """
        crashes: deque[float] = deque(maxlen=_CRASHES)
        while True:
            status = self.server.wait()
            crashes.append(time.monotonic())
            if status >= 0 or (len(crashes) == _CRASHES and crashes[-1] - crashes[0] < _CRASHES_WITHIN_S):
                return status
            told(f"The server was ended by {signal.Signals(-status).name}; starting it again.")
            self.server.start()
            told("It is ready again.")


@contextmanager
def serve(
    artifact: str | Path,
    options: ServingOptions | None = None,
    *,
    repository: str | Path | None = None,
    ports: Ports | None = None,
    address: str = "127.0.0.1",
    timeout_s: float = 120,
) -> Iterator[Serving]:
    """Write a repository for an artifact and run a server on it until the block ends.

    Args:
        repository: where to write it; an artifact that it has already is added as a new version. A temporary directory
            when None.
        ports: 8000 to 8002 when None.
        address: this machine only, unless another one is given.
        timeout_s: how long loading may take.

    Raises:
        OutputError, UsageError: see :func:`write_repository`.
        MissingDependencyError: if there is no server here; says how to get one.
        EffcError: if the server does not start; ends with what its log says.
    """
    with tempfile.TemporaryDirectory(prefix="effc-serve-") as scratch:
        place = Path(repository) if repository is not None else Path(scratch) / "repository"
        # Before any work is done: a machine without a server should not take long to tell.
        program = find_server(place)
        _check_can_run(program, artifact, options)
        deployed = write_repository(artifact, place, options)
        check_repository(place)
        where = ports or Ports(8000, 8001, 8002)
        with Server(
            place,
            program,
            ports=where,
            address=address,
            cache=wants_cache(place),
            extra=engine_flags(place),
            timeout_s=timeout_s,
        ) as server:
            task = deployment(place, deployed.name)["task"]
            curl, python = example_requests(server.http, deployed.name, task, len(deployed.models) == 1)
            yield Serving(server, deployed.name, program.kind, deployed.notes, curl, python)


def _check_can_run(program: ServerProgram, artifact: str | Path, options: ServingOptions | None) -> None:
    """The packaged server has no GPU and no TensorRT."""
    engines = read_manifest(artifact).engines
    placed = (options or ServingOptions()).placed(engines=engines is not None)
    if placed.backend == "tensorrt" and engines is not None and program.kind == "packaged":
        where = f"in NVIDIA's container with {FLAVOURS[engines.flavour].name} {engines.version}"
        here = "--backend python serves the ONNX graph here."
        if engines.writes:
            where = f"in NVIDIA's container, with the packages of its {REQUIREMENTS_NAME}"
            here = "an artifact of --target=onnxruntime writes text here."
        raise UsageError(
            "This artifact holds TensorRT engines, and the packaged server runs on CPU.",
            f"Write a repository with effc triton and start its {LAUNCH_NAME} {where}; {here}",
        )


def example_requests(host: str, name: str, task: str, single: bool) -> tuple[str, str]:
    """A request to a model as a command line and as a program that needs the standard library only.

    Args:
        host: ``host:port`` of the HTTP endpoint.
        single: the model stands alone: it writes text, or takes tensors.
    """
    url = f"http://{host}/v2/models/{name}"
    if single and task != _LANGUAGE_MODEL:
        # Tensors are too many for an example; the description says which.
        return f"curl -s {url}", f"import urllib.request\nprint(urllib.request.urlopen({url!r}).read().decode())\n"
    if single:
        body = '{"text_input": "Once upon a time", "max_tokens": 32}'
        shown = 'answer["text_output"]'
    else:
        body = '{"text": "A good film."}'
        shown = 'answer["embedding"][:8]' if task == "feature-extraction" else "answer"
    curl = f"curl -s {url}/generate -d {shlex.quote(body)}"
    python = f"""import json, urllib.request
request = urllib.request.Request({url + "/generate"!r}, data={body!r}.encode())
answer = json.load(urllib.request.urlopen(request))
print({shown})
"""
    return curl, python
