"""Sentences on what the speed of an artifact, or its absence, comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from effc.compiler.machine import int8_saturates
from effc.compiler.manifest import BenchRecord, CompressionRecord, Manifest
from effc.compiler.report_page import number, times
from effc.compiler.report_patterns import dense_share, readable_pattern
from effc.compiler.report_plots import measured_lengths
from effc.compiler.report_verdict import longest
from effc.plugins.pattern import Pattern

EXPLAINED_FORMS = 4  # forms that get a sentence each; the attention table has all


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
    if bench and int8_saturates(bench.machine.get("isa") or ()):
        result += _without_vnni(manifest.recipe.get("quantization") or {})
    if bench and measured:
        cpu, wall = bench.speedup[str(measured[0])], bench.speedup_wall.get(str(measured[0]))
        if wall is not None and (wall < 1) != (cpu < 1):
            result.append(f"The wall clock says otherwise, {times(wall)}: the machine was busy or threads stood idle.")
    return result


def _without_vnni(quantization: Mapping[str, Any]) -> Iterator[str]:
    if "int8" not in (quantization.get("mode"), *(quantization.get("layers") or {}).values()):
        return
    yield "This CPU has no VNNI: INT8 layers gain less here than on CPUs that have it."
    if not quantization.get("reduce_range"):
        yield (
            "It adds pairs of 8-bit products in 16 bits, where they may saturate; the recipe's reduce_range keeps "
            "weights to 7 bits, which fit."
        )


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
    lengths = measured_lengths(bench)
    slower = [length for length in lengths if bench.speedup[str(length)] < 1]
    if not slower:
        return f"It is faster at every measured length ({_span(lengths)})."
    if len(slower) == len(lengths):
        return f"It is not faster at any measured length ({_span(lengths)})."
    if bench.break_even_length is not None and max(slower) < bench.break_even_length:
        return f"It breaks even at about {bench.break_even_length:,} tokens; for shorter sequences dense is faster."
    return f"It is slower at {', '.join(f'{length:,}' for length in slower)} tokens."


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _span(lengths: list[int]) -> str:
    if len(lengths) == 1:
        return f"{lengths[0]:,} tokens"
    return f"{lengths[0]:,} to {lengths[-1]:,} tokens"
