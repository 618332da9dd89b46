"""``auto`` and ``duo``: choose the attention of every layer, or head, by measuring on texts.

``auto:BUDGET`` measures what each candidate does to the model when one layer alone computes it, orders the steps from
the source model to the cheapest assignment by arithmetic saved per squared output error (errors of different layers
add up like independent noise), and takes as many steps as the measured quality drop of the whole model allows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from effc.compiler.cache import cache_key, cached
from effc.compiler.calibration_text import CalibrationText, calibration_text
from effc.compiler.manifest import AttentionSearch, LayerSensitivity
from effc.compiler.recipe import Recipe, build_recipe
from effc.compiler.sensitivity import Effect, Variant, measure_effects
from effc.compiler.source import SourceModel
from effc.compiler.toolchain import toolchain
from effc.compiler.verify import torch_runner
from effc.errors import DataError, PreconditionError, UsageError
from effc.passes.assign_attention import matching_layers, within_own_window
from effc.passes.attention_settings import AttentionSection, Auto, Duo
from effc.passes.head_importance import choose_heads, head_importance, split_heads
from effc.passes.observed_attention import ObservedAttention
from effc.passes.rewrite_attention import check_exclusions, excluded, numbered_layers
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form
from effc.plugins.hook import ObservedLayer

Progress = Callable[[str, int, int], None]
SEARCH_VERSION = 1

# What a longer length costs is extrapolated from here: counting the pairs of a pattern takes length x length steps.
_LONGEST_COSTED = 8192
# Single steps tried behind the first that broke the budget.
_FURTHER_TRIES = 4
# Two ways to compute the same in fp32 differ by less.
_ROUNDING = 2e-5
_NO_ERROR = _ROUNDING**2
# Windows of the default candidates, as divisors of the length that is measured.
_WINDOW_DIVISORS = (16, 8, 4, 2)


def search_attention(
    model: str | Path,
    request: str = "auto:0.02",
    *,
    data: str | Path,
    candidates: Sequence[str] = (),
    length: int | None = None,
    samples: int = 8,
    max_length: int = 512,
    task: str | None = None,
    progress: Progress | None = None,
) -> AttentionSearch:
    """Choose a form for every layer, or head, of a model by measuring on texts, without compiling it.

    What it finds can be compiled: ``effc.compile(model, attention={"layers": found.assignment()})``.

    Args:
        model: local directory, GGUF file or hub name.
        request: ``auto:BUDGET`` or ``duo:SHARE:WINDOW:SINKS``, see :mod:`effc.compiler.attention_search`; other layers
            can be given their form as in ``auto:0.02,0-1=dense``.
        data: file with texts, see :func:`effc.compiler.data.read_samples`.
        candidates: forms that ``auto`` chooses from; windows when empty.
        length: tokens at which arithmetic is counted; the model's maximum when None.
        samples, max_length: how many texts to measure on and tokens of each at most.
        task: detected from the config when None.
        progress: told of every run.

    Raises:
        UsageError: if the request names forms only, so that nothing is left to choose.
        SourceModelError, DataError, PreconditionError: see each.
    """
    from effc.compiler.pipeline import observe_attention
    from effc.compiler.source import load, locate

    section = {"pattern": request, "candidates": list(candidates), "samples": samples, "max_length": max_length}
    values: dict[str, Any] = {
        "model": {"path": str(model), "task": task},
        "attention": section | {"data": str(data)},
        "bench": {"lengths": [] if length is None else [length]},
    }
    recipe = build_recipe(values, origin="the arguments")
    if not needs_search(recipe.attention):
        raise UsageError(f"'{request}' leaves nothing to choose.", "Write, for example, auto:0.02 or duo:0.5.")
    source = load(locate(recipe.model))
    return search(source, observe_attention(source), recipe, progress)[0]


def needs_search(settings: AttentionSection) -> bool:
    """Whether the section leaves the choice of forms to effc."""
    return isinstance(settings.request, Auto | Duo)


def search(
    source: SourceModel, observed: ObservedAttention, recipe: Recipe, progress: Progress | None = None
) -> tuple[AttentionSearch, bool]:
    """Choose what the recipe's ``auto`` or ``duo`` leaves open; the same question is answered from the cache.

    Returns:
        the record, and whether it came from the cache.

    Raises:
        DataError: if there are no texts to measure on, or only texts too short to tell.
        PreconditionError: if no layer is left to choose for.
    """
    settings = recipe.attention
    texts = calibration_text(recipe, source, f"'{settings.pattern}'")
    length = target_length(source, recipe)
    key = cache_key(
        version=SEARCH_VERSION,
        fingerprint=source.located.fingerprint,
        task=source.task.name,
        attention=settings.model_dump(mode="json"),
        max_length=source.max_length,
        positions=None if source.positions is None else source.positions.model_dump(mode="json"),
        length=length,
        texts=_digest(texts),
        toolchain=toolchain(),
    )

    def make(directory: Path) -> None:
        started = time.perf_counter()
        record = _search(source, observed, settings, texts, length, progress)
        record.seconds = time.perf_counter() - started
        (directory / "search.json").write_text(record.model_dump_json(), encoding="utf-8")

    entry, hit = cached("search", key, make)
    return AttentionSearch.model_validate_json((entry / "search.json").read_text(encoding="utf-8")), hit


def resolved(settings: AttentionSection, found: AttentionSearch) -> AttentionSection:
    """The section with what was found in place of ``auto`` or ``duo``; entries that the user gave stay on top."""
    layers = {name: form for name, form in found.assignment().items()}
    values = settings.model_dump() | {"pattern": "dense", "layers": layers | settings.layers}
    return AttentionSection.model_validate(values)


def target_length(source: SourceModel, recipe: Recipe) -> int:
    """Tokens at which arithmetic is counted: the longest to be benchmarked, or the model's maximum."""
    wanted = max(recipe.bench.lengths) if recipe.bench.lengths else source.max_length
    return min(wanted or _LONGEST_COSTED, _LONGEST_COSTED)


