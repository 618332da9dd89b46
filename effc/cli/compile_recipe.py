"""The recipe that the flags of ``effc compile`` say."""

from __future__ import annotations

from typing import Any

from effc.cli.flags import parse_lengths
from effc.compiler.recipe import Recipe, build_recipe, load_recipe, merge
from effc.errors import UsageError

# Where in a recipe the value of a flag goes, as it is.
_PLACES = {
    "model": "model.path",
    "task": "model.task",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "attn": "attention.pattern",
    "attn_exclude": "attention.exclude",
    "force": "attention.force",
    "allow_partial": "attention.allow_partial",
    "max_length": "positions.max_length",
    "prune": "prune",
    "low_rank": "low_rank",
    "recover_data": "recover.data",
    "recover_loss": "recover.losses",
    "recover_lora": "recover.lora",
    "recover_fake_quant": "recover.fake_quant",
    "quant": "quantization.mode",
    "quant_smoothing": "quantization.smoothing",
    "quant_activations": "quantization.activations",
    "quant_weights": "quantization.weights.method",
    "quant_attention": "quantization.attention",
    "quant_kv_cache": "quantization.kv_cache",
    "quant_exclude": "quantization.exclude",
    "calibration": "quantization.calibration.data",
    "target": "target",
    "arch": "engine.arch",
    "shapes": "engine.shapes",
    "engine_precision": "engine.precision",
    "tensor_parallel": "engine.tensor_parallel",
    "embed_plugin": "engine.embed_plugin",
    "data": "verify.data",
    "checkpoint": "checkpoint.enabled",
    "require_speedup": "require.min_speedup",
    "require_decode_speedup": "require.min_decode_speedup",
    "max_quality_drop": "require.max_quality_drop",
}
_SWITCHED_OFF = {"no_plugin": "engine.plugin", "no_bench": "bench.enabled", "no_generation": "generation.enabled"}


def recipe_of(flags: dict[str, Any]) -> Recipe:
    """The recipe file with the given flags on top.

    Raises:
        UsageError: if a flag or a value of the file cannot be read.
    """
    over: dict[str, Any] = {}

    def put(value: Any, place: str) -> None:
        if value is None or value == ():
            return
        *sections, key = place.split(".")
        section = over
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = list(value) if isinstance(value, tuple) else value

    for flag, place in _PLACES.items():
        put(flags[flag], place)
    for flag, place in _SWITCHED_OFF.items():
        put(False if flags[flag] else None, place)
    for value in flags["positions"]:
        put(True if value == "sparse" else value, "positions.sparse" if value == "sparse" else "positions.method")
    if flags["recover"] == "default":
        put(True, "recover.enabled")
    else:
        put(flags["recover"], "recover.budget")
    put(_pairs(flags["quant_layer"]), "quantization.layers")
    put(parse_lengths(flags["lengths"]), "bench.lengths")
    base = load_recipe(flags["recipe"]) if flags["recipe"] else {}
    return build_recipe(merge(base, over), origin=flags["recipe"] or "the flags")


def _pairs(texts: tuple[str, ...]) -> dict[str, str] | None:
    if wrong := [text for text in texts if "=" not in text]:
        raise UsageError(f"'{wrong[0]}' is not GLOB=MODE.", "Write, for example, --quant-layer 'lm_head=int8-weights'.")
    return dict(text.rsplit("=", 1) for text in texts) or None
