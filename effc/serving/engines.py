"""Write a model repository for TensorRT engines, whoever built them.

An engine file does not say what Triton has to know of it: the caller does, or effc.json (:func:`engine_set`). The
configuration is checked by Triton's schema and the files by their hashes; whether an engine runs shows on the GPU that
it was built for.
"""

from __future__ import annotations

from pathlib import Path

from effc.exporters.triton_config import Instances
from effc.serving.engine_files import EngineSet, Profile, engine_model, engine_set
from effc.serving.options import ServingOptions, check_name
from effc.serving.plan import Plan
from effc.serving.repository import Deployed, write_plan

__all__ = ["EngineSet", "Profile", "engine_set", "write_engines"]


def write_engines(
    engines: EngineSet,
    repository: str | Path,
    name: str,
    *,
    max_batch: int,
    server_tensorrt: str,
    gpus: tuple[int, ...] = (),
    batch_delay_us: int = 500,
) -> Deployed:
    """Add engines to a model repository as the next version of ``name``.

    Plugins are copied beside the engines, and the launch script names them: Triton loads them for the whole backend.

    Args:
        server_tensorrt: version of TensorRT in the server that is to run them; an engine runs in that version only.
        gpus: numbers of the GPUs; all of them if empty.

    Raises:
        UsageError: if versions, shapes or names do not fit each other.
        OutputError: see :func:`effc.serving.repository.write_repository`.
    """
    options = ServingOptions(
        name=check_name(name),
        backend="tensorrt",
        max_batch=max_batch,
        instances=Instances("gpu", 1, gpus),
        batch_delay_us=batch_delay_us,
        server_tensorrt=server_tensorrt,
    )
    model = engine_model(name, engines, options)
    plugins = tuple((name, path.name) for path in engines.plugins)
    plan = Plan(name, "tensorrt", (model,), plugins=plugins, host_code=engines.host_code)
    return write_plan(plan, repository, options)
