"""Refusing forms that lose too much without training, with the figure that says how much."""

from __future__ import annotations

from effc.compiler.calibration_text import CalibrationText, calibration_text, names_text, random_text
from effc.compiler.recipe import Recipe
from effc.compiler.sensitivity import measure_effects
from effc.compiler.source import SourceModel
from effc.errors import PreconditionError
from effc.passes.observed_attention import ObservedAttention


def refuse_untrained(source: SourceModel, observed: ObservedAttention, recipe: Recipe) -> None:
    """Refuse a model whose assigned attention needs training, unless the recipe accepts it untrained.

    The quality that is named was measured on the texts of the recipe, or on random inputs where it has none.

    Raises:
        PreconditionError: naming the forms, their layers, and what was measured.
    """
    needing = {name: form for name, form in observed.forms.items() if form.needs_recovery}
    if not needing or recipe.attention.force:
        return
    texts = _texts(recipe, source)
    effect = measure_effects(source, observed, [observed.forms], texts)[0]
    forms = ", ".join(f"'{form}'" for form in dict.fromkeys(map(str, needing.values())))
    layers = f"{next(iter(needing))} and {len(needing) - 1} more" if len(needing) > 1 else next(iter(needing))
    what = f"{len(texts.samples)} samples of {texts.data}" if texts.samples else texts.data
    raise PreconditionError(
        f"{forms} ({layers}) changes what the model computes and needs training afterwards. Untrained, on {what}: "
        f"{effect.drop_name} {effect.drop:.4g}, cosine of the output {effect.cosine:.4f}, "
        f"relative error {effect.output_error:.4g}.",
        "Compile with --force (attention.force in the recipe) to keep it untrained, or use a form that needs no "
        "training, such as local:256|global:1.",
    )


def _texts(recipe: Recipe, source: SourceModel) -> CalibrationText:
    if not names_text(recipe, source):
        return random_text(source, recipe.attention.max_length)
    return calibration_text(recipe, source, "The refusal of a form")
