"""The models that serve an artifact's engines: what runs them, and how far the rest of the deployment has to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effc.errors import UsageError
from effc.serving.backend.version import sha256
from effc.serving.engine_files import EngineSet, engine_model, engine_set, graphs_of
from effc.serving.engine_shares import LEAST_TRITON
from effc.serving.options import ServingOptions
from effc.serving.plan import Opened, PlannedModel, open_artifact, warm_ups
from effc.serving.plan_text import text_length

_CHANGES_ANSWERS = ("attention", "quantization", "positions", "prune", "low_rank", "recover")
"""Sections of a recipe that say what a model computes."""


@dataclass(frozen=True)
class FittedEngines:
    """Engines of one or several artifacts, and options that fit them.

    Attributes:
        notes: what the user should know, as full sentences.
    """

    engines: EngineSet
    options: ServingOptions
    notes: tuple[str, ...]


def fit_engines(opened: Opened, options: ServingOptions, text: bool) -> FittedEngines:
    """Gather the engines and fit batch and length to their profiles.

    Args:
        text: clients send text.

    Raises:
        UsageError: if there are none that Triton runs, or artifacts or options do not fit each other.
        OutputError: if an artifact is damaged.
    """
    record = opened.manifest.engines
    if record is None:
        raise UsageError(
            f"'{opened.path}' holds no engines.", "Compile with --target=tensorrt, or leave --backend out."
        )
    engines, notes = _gather(opened, options.engines)
    engines = replace(engines, cuda_graphs=graphs_of(options.cuda_graphs, engines))
    widest = engines.widest
    if widest.batch < options.max_batch:
        notes.append(
            f"--max-batch {options.max_batch} was lowered to {widest.batch}: the engines take no more rows of the "
            "longest inputs."
        )
        options = replace(options, max_batch=widest.batch)
    if text:
        options = _fit_length(opened, options, widest.largest["input_ids"][1])
    if options.server_tensorrt is None:
        newer = ", or a newer one of that major version," if engines.newer else ""
        notes.append(
            f"The engines run in a server with TensorRT {engines.tensorrt}{newer} only; --server-tensorrt VERSION "
            "checks that."
        )
    if engines.ranks:
        notes.append(
            f"{len(engines.ranks)} GPUs compute together, which Triton's tensorrt backend can since {LEAST_TRITON}, "
            "built with TRITON_ENABLE_TENSORRT_MULTI_DEVICE; in an older one the model does not load."
        )
    if engines.plugins and not engines.tensorrt.startswith("10."):
        notes.append(
            "Triton opens plugin libraries and leaves it to them to register what they hold, which effc's does with "
            f"TensorRT 10 and not with {engines.tensorrt}. Compile with --embed-plugin, which needs no library."
        )
    return FittedEngines(engines, options, tuple(notes))


def plan_engines(name: str, opened: Opened, fitted: FittedEngines) -> PlannedModel:
    """The model that runs the engines, tensors in and out.

    Raises:
        UsageError: if versions or shapes do not fit each other.
    """
    shapes = fitted.engines.widest.largest
    longest = max((size for shape in shapes.values() for size in shape[1:2]), default=None)
    return engine_model(
        name, fitted.engines, fitted.options, warm_ups(opened.manifest.inputs, longest, everything=True)
    )


def _fit_length(opened: Opened, options: ServingOptions, longest: int) -> ServingOptions:
    limit = text_length(opened, options)
    if options.max_length is not None and options.max_length > longest:
        raise UsageError(f"The engines take at most {longest} tokens, not {options.max_length}.", "Give fewer.")
    return replace(options, max_length=longest if limit is None else min(limit, longest))


def _gather(main: Opened, others: Sequence[Path]) -> tuple[EngineSet, list[str]]:
    """One set of all artifacts' engines, and what has to be said of it."""
    opened = [main, *(open_artifact(path) for path in others)]
    sets = [engine_set(one.path) for one in opened]
    first, files, notes = sets[0], dict(sets[0].files), []
    if len(sets) > 1 and any(found.ranks for found in sets):
        raise UsageError(
            "Engines of GPUs that compute together are served by themselves.",
            "Leave --engines out, or serve them apart.",
        )
    for one, found in zip(opened[1:], sets[1:], strict=True):
        _check_alike(main, one, first, found)
        twice = files.keys() & found.files.keys()
        if twice:
            raise UsageError(
                f"Two artifacts hold an engine for compute capability {', '.join(sorted(twice))}.",
                "Give one for each GPU.",
            )
        files |= found.files
    if differ(opened):
        notes.append("The artifacts were not compiled alike, so answers differ with the GPU.")
    plugins = _one_library(sets)
    if plugins is not None and len({sha256(path) for found in sets for path in found.plugins}) > 1:
        notes.append(
            f"Of the plugin libraries, '{plugins[0]}' is used: it was compiled for the oldest GPU, and its portable "
            "code serves newer ones. One that was compiled for all of them (--arch) starts faster."
        )
    merged = replace(first, files=files, plugins=plugins or (), host_code=any(found.host_code for found in sets))
    return merged, notes


def _one_library(sets: Sequence[EngineSet]) -> Sequence[Path] | None:
    """The plugin library for all: TensorRT registers a plugin once, so there cannot be two of them."""
    holding = [found for found in sets if found.plugins]
    if not holding:
        return None
    oldest = min(holding, key=lambda found: min(tuple(map(int, name.split("."))) for name in found.files))
    return oldest.plugins


def differ(opened: Sequence[Opened]) -> bool:
    """Whether attention, weights or precision differ, and not only what belongs to the GPU."""
    parts = []
    for one in opened:
        recipe, record = one.manifest.recipe, one.manifest.engines
        assert record is not None
        kept = {key: recipe.get(key) for key in _CHANGES_ANSWERS}
        parts.append((kept, record.precision))
    return any(part != parts[0] for part in parts[1:])


def _check_alike(main: Opened, other: Opened, ours: EngineSet, theirs: EngineSet) -> None:
    if other.manifest.source.fingerprint != main.manifest.source.fingerprint:
        raise UsageError(f"'{other.path}' was compiled from another model than '{main.path}'.", "Leave it out.")
    same = {
        "inputs or outputs": (list(ours.inputs), list(ours.outputs)) == (list(theirs.inputs), list(theirs.outputs)),
        "profiles": list(ours.profiles) == list(theirs.profiles),
        "TensorRT": (ours.tensorrt, ours.newer) == (theirs.tensorrt, theirs.newer),
    }
    for what, alike in same.items():
        if not alike:
            raise UsageError(
                f"The engines of '{other.path}' have other {what} than those of '{main.path}', and Triton has one "
                "description for all.",
                "Compile both alike, with the same --shapes and the same version of TensorRT.",
            )
