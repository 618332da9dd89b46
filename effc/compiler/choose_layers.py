"""``auto``: the cheapest form for every layer that a budget of quality allows.

What each candidate does to the model when one layer alone computes it is measured. Steps from the source model to the
cheapest assignment are ordered by arithmetic saved per squared output error (errors of different layers add up like
independent noise), and as many are taken as the measured quality drop of the whole model allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from effc.compiler.manifest import AttentionSearch, LayerSensitivity
from effc.compiler.search_task import ROUNDING, SearchTask, flops_of, possible
from effc.compiler.sensitivity import Effect
from effc.errors import DataError, PreconditionError
from effc.passes.attention_settings import Auto
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form
from effc.plugins.hook import ObservedLayer

# Single steps tried behind the first that broke the budget.
_FURTHER_TRIES = 4
_NO_ERROR = ROUNDING**2
# Windows of the default candidates, as divisors of the length that is measured.
_WINDOW_DIVISORS = (16, 8, 4, 2)


@dataclass(frozen=True)
class Option:
    """One candidate of one layer."""

    form: AttentionForm
    cost: int
    effect: Effect


@dataclass(frozen=True)
class Step:
    """From one option of a layer to the next cheaper one. ``gain`` is arithmetic saved per squared error added."""

    layer: str
    form: AttentionForm
    gain: float


def choose_layers(task: SearchTask, layers: list[ObservedLayer], request: Auto) -> AttentionSearch:
    """Choose a form for each of ``layers`` within the budget.

    Raises:
        DataError: if the texts are too short to tell candidates apart.
        PreconditionError: if no candidate is cheaper, or what is fixed breaks the budget already.
    """
    columns = candidates(task, layers)
    tried: list[tuple[ObservedLayer, int, AttentionForm]] = []
    own_cost = {
        layer.name: layer.num_heads * flops_of(layer.visibility.pattern, task.length, layer) for layer in layers
    }
    for layer in layers:
        for column, text in enumerate(columns):
            form = possible(task.observed, layer, parse_form(text))
            if layer.num_heads * flops_of(form, task.length, layer) < own_cost[layer.name]:
                tried.append((layer, column, form))
    if not tried:
        raise PreconditionError(
            f"No candidate ({', '.join(columns)}) is cheaper at {task.length} tokens than what the model has.",
            "Give narrower ones in attention.candidates, or a longer length with --lengths.",
        )
    task.total = (len(tried) + 8) * len(task.texts.batches)
    effects = task.measure([{layer.name: form} for layer, _, form in tried])
    if not any(effect.output_error > ROUNDING for effect in effects):
        raise DataError(
            f"No candidate changes anything on these texts, whose longest has {task.texts.longest} tokens.",
            "Give longer texts, or narrower forms in attention.candidates.",
        )
    options: dict[str, dict[int, Option]] = {layer.name: {} for layer in layers}
    for (layer, column, form), effect in zip(tried, effects, strict=True):
        options[layer.name][column] = Option(form, layer.num_heads * flops_of(form, task.length, layer), effect)
    steps = [step for name in options for step in efficient_steps(name, own_cost[name], [*options[name].values()])]
    steps.sort(key=lambda step: -step.gain)
    chosen = within_budget(steps, request.budget, lambda forms: task.measure([task.fixed | forms])[0].error)
    if not chosen and task.fixed and task.measure([task.fixed])[0].error > request.budget:
        raise PreconditionError(
            f"The layers whose form is fixed alone lose more than {request.budget:g}.",
            "Raise the budget, or give them wider forms.",
        )
    rows = [_row(layer, options[layer.name], chosen.get(layer.name), len(columns)) for layer in layers]
    return task.record(columns, rows, chosen)


def _row(
    layer: ObservedLayer, options: Mapping[int, Option], chosen: AttentionForm | None, columns: int
) -> LayerSensitivity:
    effects = [options[column].effect if column in options else None for column in range(columns)]
    return LayerSensitivity(
        layer=layer.name,
        values=[effect and effect.output_error for effect in effects],
        attention_errors=[effect and effect.attention_error for effect in effects],
        drops=[effect and effect.drop for effect in effects],
        chosen=str(chosen or layer.visibility.pattern),
        kept=[column for column, option in options.items() if option.form == chosen],
    )


def candidates(task: SearchTask, layers: list[ObservedLayer]) -> list[str]:
    """The recipe's candidates, or windows up to half the length that can be measured, cheapest first.

    Encoders get their first token as a global one, language models keep theirs as sinks.
    """
    texts = task.settings.candidates
    if not texts:
        length = min(task.length, task.texts.longest)
        windows = sorted({max(2, _power_of_two(length // divisor)) for divisor in _WINDOW_DIVISORS})
        causal = all(layer.visibility.causal for layer in layers)
        texts = tuple(f"local:{w}|sinks:4" if causal else f"local:{w}|global:1" for w in windows)
    forms = {str(parse_form(text)): parse_form(text) for text in texts}
    return sorted(forms, key=lambda text: flops_of(forms[text], task.length, layers[0]))


def efficient_steps(layer: str, own_cost: int, options: Sequence[Option]) -> list[Step]:
    """The steps along the lower convex hull of cost over squared error, which starts at the source's own attention.

    Options beside the hull are never the best use of a budget. Gains fall from step to step.
    """
    steps: list[Step] = []
    cost, error = own_cost, 0.0
    left = list(options)
    while left := [option for option in left if option.cost < cost]:
        gains = [(cost - o.cost) / max(o.effect.output_error**2 - error, _NO_ERROR) for o in left]
        gain, _, best = max(zip(gains, [-o.cost for o in left], left, strict=True), key=lambda entry: entry[:2])
        steps.append(Step(layer, best.form, gain))
        cost, error = best.cost, max(error, best.effect.output_error**2)
    return steps


def within_budget(
    steps: Sequence[Step], budget: float, error: Callable[[dict[str, AttentionForm]], float]
) -> dict[str, AttentionForm]:
    """The longest run of steps whose measured error is within the budget, found by halving, and some single steps
    behind the first that broke it. What is returned was measured to be within the budget, or is empty.
    """

    def after(count: int) -> dict[str, AttentionForm]:
        return {step.layer: step.form for step in steps[:count]}

    fits, breaks = 0, len(steps) + 1
    while breaks - fits > 1:
        # The cheapest assignment first: where it is good enough, nothing else needs to be measured.
        middle = len(steps) if breaks > len(steps) else (fits + breaks) // 2
        if error(after(middle)) <= budget:
            fits = middle
        else:
            breaks = middle
    chosen = after(fits)
    closed = {step.layer for step in steps[fits : fits + 1]}
    tries = 0
    for step in steps[fits + 1 :]:
        # A later step of a layer starts from its earlier one.
        if step.layer in closed:
            continue
        if tries == _FURTHER_TRIES:
            break
        tries += 1
        if error(chosen | {step.layer: step.form}) <= budget:
            chosen[step.layer] = step.form
        else:
            closed.add(step.layer)
    return chosen


def _power_of_two(number: int) -> int:
    """The largest that is at most ``number``."""
    return 1 << (max(1, number).bit_length() - 1)
