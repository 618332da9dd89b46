"""``auto`` and ``duo``: choose the attention of every layer, or head, by measuring on texts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effc.compiler.cache import cache_key, cached
from effc.compiler.calibration_text import CalibrationText, calibration_text
from effc.compiler.choose_heads import choose_streaming
from effc.compiler.choose_layers import choose_layers
from effc.compiler.manifest import AttentionSearch
from effc.compiler.progress import Progress
from effc.compiler.recipe import Recipe, build_recipe
from effc.compiler.rewrite import observe_attention
from effc.compiler.search_task import SearchTask, possible
from effc.compiler.source import SourceModel, load, locate
from effc.compiler.toolchain import toolchain
from effc.errors import PreconditionError, UsageError
from effc.passes.assign_attention import matching_layers
from effc.passes.attention_settings import AttentionSection, Auto, Duo
from effc.passes.observed_attention import ObservedAttention
from effc.passes.rewrite_attention import check_exclusions, excluded, numbered_layers
from effc.plugins.forms.registry import parse_form

SEARCH_VERSION = 1

# Arithmetic of longer targets is counted here: counting the pairs of a pattern takes length x length steps.
_LONGEST_COSTED = 8192


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
        weights=source.weights,
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
    values = settings.model_dump() | {"pattern": "dense", "layers": found.assignment() | settings.layers}
    return AttentionSection.model_validate(values)


def target_length(source: SourceModel, recipe: Recipe) -> int:
    """Tokens at which arithmetic is counted: the longest to be benchmarked, or the model's maximum."""
    wanted = max(recipe.bench.lengths) if recipe.bench.lengths else source.max_length
    return min(wanted or _LONGEST_COSTED, _LONGEST_COSTED)


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
    task = SearchTask(source, observed, settings, texts, length, progress)
    layers = {layer.name: layer for layer in observed.rewritable}
    for key, text in settings.layers.items():
        for name in matching_layers(key, names):
            if name in layers:
                task.fixed[name] = possible(observed, layers[name], parse_form(text))
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
        return choose_streaming(task, open_layers, request)
    assert isinstance(request, Auto)
    return choose_layers(task, open_layers, request)


def _digest(texts: CalibrationText) -> str:
    content = hashlib.sha256()
    for batch in texts.batches:
        for name in sorted(batch):
            content.update(name.encode() + batch[name].tobytes())
    for sample in texts.samples:
        content.update(repr(sample.label).encode())
    return content.hexdigest()
