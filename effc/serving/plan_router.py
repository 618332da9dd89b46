"""The models of adaptive execution: variants of one model, and the router that sends each request to one of them."""

from __future__ import annotations

from collections.abc import Mapping

from effc.errors import UsageError
from effc.exporters.triton_config import TEXT, ModelConfig, Tensor
from effc.serving.options import ServingOptions
from effc.serving.plan import Opened, PlannedModel, open_artifact, plan_forward, python_files

MAIN = "compiled"
"""Name of the variant that is the artifact itself."""


def plan_router(name: str, main: Opened, options: ServingOptions) -> tuple[PlannedModel, ...]:
    """The variants, each as a model of its own, and the model that chooses among them.

    Raises:
        UsageError: if the artifacts do not take and give the same, or were not measured (for a latency budget, on the
            same texts).
    """
    opened = {MAIN: main, **{key: open_artifact(path) for key, path in options.variants.items()}}
    if len(opened) == len(options.variants):
        raise UsageError("The variant 'compiled' is the artifact itself.", "Give the other one another name.")
    for key, variant in opened.items():
        _check_alike(key, variant, main)
    models = {key: f"{name}_{key}" for key in opened}
    planned = [plan_forward(models[key], variant, options) for key, variant in opened.items()]
    first = planned[0].config
    assert isinstance(first, ModelConfig)
    longest: list[int] = [variant.manifest.source.max_length or 0 for variant in opened.values()]
    router = ModelConfig(
        name=name,
        backend="python",
        inputs=first.inputs,
        outputs=[*first.outputs, Tensor("variant", TEXT, (1,))],
        max_batch=options.max_batch,
    )
    limits = {key: value or None for key, value in zip(opened, longest, strict=True)}
    times = {key: _times(key, variant, options.latency_budget_ms is not None) for key, variant in opened.items()}
    budget = None
    if options.latency_budget_ms is not None:
        budget = {
            "milliseconds": options.latency_budget_ms,
            "drops": _drops(opened),
            "parallel": options.instances.count * max(1, len(options.instances.gpus)),
        }
    files = python_files("route", router={"models": models, "times": times, "limits": limits, "budget": budget})
    return (*planned, PlannedModel(router, files))


def _check_alike(name: str, variant: Opened, main: Opened) -> None:
    interface = [(record.name, record.dtype, record.maximum) for record in main.manifest.inputs]
    own = [(record.name, record.dtype, record.maximum) for record in variant.manifest.inputs]
    outputs = [(record.name, record.dtype, record.shape) for record in main.manifest.outputs]
    if own != interface or outputs != [(r.name, r.dtype, r.shape) for r in variant.manifest.outputs]:
        raise UsageError(
            f"The variant '{name}' ('{variant.path}') does not take and give what '{main.path}' does.",
            "Compile both from the same model, for the same task.",
        )


def _drops(opened: Mapping[str, Opened]) -> dict[str, float]:
    """The quality that each variant loses."""
    found = {}
    for name, variant in opened.items():
        record = variant.manifest.verification
        if record is None:
            raise UsageError(
                f"The quality of the variant '{name}' ('{variant.path}') was not measured, and a latency budget asks "
                "for the best variant that keeps it.",
                f"Measure it: effc verify {variant.path} --data TEXTS.",
            )
        found[name] = (record.quality_metric, record.data, record.samples), record.quality_drop
    if len({measured for measured, _ in found.values()}) > 1:
        raise UsageError(
            "The variants' quality was measured on different texts: "
            f"{', '.join(f'{name} on {measured[1]}' for name, (measured, _) in found.items())}.",
            "Verify each of them on the same texts: effc verify ARTIFACT --data TEXTS.",
        )
    return {name: drop for name, (_, drop) in found.items()}


def _times(name: str, variant: Opened, wall: bool) -> dict[str, float]:
    """Milliseconds per sequence by length as text: of CPU time, or on the clock."""
    record = variant.manifest.benchmark
    if record is None:
        raise UsageError(
            f"The speed of the variant '{name}' ('{variant.path}') was not measured.",
            f"Measure it: effc bench {variant.path}.",
        )
    timings = {str(length): record.compiled[str(length)] for length in record.lengths}
    return {length: (timing.wall_ms if wall else timing.cpu_ms) / record.batch for length, timing in timings.items()}
