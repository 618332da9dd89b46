"""The command line of a Triton server for a repository, as a script that lies in it."""

from __future__ import annotations

from collections.abc import Sequence

from effc.serving.requirements import REQUIREMENTS_NAME

LAUNCH_NAME = "launch.sh"
CONTAINER = "nvcr.io/nvidia/tritonserver:25.06-py3"
CACHE_BYTES = 256 << 20
EXIT_SECONDS = 20


def server_flags(*, cache: bool) -> list[str]:
    """Flags that do not depend on where the server runs.

    Args:
        cache: a model asks for the response cache.
    """
    flags = [f"--exit-timeout-secs={EXIT_SECONDS}", "--strict-readiness=true"]
    return [*flags, *([f"--cache-config=local,size={CACHE_BYTES}"] if cache else [])]


def tensorrt_flags(plugins: Sequence[str], host_code: bool) -> list[str]:
    """Flags for Triton's TensorRT backend, which loads plugins for all its models.

    Args:
        plugins: paths of plugin libraries.
        host_code: a plan holds code of the CPU's: a plugin library, or a runtime for other releases of TensorRT.
    """
    flags = [f"--backend-config=tensorrt,plugins={';'.join(plugins)}"] if plugins else []
    return [*flags, *(["--backend-config=tensorrt,version-compatible=true"] if host_code else [])]


def launch_script(*, cache: bool, plugins: Sequence[str] = (), host_code: bool = False, gpus: bool = False) -> str:
    """A shell script that starts ``tritonserver`` from PATH on the directory that it lies in.

    It listens on this machine only; ADDRESS=0.0.0.0 opens it to others.

    Args:
        plugins: TensorRT plugin libraries, by their paths in the repository.
        host_code: see :func:`tensorrt_flags`.
        gpus: a model runs on one.
    """
    libraries = [f"$repository/{library}" for library in plugins]
    flags = [*server_flags(cache=cache), *(f'"{flag}"' for flag in tensorrt_flags(libraries, host_code))]
    lines = " \\\n  ".join(flags)
    # Triton opens plugin libraries and asks them for nothing.
    registers = "\nexport EFFC_REGISTER_PLUGINS=1" if plugins else ""
    return f"""#!/bin/sh
# Starts Triton on this repository; further flags of tritonserver may be given. In a container:
#   docker run --rm --network host{" --gpus all" if gpus else ""} -v "$PWD":/models {CONTAINER} \\
#     sh -c 'pip install -r /models/{REQUIREMENTS_NAME} && /models/{LAUNCH_NAME}'
set -eu
repository=$(cd "$(dirname "$0")" && pwd)
address=${{ADDRESS:-127.0.0.1}}
# Nothing may be written into the repository, whose files are hashed.
export PYTHONDONTWRITEBYTECODE=1{registers}
exec tritonserver --model-repository="$repository" \\
  --http-address="$address" --grpc-address="$address" --metrics-address="$address" \\
  --http-port="${{HTTP_PORT:-8000}}" --grpc-port="${{GRPC_PORT:-8001}}" --metrics-port="${{METRICS_PORT:-8002}}" \\
  {lines} "$@"
"""
