"""``compile``: which stages run, in which order; all or nothing.

Each stage is a file ``pipeline_*.py``, which times, probes and records the passes that it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc.compiler.artifact import check_output, staged, write_manifest
from effc.compiler.artifact_files import MODEL_NAME
from effc.compiler.engine_check import check_engine
from effc.compiler.manifest import Manifest
from effc.compiler.pipeline_describe import describe, save_source
from effc.compiler.pipeline_graph import export, fuse, quantize
from effc.compiler.pipeline_job import load_job
from effc.compiler.pipeline_measure import measure
from effc.compiler.pipeline_model import change_model
from effc.compiler.pipeline_targets import make_engines, make_generation, make_torch_program
from effc.compiler.progress import Progress
from effc.compiler.recipe import Recipe, build_recipe, default_output, load_recipe, merge
from effc.compiler.requirements import check_measured, unmet
from effc.errors import RequirementError


@dataclass(frozen=True)
class Artifact:
    """A finished compile.

    Attributes:
        path: the artifact directory.
        manifest: what ``effc.json`` holds.
        unmet: requirements that the result misses and layers that could not be rewritten, as full sentences.
    """

    path: Path
    manifest: Manifest
    unmet: tuple[str, ...] = ()


def compile(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    attention: str | Mapping[str, Any] | None = None,
    quantization: str | Mapping[str, Any] | None = None,
    prune: str | Sequence[str | Mapping[str, Any]] | None = None,
    low_rank: float | str | Mapping[str, Any] | None = None,
    target: str | None = None,
    task: str | None = None,
    revision: str | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overwrite: bool = False,
    check: bool = False,
    progress: Progress | None = None,
    calibration: Iterable[Any] | None = None,
    **sections: Mapping[str, Any],
) -> Artifact:
    """Compile a Hugging Face model into an artifact directory.

    Args:
        model: local directory, GGUF file or hub name.
        output: the directory to make; ``<model name>.effc`` in the working directory when None.
        attention: pattern text such as ``local:256``, or the recipe's section.
        quantization: ``none``, ``int8`` or another mode, or the recipe's section.
        prune: texts such as ``heads:0.25`` and ``2:4``, or the recipe's list.
        low_rank: ``0.5`` (share of parameters), ``rank:64``, ``energy:0.95``, or the recipe's section.
        target: what the artifact runs on.
        task: detected from the config when None.
        revision: branch, tag or commit on the hub.
        recipe: a recipe file or its values; the other arguments override it.
        overwrite: replace an artifact that is already at ``output``.
        check: raise :class:`RequirementError` if a requirement is missed; the artifact stays.
        progress: told of every step.
        calibration: what activations are calibrated on, in place of the recipe's file: any iterable of texts, rows such
            as ``{"text": "..."}``, or inputs of the model by name.
        sections: further recipe sections, such as ``bench={"enabled": False}``.

    Raises:
        UsageError, SourceModelError, DataError, PreconditionError, OutputError, PassFailedError: see each; nothing is
            left at ``output`` then.
    """
    flags: dict[str, Any] = {key: dict(value) for key, value in sections.items()}
    spec = {"path": str(model) if model is not None else None, "task": task, "revision": revision}
    flags["model"] = {key: value for key, value in spec.items() if value is not None}
    given = {"attention": attention, "quantization": quantization, "prune": prune, "low_rank": low_rank}
    flags |= {key: value for key, value in {**given, "target": target}.items() if value is not None}
    whole = _whole_recipe(recipe, flags)
    artifact = run(
        whole,
        Path(output or default_output(whole)),
        overwrite=overwrite,
        progress=progress,
        calibration_items=calibration,
    )
    if check and artifact.unmet:
        raise RequirementError(" ".join(artifact.unmet), f"The artifact is at '{artifact.path}'.")
    return artifact


def _whole_recipe(recipe: str | Path | Mapping[str, Any] | Recipe | None, flags: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    base = load_recipe(recipe) if isinstance(recipe, (str, Path)) else dict(recipe or {})
    return build_recipe(merge(base, flags), origin=f"'{recipe}'" if isinstance(recipe, (str, Path)) else "the recipe")


def run(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration_items: Iterable[Any] | None = None,
) -> Artifact:
    """Compile as the recipe says; see :func:`compile`."""
    check_output(output, overwrite)
    check_measured(recipe)
    engine = check_engine(recipe, calibration_items is not None)
    job = load_job(recipe, engine, calibration_items, progress)
    changed = change_model(job)
    exported = export(job, changed)
    with staged(output, overwrite) as staging:
        graph = staging / MODEL_NAME
        fuse(job, exported, graph)
        quantized = quantize(job, graph)
        generation = make_generation(job, changed.layers, exported, quantized, staging)
        engines = make_engines(job, changed.layers, exported, quantized, staging)
        make_torch_program(job, staging)
        checkpoint = save_source(job, staging)
        manifest = describe(job, changed, exported, quantized, generation, engines, checkpoint, staging)
        # Verify and bench read it.
        write_manifest(staging, manifest)
        measure(job, changed, exported, staging, manifest)
        write_manifest(staging, manifest)
    if progress:
        progress("done", 1, 1)
    return Artifact(output, manifest, tuple(unmet(recipe, manifest, changed.rewritten)))
