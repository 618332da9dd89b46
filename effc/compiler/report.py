"""``report.html``: one self-contained file that says whether a compile paid off, and how that is known.

All of it comes from the manifest. A reader with a latency budget sees the verdict first, a loss as plainly as a gain.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from effc.compiler import report_plots as plots
from effc.compiler.manifest import (
    AttentionLayer,
    BenchRecord,
    CompressionRecord,
    FileRecord,
    Manifest,
    PassRecord,
    SpeedRecord,
    Timing,
    VerifyRecord,
)
from effc.compiler.recipe import build_recipe
from effc.compiler.recovery_plot import recovery_curves, recovery_record
from effc.compiler.report_page import milliseconds, number, page, times, write_page
from effc.errors import EffcError
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form
from effc.plugins.pattern import DENSE, Pattern

State = Literal["win", "even", "loss", "missed", "unknown"]

# Within 3 % of 1, repeated measurements on a shared machine do not agree which model is faster.
EVEN_BAND = 0.03
UNMEASURED = "Not measured: run `effc bench OUT`."
ENGINES_UNMEASURED = "Engines are timed on the GPU that they are for, and a compile does not run them."
UNVERIFIED = "Not measured: run `effc verify OUT`."
EXPLAINED_FORMS = 4  # forms that get a sentence each; the attention table has all
LIST_LIMIT = 300  # names per expandable list; effc.json has them all

# The recipe keys that have a flag of their own; any other change from the defaults needs `--recipe`.
FLAGS = {
    "attention.pattern": "--attn",
    "attention.force": "--force",
    "prune": "--prune",
    "low_rank": "--low-rank",
    "quantization.mode": "--quant",
    "quantization.smoothing": "--quant-smoothing",
    "quantization.activations": "--quant-activations",
    "quantization.weights.method": "--quant-weights",
    "quantization.attention": "--quant-attention",
    "quantization.kv_cache": "--quant-kv-cache",
    "target": "--target",
    "engine.arch": "--arch",
    "engine.shapes": "--shapes",
    "engine.precision": "--engine-precision",
    "engine.plugin": "--no-plugin",
    "engine.tensor_parallel": "--tensor-parallel",
    "engine.embed_plugin": "--embed-plugin",
    "model.task": "--task",
    "model.revision": "--revision",
    "quantization.calibration.data": "--calibration",
    "verify.data": "--data",
    "checkpoint.enabled": "--checkpoint",
    "require.min_speedup": "--require-speedup",
    "require.min_decode_speedup": "--require-decode-speedup",
    "require.max_quality_drop": "--max-quality-drop",
}
ALWAYS_SHOWN = ("attention.pattern", "quantization.mode")


def write_report(manifest: Manifest, path: Path) -> None:
    """Write the report of ``manifest`` to ``path``, replacing what is there only once the whole text is written.

    Raises:
        OutputError: if ``path`` cannot be written.
    """
    write_page(path, render_report(manifest), "report")


def render_report(manifest: Manifest) -> str:
    """The report as one HTML page that loads nothing from anywhere."""
    bench, verification, search = manifest.benchmark, manifest.verification, manifest.attention_search
    required = manifest.recipe.get("require") or {}
    return page("report.html.j2").render(
        manifest=manifest,
        name=PurePosixPath(manifest.source.path.rstrip("/")).name or manifest.source.path,
        command=command_line(manifest.recipe, manifest.recipe.get("model", {}).get("path") or manifest.source.path),
        recipe_yaml=yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True),
        verdict=judge(manifest),
        requirements=check_requirements(manifest),
        explanations=explain(manifest),
        model_bytes=model_bytes(manifest.files),
        total_bytes=sum(file.bytes for file in manifest.files.values()),
        source_bytes=4 * manifest.source.parameters,
        weakest=weakest_output(verification) if verification else None,
        longest=longest(bench) if bench else None,
        required_speedup=required.get("min_speedup"),
        timings=plots.timing_pairs(bench) if bench else [],
        latency_figure=plots.latency(bench) if bench else None,
        speedup_figure=plots.speedup(bench, required.get("min_speedup"))
        if bench and plots.measured_lengths(bench)
        else None,
        decode=decode_section(bench),
        memory_figure=plots.memory(bench) if bench and plots.measured_lengths(bench) else None,
        probe_figure=plots.probe(manifest.passes),
        probe_labels=[label for label, _ in plots.probe_series(manifest.passes)],
        probe_worst=[(p.name, *worst_probe(p)) for p in manifest.passes if p.probe],
        error_floor=plots.ERROR_FLOOR,
        patterns=picture_patterns(manifest),
        sensitivity_figure=None if search is None else plots.sensitivity(search, layer_numbers(manifest.attention)),
        layer_numbers=layer_numbers(manifest.attention),
        recovery=recovery_record(manifest.passes),
        recovery_curves=recovery_curves,
        quantization_figure=plots.quantization(manifest.quantization_search) if manifest.quantization_search else None,
        slowest_pass=max((p.seconds for p in manifest.passes), default=0.0),
        quantizing=[p for p in manifest.passes if "quant" in p.name],
        reasons=lambda p: Counter(skip.reason for skip in p.skipped).most_common(),
        other_kernels={} if bench is None else unlisted_kernels(bench, manifest.attention),
        count_kernels=lambda kernels: Counter(kernels.values()).most_common(),
        list_limit=LIST_LIMIT,
        unmeasured=ENGINES_UNMEASURED if manifest.engines else UNMEASURED,
        unverified=UNVERIFIED,
    )


# --- the verdict ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The first thing a reader sees. ``figure`` is the speed-up in large type."""

    state: State
    figure: str
    headline: str
    detail: str