@dataclass
class _Task:
    """One search under way."""

    source: SourceModel
    observed: ObservedAttention
    settings: AttentionSection
    texts: CalibrationText
    length: int
    progress: Progress | None
    total: int = 0
    runs: int = 0
    fixed: dict[str, AttentionForm] = field(default_factory=dict)

    def measure(self, variants: Sequence[Variant]) -> list[Effect]:
        """The effects of whole variants, on top of what the user fixed for other layers."""
        self.total = max(self.total, self.runs + len(variants) * len(self.texts.batches))
        return measure_effects(self.source, self.observed, variants, self.texts, self.count)

    def count(self) -> None:
        """Another batch has run."""
        self.runs += 1
        if self.progress:
            self.progress(f"measuring {self.settings.pattern}", self.runs, self.total)

    def cost(self, assignment: Mapping[str, AttentionForm]) -> int:
        """Floating-point operations of all heads of all layers."""
        return sum(
            layer.num_heads * _flops(self.form_of(layer, assignment), self.length, layer)
            for layer in self.observed.rewritable
        )

    def form_of(self, layer: ObservedLayer, assignment: Mapping[str, AttentionForm]) -> AttentionForm:
        """What a layer computes under an assignment."""
        return assignment.get(layer.name, layer.visibility.pattern)

    def record(self, columns: list[str], layers: list[LayerSensitivity], chosen: Variant) -> AttentionSearch:
        """The finished search; measures the whole choice."""
        effect = self.measure([self.fixed | dict(chosen)])[0]
        return AttentionSearch(
            request=self.settings.pattern,
            data=self.texts.data,
            samples=len(self.texts.samples),
            tokens=self.texts.tokens,
            longest=self.texts.longest,
            target_length=self.length,
            columns=columns,
            layers=layers,
            error=effect.error,
            error_name=effect.error_name,
            output_error=effect.output_error,
            cost_share=self.cost(self.fixed | dict(chosen)) / max(1, self.cost({})),
            runs=self.runs,
            seconds=0.0,
        )


def _search(
    source: SourceModel,
    observed: ObservedAttention,
    settings: AttentionSection,
    texts: CalibrationText,
    length: int,
    progress: Progress | None,
) -> AttentionSearch:
    names = numbered_layers(observed.layers, settings)
    check_exclusions(settings, [*(layer.name for layer in observed.layers), *observed.bypassing])
    task = _Task(source, observed, settings, texts, length, progress)
    layers = {layer.name: layer for layer in observed.rewritable}
    for key, text in settings.layers.items():
        for name in matching_layers(key, names):
            if name in layers:
                task.fixed[name] = _possible(observed, layers[name], parse_form(text))
    for name, layer in layers.items():
        if excluded(name, settings):
            task.fixed[name] = layer.visibility.pattern
    open_layers = [layer for name, layer in layers.items() if name not in task.fixed]
    if not open_layers:
        raise PreconditionError(
            f"'{settings.pattern}' has no layer left to choose for.", "Give fewer layers their form, or exclude fewer."
        )
    request = settings.request
    if isinstance(request, Duo):
        return _duo(task, open_layers, request)
    assert isinstance(request, Auto)
    return _auto(task, open_layers, request)


# --- auto ----------------------------------------------------------------------------------------------------------


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


