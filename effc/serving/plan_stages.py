"""The models of a graph that is split into stages, one after the other, and the ensemble that ties them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from effc.compiler.artifact_files import MODEL_NAME
from effc.compiler.manifest import TensorRecord
from effc.errors import UsageError
from effc.exporters.triton_config import EnsembleConfig, EnsembleStep, Instances, Tensor
from effc.serving.graph_stages import Stage, split_graph
from effc.serving.options import ServingOptions
from effc.serving.plan import Graph, Opened, PlannedModel, plan_graph


def plan_stages(name: str, opened: Opened, options: ServingOptions) -> tuple[PlannedModel, ...]:
    """``NAME_stage_0`` and so on, each with an instance group of its own, and ``NAME``, which hands tensors on.

    Raises:
        UsageError: if the graph has fewer layers, there are fewer GPUs, or an option does not go with stages.
    """
    assert options.stages is not None
    if options.variants:
        raise UsageError("--stages and --variant do not go together.", "Leave out one of the two.")
    layers = {layer.layer for layer in opened.manifest.attention}
    stages = split_graph(opened.path / MODEL_NAME, layers, options.stages)
    places = _places(options.instances, len(stages))
    maximum = {record.name: record.maximum for record in opened.manifest.inputs}
    planned = []
    for number, (stage, place) in enumerate(zip(stages, places, strict=True)):
        inputs = [record.model_copy(update={"maximum": maximum.get(record.name)}) for record in stage.inputs]
        graph = Graph(inputs, stage.outputs, {MODEL_NAME: stage.save}, pads=False)
        planned.append(plan_graph(f"{name}_stage_{number}", opened, replace(options, instances=place), graph))
    return (*planned, _ensemble(name, opened, options, stages, planned))


def _places(instances: Instances, count: int) -> list[Instances]:
    """Where each stage runs: one GPU each, or all on the CPU."""
    if instances.kind == "cpu":
        return [instances] * count
    gpus = instances.gpus or tuple(range(count))
    if len(gpus) != count:
        raise UsageError(f"There are {count} stages and {len(gpus)} GPUs.", "Name one GPU for each stage.")
    return [Instances("gpu", instances.count, (gpu,)) for gpu in gpus]


def _ensemble(
    name: str, opened: Opened, options: ServingOptions, stages: Sequence[Stage], planned: Sequence[PlannedModel]
) -> PlannedModel:
    manifest = opened.manifest
    # An input that no stage reads is not asked for.
    read = {record.name for stage in stages for record in stage.inputs}
    steps = [
        EnsembleStep(model.config.name, _same(stage.inputs), _same(stage.outputs))
        for stage, model in zip(stages, planned, strict=True)
    ]
    inputs = [_tensor(record) for record in manifest.inputs if record.name in read]
    outputs = [_tensor(record) for record in manifest.outputs]
    return PlannedModel(EnsembleConfig(name, inputs, outputs, steps, options.max_batch))


def _same(records: Sequence[TensorRecord]) -> dict[str, str]:
    return {record.name: record.name for record in records}


def _tensor(record: TensorRecord) -> Tensor:
    return Tensor(record.name, record.dtype, tuple(size if isinstance(size, int) else -1 for size in record.shape[1:]))