@dataclass(frozen=True)
class Requirement:
    """What the recipe demanded and what was reached; ``met`` is None where it was not measured."""

    label: str
    wanted: str
    reached: str
    met: bool | None


def judge(manifest: Manifest) -> Verdict:
    """Speed at the longest measured length against the dense twin, in words that do not flatter."""
    bench = manifest.benchmark
    if bench is None or not (measured := longest(bench)):
        reason = ENGINES_UNMEASURED if manifest.engines else UNMEASURED
        return Verdict("unknown", "–", "Speed has not been measured", reason)
    length, dense, compiled = measured
    speedup = bench.speedup[str(length)]
    change = f"{milliseconds(dense.cpu_ms)} → {milliseconds(compiled.cpu_ms)} CPU time per run, median."
    if speedup < 1 - EVEN_BAND:
        headline = f"Slower than dense at {length:,} tokens: every run takes {(1 / speedup - 1):.0%} more CPU time"
        return Verdict("loss", times(speedup), headline, change)
    if speedup <= 1 + EVEN_BAND:
        headline = f"No speed-up at {length:,} tokens: the difference is within the noise of the measurement"
        return Verdict("loss" if speedup < 1 else "even", times(speedup), headline, change)
    headline = f"Faster than dense at {length:,} tokens"
    if any(requirement.met is False for requirement in check_requirements(manifest)):
        return Verdict("missed", times(speedup), f"{headline}, but a requirement is missed", change)
    return Verdict("win", times(speedup), headline, change)


def check_requirements(manifest: Manifest) -> list[Requirement]:
    """``--require-speedup`` and ``--max-quality-drop`` against the measurements; empty where none was set."""
    wanted = manifest.recipe.get("require") or {}
    bench = manifest.benchmark
    result = [
        _speed_requirement(what, speed, speedup)
        for what, speed, speedup in (
            ("speed-up", bench, wanted.get("min_speedup")),
            ("speed-up per token", bench.decode if bench else None, wanted.get("min_decode_speedup")),
        )
        if speedup is not None
    ]
    if (drop := wanted.get("max_quality_drop")) is not None:
        verification = manifest.verification
        label = f"quality drop ({verification.quality_metric})" if verification else "quality drop"
        reached = number(verification.quality_drop) if verification else "not measured"
        met = None if verification is None else verification.quality_drop <= drop
        result.append(Requirement(label, f"≤ {drop:g}", reached, met))
    return result


