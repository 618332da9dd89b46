"""``report.html``: one self-contained file that says whether a compile paid off, and how that is known.

All of it comes from the manifest. A reader with a latency budget sees the verdict first, a loss as plainly as a gain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from effc.compiler import report_plots as plots
from effc.compiler.manifest import (
    AttentionLayer,
    BenchRecord,
    FileRecord,
    Manifest,
    PassRecord,
    VerifyRecord,
)
from effc.compiler.recovery_plot import recovery_curves, recovery_record
from effc.compiler.report_command import command_line
from effc.compiler.report_explain import explain
from effc.compiler.report_page import page, write_page
from effc.compiler.report_patterns import picture_patterns
from effc.compiler.report_verdict import ENGINES_UNMEASURED, UNMEASURED, check_requirements, judge, longest

UNVERIFIED = "Not measured: run `effc verify OUT`."
LIST_LIMIT = 300  # names per expandable list; effc.json has them all


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
