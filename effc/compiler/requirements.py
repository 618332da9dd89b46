"""What a recipe requires of a compile: whether it will be measured at all, and whether the result meets it."""

from __future__ import annotations

from collections.abc import Iterator

from effc.compiler.bench_ratios import unmet_speed
from effc.compiler.manifest import Manifest
from effc.compiler.recipe import Recipe
from effc.compiler.rewrite import Rewritten
from effc.errors import UsageError


def check_measured(recipe: Recipe) -> None:
    """Refuse a recipe that requires a speed and does not have it measured.

    Raises:
        UsageError: naming the requirement.
    """
    if recipe.require.min_speedup is not None and not recipe.bench.enabled:
        raise UsageError("A minimum speed-up is required but speed is not measured.", "Leave --no-bench out.")
    if recipe.require.min_decode_speedup is not None and not (recipe.bench.enabled and recipe.bench.decode):
        raise UsageError(
            "A minimum speed-up per token is required but not measured.", "Leave --no-bench and bench.decode out."
        )


def unmet(recipe: Recipe, manifest: Manifest, rewritten: Rewritten) -> Iterator[str]:
    """What the result misses, as full sentences."""
    if rewritten.unwanted and not recipe.attention.allow_partial:
        layers = "; ".join(f"{layer} ({reason})" for layer, reason in rewritten.unwanted[:5])
        yield f"{len(rewritten.unwanted)} attention modules could not be rewritten: {layers}."
    chosen = manifest.quantization_search
    if chosen is not None and not chosen.met:
        yield f"The quality drop of {chosen.request} ({chosen.drop_name}) is {chosen.drop:.4f}, above its budget."
    if manifest.benchmark is not None:
        yield from unmet_speed(manifest.benchmark, recipe.require.min_speedup, recipe.require.min_decode_speedup)
    if recipe.require.max_quality_drop is not None and manifest.verification is not None:
        drop = manifest.verification.quality_drop
        if not drop <= recipe.require.max_quality_drop:
            yield (
                f"The quality drop ({manifest.verification.quality_metric}) is {drop:.4f}, above the allowed "
                f"{recipe.require.max_quality_drop:g}."
            )
