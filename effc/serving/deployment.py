"""From an artifact to the models of a repository."""

from __future__ import annotations

from pathlib import Path

import onnx

from effc.errors import UsageError
from effc.serving.options import ServingOptions
from effc.serving.plan import Opened, Plan, PlannedModel, open_artifact, plan_forward, plan_name
from effc.serving.plan_engine_writer import plan_engine_writer
from effc.serving.plan_engines import fit_engines, plan_engines
from effc.serving.plan_generation import plan_generation
from effc.serving.plan_router import plan_router
from effc.serving.plan_stages import plan_stages
from effc.serving.plan_text import plan_ensemble, plan_head, plan_tokenizer, takes_text


def plan_artifact(artifact: Path, options: ServingOptions) -> Plan:
    """The models that serve an artifact.

    A causal model that was compiled with its generating graph, or with engines that write text, becomes one model that
    writes text. Of others, ``NAME`` takes text and is an ensemble of ``NAME_tokenizer``, ``NAME_model`` and
    ``NAME_output``; ``NAME_model`` can be asked with tensors as well. Engines of their forward pass are run by Triton's
    tensorrt backend. With variants, ``NAME_model`` is the router and ``NAME_model_<variant>`` run; with stages, it is
    an ensemble of ``NAME_model_stage_<number>``. A model that does not take text is ``NAME`` alone.

    Raises:
        OutputError: if this is no artifact, or it was changed.
        UsageError: if an option does not fit it.
    """
    opened = open_artifact(artifact)
    name = plan_name(artifact, options)
    task = opened.manifest.source.task
    options = options.placed(engines=opened.manifest.engines is not None)
    if opened.manifest.generation is not None:
        return Plan(name, task, (plan_generation(name, opened, options),), _notes(opened, options))
    if options.backend == "tensorrt" and opened.manifest.engines is not None and opened.manifest.engines.writes:
        return plan_engine_writer(name, opened, options)
    text = takes_text(opened)
    if not text:
        _refuse_text_options(options)
    inner = f"{name}_model" if text else name
    if options.backend == "tensorrt":
        fitted = fit_engines(opened, options, text)
        engines = plan_engines(inner, opened, fitted)
        models = _with_text(name, opened, fitted.options, (engines,)) if text else (engines,)
        plugins = tuple((inner, path.name) for path in fitted.engines.plugins)
        return Plan(name, task, models, fitted.notes, plugins, fitted.engines.host_code)
    graphs: tuple[PlannedModel, ...]
    if options.stages is not None:
        graphs = plan_stages(inner, opened, options)
    elif options.variants:
        graphs = plan_router(inner, opened, options)
    else:
        graphs = (plan_forward(inner, opened, options),)
    models = _with_text(name, opened, options, graphs) if text else graphs
    return Plan(name, task, models, _notes(opened, options))


def _with_text(
    name: str, opened: Opened, options: ServingOptions, graphs: tuple[PlannedModel, ...]
) -> tuple[PlannedModel, ...]:
    """Models that run the graph, the last of them asked by clients, and what turns text into tensors and back."""
    tokenizer = plan_tokenizer(f"{name}_tokenizer", opened, options)
    head = plan_head(f"{name}_output", opened, options)
    whole = plan_ensemble(name, tokenizer, graphs[-1], head, options)
    return (*graphs, tokenizer, *([head] if head else []), whole)


def _refuse_text_options(options: ServingOptions) -> None:
    given = {
        "--pooling": options.pooling is not None,
        "--normalize": options.normalize is not None,
        "--max-length": options.max_length is not None,
    }
    for flag, there in given.items():
        if there:
            raise UsageError(f"{flag} is for models that take text, and this one takes tensors.", "Leave it out.")


def _notes(opened: Opened, options: ServingOptions) -> tuple[str, ...]:
    notes = []
    if options.max_batch > 1 and _ranges_per_run(opened):
        notes.append(
            "The INT8 ranges of this model are taken from each run, so an answer differs a little, within the error of "
            "quantization, with the requests that share its run. --max-batch 1 gives every request a run of its own."
        )
    return tuple(notes)


def _ranges_per_run(opened: Opened) -> bool:
    from effc.compiler.artifact_files import MODEL_NAME

    graph = onnx.load(opened.path / MODEL_NAME, load_external_data=False)
    return any(node.op_type.startswith("DynamicQuantize") for node in graph.graph.node)
