"""The ``effc compile`` command that a recipe amounts to."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from effc.compiler.recipe import build_recipe

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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result