def _speed_requirement(what: str, speed: SpeedRecord | None, wanted: float) -> Requirement:
    measured = longest(speed) if speed else None
    got = speed.speedup[str(measured[0])] if speed and measured else None
    where = f"{what} at {measured[0]:,} tokens" if measured else what
    reached = times(got) if got is not None else "not measured"
    return Requirement(where, f"≥ {wanted:g}×", reached, None if got is None else got >= wanted)


def explain(manifest: Manifest) -> list[str]:
    """Sentences on what the speed, or its absence, comes from; each is a fact of the manifest."""
    result = []
    bench = manifest.benchmark
    measured = longest(bench) if bench else None
    if bench and measured:
        result.append(break_even_sentence(bench))
        rewritten = Counter(
            (layer.pattern, layer.causal, layer.head_dim) for layer in manifest.attention if layer.rewritten
        )
        for (text, causal, head_dim), count in rewritten.most_common(EXPLAINED_FORMS):
            if form := readable_pattern(text):
                share = dense_share(form, measured[0], causal, head_dim)
                what = "sees {:.1%} of the query-key pairs" if isinstance(form, Pattern) else "takes {:.1%} of the work"
                effect = ", so there is next to nothing to save at this length" if share > 0.95 else ""
                result.append(
                    f"{text} ({_layers(count)}) {what.format(share)} of dense attention at {measured[0]:,} "
                    f"tokens{effect}."
                )
    if found := manifest.attention_search:
        result.append(
            f"{found.request} chose the attention of {_layers(len(found.layers))} on {found.samples} texts of up to "
            f"{found.longest:,} tokens: {number(found.error)} {found.error_name}, for {found.cost_share:.1%} of the "
            f"arithmetic of the model's own attention at {found.target_length:,} tokens."
        )
    if compression := manifest.compression:
        result.append(compression_sentence(compression, manifest.source.parameters))
        result += compression.notes
    if (checkpoint := manifest.checkpoint) and checkpoint.reason:
        result.append(f"transformers alone cannot load {checkpoint.directory}/: {checkpoint.reason}.")
    if selected := manifest.quantization_search:
        taken, layers = sum(layer.quantized for layer in selected.layers), len(selected.layers)
        result.append(
            f"{selected.request} quantized {taken} of {layers} layers to {selected.mode}: "
            f"{number(selected.drop)} {selected.drop_name}, against a budget of {selected.budget:g}."
        )
    if kept := [layer for layer in manifest.attention if not layer.rewritten]:
        reasons = Counter(layer.reason or "no reason was recorded" for layer in kept).most_common()
        listed = "; ".join(f"{reason} ({_layers(count)})" for reason, count in reasons[:4])
        result.append(f"{len(kept)} of {_layers(len(manifest.attention))} kept their attention: {listed}.")
    if (manifest.recipe.get("quantization") or {}).get("mode") == "none":
        result.append("Nothing was quantized, so the linear layers run in fp32; --quant=int8 changes that.")
    if bench and measured:
        cpu, wall = bench.speedup[str(measured[0])], bench.speedup_wall.get(str(measured[0]))
        if wall is not None and (wall < 1) != (cpu < 1):
            result.append(f"The wall clock says otherwise, {times(wall)}: the machine was busy or threads stood idle.")
    return result


def compression_sentence(compression: CompressionRecord, before: int) -> str:
    """What pruning and factorization left of the weights and the vocabulary."""
    left = f"{compression.parameters / before:.1%} of {before:,} weights"
    zeros = compression.parameters - compression.nonzero
    sparse = f", {zeros / compression.parameters:.1%} of those zero" if zeros else ""
    vocabulary = compression.vocabulary
    words = f" and {vocabulary.tokens:,} of {vocabulary.source_tokens:,} tokens" if vocabulary else ""
    return f"{', '.join(compression.steps)} left {left}{sparse}{words}."


