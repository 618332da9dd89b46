"""Fitting assigned forms that have something to fit to the texts that a recipe names."""

from __future__ import annotations

from typing import Any

from effc.compiler.calibration_text import calibration_text, names_text
from effc.compiler.recipe import Recipe
from effc.compiler.source import SourceModel
from effc.compiler.verify import torch_runner
from effc.errors import DataError
from effc.passes.calibrate_dynamic import calibrate
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.content import Dynamic
from effc.plugins.forms.heads import HeadForms


def calibrate_forms(source: SourceModel, observed: ObservedAttention, recipe: Recipe) -> dict[str, Any]:
    """Fit the scorers of ``dynamic`` layers where the recipe names texts.

    Returns:
        figures for the record of the rewrite: per layer what share of the attention to distant keys the tokens chosen
        receive, before and after; or why nothing was fitted. Empty where no layer is ``dynamic``.
    """
    if not any(_is_dynamic(form) for form in observed.forms.values()):
        return {}
    if not names_text(recipe, source):
        return {"calibration": "none: no text was given, so importance is the norm of the keys"}
    texts = calibration_text(recipe, source, "Calibration")
    try:
        fits = calibrate(observed, texts.batches, torch_runner(source))
    except DataError as error:
        return {"calibration": f"none: {error.problem}"}
    return {
        "calibration": texts.data,
        "distant_attention_caught": {name: [fit.caught_before, fit.caught] for name, fit in fits.items()},
    }


def _is_dynamic(form: object) -> bool:
    parts = [part for part, _ in form.parts] if isinstance(form, HeadForms) else [form]
    return any(isinstance(part, Dynamic) for part in parts)
