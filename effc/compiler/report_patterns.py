"""What the forms of an artifact look like, and their share of dense attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from effc.compiler.manifest import Manifest
from effc.compiler.report_plots import visibility
from effc.errors import EffcError
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form
from effc.plugins.pattern import DENSE, Pattern


@dataclass(frozen=True)
class PatternPicture:
    """One distinct form with its picture and its exact share of dense attention.

    ``shares`` are visible pairs of position-based patterns, arithmetic of all other forms, by length. ``missing`` says
    why there is no picture.
    """

    text: str
    causal: bool
    layers: int
    image: str | None
    covered: int
    step: int
    shares: list[tuple[int, float]]
    counts_pairs: bool
    missing: str = ""


def picture_patterns(manifest: Manifest) -> list[PatternPicture]:
    """A picture for each distinct (pattern, causality) that the compiled model runs."""
    limit = manifest.source.max_length
    lengths = manifest.benchmark.lengths if manifest.benchmark else []
    lengths = sorted(lengths) or [n for n in (128, 512, 1024, 2048, 4096, 8192) if limit is None or n <= limit] or [128]
    head_dim = {(layer.pattern, layer.causal): layer.head_dim for layer in manifest.attention}
    result = []
    for (text, causal), count in Counter((layer.pattern, layer.causal) for layer in manifest.attention).items():
        form = readable_pattern(text)
        if form is None:
            missing = "this version of effc does not know the pattern"
            result.append(PatternPicture(text, causal, count, None, 0, 0, [], False, missing))
            continue
        picture = visibility(form, causal, lengths[-1])
        image, covered, step = picture or (None, 0, 0)
        shares = [] if form.is_dense else [(n, dense_share(form, n, causal, head_dim[text, causal])) for n in lengths]
        missing = "" if picture else "what a query sees depends on the content"
        pairs = isinstance(form, Pattern)
        result.append(PatternPicture(text, causal, count, image, covered, step, shares, pairs, missing))
    return result


def dense_share(form: AttentionForm, length: int, causal: bool, head_dim: int) -> float:
    """Visible pairs of a pattern, or the arithmetic of any other form, over that of dense attention."""
    if isinstance(form, Pattern):
        return form.density(length, causal)
    return form.cost(length, causal, head_dim).flops / DENSE.cost(length, causal, head_dim).flops


def readable_pattern(text: str) -> AttentionForm | None:
    """The pattern, or None for one that a newer effc wrote: a report without its picture is better than none."""
    try:
        return parse_form(text)
    except EffcError:
        return None