def _auto(task: _Task, layers: list[ObservedLayer], request: Auto) -> AttentionSearch:
    columns = candidates(task, layers)
    tried: list[tuple[ObservedLayer, int, AttentionForm]] = []
    for layer in layers:
        own = layer.num_heads * _flops(layer.visibility.pattern, task.length, layer)
        for column, text in enumerate(columns):
            form = _possible(task.observed, layer, parse_form(text))
            if layer.num_heads * _flops(form, task.length, layer) < own:
                tried.append((layer, column, form))
    if not tried:
        raise PreconditionError(
            f"No candidate ({', '.join(columns)}) is cheaper at {task.length} tokens than what the model has.",
            "Give narrower ones in attention.candidates, or a longer length with --lengths.",
        )
    task.total = (len(tried) + 8) * len(task.texts.batches)
    effects = task.measure([{layer.name: form} for layer, _, form in tried])
    if not any(effect.output_error > _ROUNDING for effect in effects):
        raise DataError(
            f"No candidate changes anything on these texts, whose longest has {task.texts.longest} tokens.",
            "Give longer texts, or narrower forms in attention.candidates.",
        )
    options: dict[str, dict[int, Option]] = {layer.name: {} for layer in layers}
    for (layer, column, form), effect in zip(tried, effects, strict=True):
        options[layer.name][column] = Option(form, layer.num_heads * _flops(form, task.length, layer), effect)
    own_cost = {layer.name: layer.num_heads * _flops(layer.visibility.pattern, task.length, layer) for layer in layers}
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


def candidates(task: _Task, layers: list[ObservedLayer]) -> list[str]:
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
    return sorted(forms, key=lambda text: _flops(forms[text], task.length, layers[0]))


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


# --- duo -----------------------------------------------------------------------------------------------------------


def _duo(task: _Task, layers: list[ObservedLayer], request: Duo) -> AttentionSearch:
    streaming: dict[str, AttentionForm] = {}
    for layer in layers:
        form = within_own_window(layer.visibility.pattern, request.streaming, layer.visibility.causal)
        if form != layer.visibility.pattern:
            streaming[layer.name] = form
    if not streaming:
        raise PreconditionError(
            f"Every layer has a window of its own that is at most as wide as '{request.streaming}'.",
            "Leave them as they are, or give a narrower window, for example duo:0.5:64.",
        )
    model = torch_runner(task.source)
    task.total = 2 * len(task.texts.batches)

    def run(batch: Mapping[str, Any]) -> None:
        model(batch)
        task.count()

    importance = head_importance(task.observed, streaming, task.texts.batches, run)
    if not any(value > _ROUNDING for values in importance.values() for value in values):
        raise DataError(
            f"'{request.streaming}' changes nothing on these texts, whose longest has {task.texts.longest} tokens.",
            "Give longer texts, or a narrower window, for example duo:0.5:64.",
        )
    kept = choose_heads(importance, request.share)
    measured = [layer for layer in layers if layer.name in streaming]
    chosen = {layer.name: split_heads(layer, kept[layer.name], streaming[layer.name]) for layer in measured}
    heads = max(layer.kv_heads for layer in measured)
    rows = [
        LayerSensitivity(
            layer=layer.name,
            values=[*importance[layer.name], *([None] * (heads - layer.kv_heads))],
            chosen=str(chosen[layer.name]),
            kept=kept[layer.name],
        )
        for layer in measured
    ]
    return task.record([str(head) for head in range(heads)], rows, chosen)


# --- both ----------------------------------------------------------------------------------------------------------


def _possible(observed: ObservedAttention, layer: ObservedLayer, form: AttentionForm) -> AttentionForm:
    """The form as the layer can compute it.

    Raises:
        PreconditionError: if it cannot.
    """
    return within_own_window(layer.visibility.pattern, observed.checked(form, layer), layer.visibility.causal)


def _flops(form: AttentionForm, length: int, layer: ObservedLayer) -> int:
    return _head_flops(form, length, layer.visibility.causal, layer.head_dim)


@cache
def _head_flops(form: AttentionForm, length: int, causal: bool, head_dim: int) -> int:
    return form.cost(length, causal, head_dim).flops


def _power_of_two(number: int) -> int:
    """The largest that is at most ``number``."""
    return 1 << (max(1, number).bit_length() - 1)


def _digest(texts: CalibrationText) -> str:
    content = hashlib.sha256()
    for batch in texts.batches:
        for name in sorted(batch):
            content.update(name.encode() + batch[name].tobytes())
    for sample in texts.samples:
        content.update(repr(sample.label).encode())
    return content.hexdigest()