def break_even_sentence(bench: BenchRecord) -> str:
    """From which length on the compiled model wins, in words."""
    lengths = plots.measured_lengths(bench)
    slower = [length for length in lengths if bench.speedup[str(length)] < 1]
    if not slower:
        return f"It is faster at every measured length ({_span(lengths)})."
    if len(slower) == len(lengths):
        return f"It is not faster at any measured length ({_span(lengths)})."
    if bench.break_even_length is not None and max(slower) < bench.break_even_length:
        return f"It breaks even at about {bench.break_even_length:,} tokens; for shorter sequences dense is faster."
    return f"It is slower at {', '.join(f'{length:,}' for length in slower)} tokens."


def longest(bench: SpeedRecord) -> tuple[int, Timing, Timing] | None:
    """``(length, dense, compiled)`` at the longest length at which both were measured."""
    pairs = plots.timing_pairs(bench)
    return pairs[-1] if pairs else None


def decode_section(bench: BenchRecord | None) -> dict[str, Any] | None:
    """What the report says of writing token by token; None of a model that does not write."""
    if bench is None or (bench.decode is None and bench.not_written is None):
        return None
    speed = bench.decode
    return {
        "reason": bench.not_written,
        "speed": speed,
        "timings": plots.timing_pairs(speed) if speed else [],
        "figure": plots.latency(speed, "decode", "tokens in the text", "CPU time per token, ms") if speed else None,
    }


def weakest_output(verification: VerifyRecord) -> str | None:
    """The output that deviates most; one that is not a number deviates more than any other."""
    error = {name: deviation.relative_error for name, deviation in verification.outputs.items()}
    return max(error, key=lambda name: math.inf if math.isnan(error[name]) else error[name], default=None)


# --- parts ---------------------------------------------------------------------------------------------------------


def command_line(recipe: Mapping[str, Any], source: str) -> str:
    """The ``effc compile`` command that gives this recipe; ``--recipe`` appears only where a flag does not suffice."""
    given, defaults = (
        _flat(_shortened_weights(_joined_assignment(recipe))),
        _flat(build_recipe({}).model_dump(mode="json")),
    )
    flags, rest = [], False
    for key, value in given.items():
        if key == "model.path" or (value == defaults.get(key) and key not in ALWAYS_SHOWN):
            continue
        if key == "low_rank" and value is None:
            continue
        if key == "prune" and all(isinstance(step, str) for step in value):
            flags += [f"{FLAGS[key]}={shlex.quote(step)}" for step in value]
        elif key in FLAGS and key != "prune" and isinstance(value, bool):
            flags.append(FLAGS[key])
        elif key in FLAGS and key.startswith("engine.") and isinstance(value, list):
            flags.append(f"{FLAGS[key]}={','.join(value)}")
        elif key in FLAGS and key != "prune":
            flags.append(f"{FLAGS[key]}={shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}")
        else:
            rest = True
    flags.sort(key=lambda flag: list(FLAGS.values()).index(flag.split("=")[0]))
    return " ".join(
        ["effc compile", shlex.quote(source), *(["--recipe=recipe.yaml"] if rest else []), *flags, "-o OUT"]
    )


def _joined_assignment(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the forms of single layers written into the pattern, as ``--attn`` takes them."""
    attention = dict(recipe.get("attention") or {})
    layers = attention.pop("layers", None) or {}
    if layers:
        attention["pattern"] = ",".join([attention.get("pattern", "dense"), *(f"{k}={v}" for k, v in layers.items())])
    return {**recipe, "attention": attention}


def _shortened_weights(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with ``prune`` and ``low_rank`` as the texts that flags take, where those say all of it."""
    result = dict(recipe)
    if steps := recipe.get("prune"):
        asked = build_recipe({"prune": steps}).prune
        texts = [step.text for step in asked]
        result["prune"] = texts if build_recipe({"prune": texts}).prune == asked else steps
    if budget := build_recipe({"low_rank": recipe.get("low_rank")}).low_rank:
        same = build_recipe({"low_rank": budget.text}).low_rank == budget
        result["low_rank"] = budget.text if same else recipe["low_rank"]
    return result


@dataclass(frozen=True)
class PatternPicture:
    """One distinct form with its picture and its exact share of dense attention.

    ``shares`` are visible pairs of position-based patterns, arithmetic of all other forms, by length. ``missing`` says
    why there is no picture.
    """

    text: str
    causal: bool
    layers: int
    image: str | None
    covered: int
    step: int
    shares: list[tuple[int, float]]
    counts_pairs: bool
    missing: str = ""


def picture_patterns(manifest: Manifest) -> list[PatternPicture]:
    """A picture for each distinct (pattern, causality) that the compiled model runs."""
    limit = manifest.source.max_length
    lengths = manifest.benchmark.lengths if manifest.benchmark else []
    lengths = sorted(lengths) or [n for n in (128, 512, 1024, 2048, 4096, 8192) if limit is None or n <= limit] or [128]
    head_dim = {(layer.pattern, layer.causal): layer.head_dim for layer in manifest.attention}
    result = []
    for (text, causal), count in Counter((layer.pattern, layer.causal) for layer in manifest.attention).items():
        form = readable_pattern(text)
        if form is None:
            missing = "this version of effc does not know the pattern"
            result.append(PatternPicture(text, causal, count, None, 0, 0, [], False, missing))
            continue
        picture = plots.visibility(form, causal, lengths[-1])
        image, covered, step = picture or (None, 0, 0)
        shares = [] if form.is_dense else [(n, dense_share(form, n, causal, head_dim[text, causal])) for n in lengths]
        missing = "" if picture else "what a query sees depends on the content"
        pairs = isinstance(form, Pattern)
        result.append(PatternPicture(text, causal, count, image, covered, step, shares, pairs, missing))
    return result


def dense_share(form: AttentionForm, length: int, causal: bool, head_dim: int) -> float:
    """Visible pairs of a pattern, or the arithmetic of any other form, over that of dense attention."""
    if isinstance(form, Pattern):
        return form.density(length, causal)
    return form.cost(length, causal, head_dim).flops / DENSE.cost(length, causal, head_dim).flops


def readable_pattern(text: str) -> AttentionForm | None:
    """The pattern, or None for one that a newer effc wrote: a report without its picture is better than none."""
    try:
        return parse_form(text)
    except EffcError:
        return None


def worst_probe(record: PassRecord) -> tuple[str, float, float]:
    """``(output, its relative error, its cosine)`` of the output with the largest error after this pass."""
    assert record.probe
    name = max(record.probe, key=lambda n: math.inf if math.isnan(e := record.probe[n].relative_error) else e)  # type: ignore[index]
    return name, record.probe[name].relative_error, record.probe[name].cosine


def layer_numbers(attention: list[AttentionLayer]) -> dict[str, int]:
    """The place of every layer in execution order, which ranges in ``--attn`` count."""
    return {layer.layer: number for number, layer in enumerate(attention)}


def unlisted_kernels(bench: BenchRecord, attention: list[AttentionLayer]) -> dict[str, str]:
    """Kernels reported for something else than a layer of the attention table."""
    layers = {layer.layer for layer in attention}
    return {name: kernel for name, kernel in bench.kernels.items() if name not in layers}


def model_bytes(artifact: Mapping[str, FileRecord]) -> int:
    """Size of the graphs and their weights: ``*.onnx`` and the external data beside them."""
    return sum(file.bytes for name, file in artifact.items() if ".onnx" in PurePosixPath(name).name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _span(lengths: list[int]) -> str:
    if len(lengths) == 1:
        return f"{lengths[0]:,} tokens"
    return f"{lengths[0]:,} to {lengths[-1]:,} tokens"
