"""Where a model's own attention goes: its mass by distance, and what share of it a pattern would keep.

The model runs with an attention function that computes what transformers' eager function does, some rows at a time, and
adds the weights of those rows up. Neither a layer's weights nor a text's are ever held as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.attention_recorder import HeadSums, recording
from effc.compiler.calibration_text import CalibrationText, calibration_text
from effc.compiler.progress import Progress
from effc.compiler.recipe import build_recipe
from effc.errors import PassFailedError, PreconditionError, UsageError
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.forms.registry import parse_form

if TYPE_CHECKING:
    from effc.compiler.source import SourceModel

DEFAULT_CANDIDATES = ("local:64", "local:128", "local:256", "local:512", "local:256|sinks:4", "local:256|global:1")
# What the streaming function may differ from the model's own attention.
_FAITHFUL = 1e-3


@dataclass(frozen=True)
class LayerMass:
    """The attention of one module, averaged over the real (not padded) queries of all texts.

    Attributes:
        layer: the module's name.
        causal: whether it sees only what lies before.
        mass: ``[heads, 2 * longest - 1]``: share of a query's attention at ``query - key`` from ``1 - longest`` on.
            Rows add up to 1.
        kept: by candidate, ``[heads]``: share of the attention that lies on pairs the candidate sees.
    """

    layer: str
    causal: bool
    mass: NDArray[np.float64]
    kept: Mapping[str, NDArray[np.float64]]

    @property
    def mean_distance(self) -> NDArray[np.float64]:
        """``[heads]``: mean of ``|query - key|`` under the attention."""
        longest = (self.mass.shape[1] + 1) // 2
        return self.mass @ np.abs(np.arange(1 - longest, longest)).astype(np.float64)

    def by_distance(self, edges: Sequence[int]) -> NDArray[np.float64]:
        """``[heads, len(edges) - 1]``: mass at absolute distances from one edge up to, not including, the next."""
        longest = (self.mass.shape[1] + 1) // 2
        distance = np.abs(np.arange(1 - longest, longest))
        columns = [self.mass[:, (distance >= low) & (distance < high)].sum(axis=1) for low, high in pairwise(edges)]
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class AttentionMass:
    """The attention of a model on some texts.

    Attributes:
        model: where the model is from.
        data: where the texts are from.
        samples: number of texts.
        tokens: real tokens in all.
        longest: tokens of the longest.
        candidates: the forms that were tried, in canonical text form.
        layers: in execution order.
    """

    model: str
    data: str
    samples: int
    tokens: int
    longest: int
    candidates: tuple[str, ...]
    layers: tuple[LayerMass, ...]

    def overall(self, candidate: str) -> float:
        """Mean share of attention that a candidate keeps, over all layers and heads."""
        return float(np.mean(np.concatenate([layer.kept[candidate] for layer in self.layers])))

    def edges(self) -> list[int]:
        """Edges of the distance bins of pictures and JSON: 0, 1, 2, 4, 8 ... beyond the longest text."""
        edges = [0, 1]
        while edges[-1] < self.longest:
            edges.append(edges[-1] * 2)
        return edges

    def save(self, path: str | Path) -> None:
        """Draw mass over distance and mean distances; the suffix (.png, .svg, .pdf) says what kind of image.

        Raises:
            UsageError: if the format is unknown.
        """
        from effc.compiler.attention_mass_plot import mass_figure
        from effc.compiler.attention_pictures import save_figure

        save_figure(mass_figure(self), path)

    def as_json(self) -> dict[str, Any]:
        """Plain values, with mass by bins of distance in place of every distance."""
        edges = self.edges()
        return {
            "model": self.model,
            "data": self.data,
            "samples": self.samples,
            "tokens": self.tokens,
            "longest": self.longest,
            "distance_edges": edges,
            "kept": {candidate: self.overall(candidate) for candidate in self.candidates},
            "layers": [
                {
                    "layer": layer.layer,
                    "causal": layer.causal,
                    "mean_distance": layer.mean_distance.tolist(),
                    "mass_by_distance": layer.by_distance(edges).tolist(),
                    "kept": {candidate: layer.kept[candidate].tolist() for candidate in self.candidates},
                }
                for layer in self.layers
            ],
        }


def attention_mass(
    model: str | Path,
    *,
    text: str | Path,
    samples: int = 8,
    max_length: int = 512,
    candidates: Sequence[str] = (),
    task: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> AttentionMass:
    """Measure where a model's own, dense attention goes on real texts.

    Args:
        model: local directory, GGUF file or hub name.
        text: file with texts, see :func:`effc.compiler.data.read_samples`; long ones among them are taken.
        samples, max_length: texts and tokens of each at most.
        candidates: forms whose share of the attention is counted; windows when empty. Each pair counts by the share
            that ``form.picture`` gives it: 1 where it is attended exactly.
        task, revision, trust_remote_code: as for :func:`effc.compile`.
        progress: told of every batch.

    Raises:
        UsageError: on a candidate that is unknown, or that sees what the content decides.
        SourceModelError, DataError, PreconditionError: if the model, the texts or its attention cannot be used.
        PassFailedError: if the attention could not be reproduced.
    """
    wanted = [str(candidate) for candidate in candidates] or list(DEFAULT_CANDIDATES)
    forms = [parse_form(candidate) for candidate in wanted]
    for form in forms:
        if form.picture(1, False) is None:
            raise UsageError(
                f"What '{form}' sees depends on the text, so its share of the attention is not known beforehand.",
                "Give position-based candidates, for example local:256|sinks:4.",
            )
    values: dict[str, Any] = {
        "model": {"path": str(model), "task": task, "revision": revision, "trust_remote_code": trust_remote_code},
        "attention": {"samples": samples, "max_length": max_length, "data": str(text)},
    }
    recipe = build_recipe(values, origin="the arguments")
    from effc.compiler.source import load, locate

    if progress is not None:
        progress("loading", 0, 0)
    source = load(locate(recipe.model))
    texts = calibration_text(recipe, source, "effc attention")
    return _measure(source, texts, forms, str(model), progress)


def _measure(
    source: SourceModel,
    texts: CalibrationText,
    forms: Sequence[AttentionForm],
    model: str,
    progress: Progress | None,
) -> AttentionMass:
    from effc.compiler.rewrite import observe_attention
    from effc.compiler.verify import torch_runner
    from effc.passes.assign_attention import check_form, with_token_ids

    run = torch_runner(source)
    before = run(texts.batches[0])
    observed = [layer for layer in observe_attention(source).layers if not layer.cross]
    for form in forms:
        if isinstance(form, HeadForms):
            for layer in observed:
                check_form(form, layer)
    candidates = [with_token_ids(form, source.processor) for form in forms]
    sums = {layer.module: HeadSums(layer, candidates, texts.longest) for layer in observed}
    for number, batch in enumerate(texts.batches):
        if progress is not None:
            progress("texts", number, len(texts.batches))
        with recording(source, sums, batch):
            after = run(batch)
        if number == 0:
            _check_faithful(before, after, batch.get("attention_mask"))
    if progress is not None:
        progress("texts", len(texts.batches), len(texts.batches))
    silent = [item.layer.name for item in sums.values() if not item.queries]
    if silent:
        raise PreconditionError(
            f"The attention of {silent[0]} could not be read.",
            "Measure an encoder or a decoder of its own, not both in one.",
        )
    named = tuple(str(form) for form in forms)
    return AttentionMass(
        model,
        texts.data,
        len(texts.samples),
        texts.tokens,
        texts.longest,
        named,
        tuple(LayerMass(item.layer.name, item.layer.visibility.causal, *item.result(named)) for item in sums.values()),
    )


def _check_faithful(before: Mapping[str, Any], after: Mapping[str, Any], mask: Any) -> None:
    for name, reference in before.items():
        difference, size = after[name] - reference, reference
        if mask is not None and reference.shape[:2] == mask.shape:
            difference, size = difference[mask.astype(bool)], reference[mask.astype(bool)]
        error = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(size)), 1e-12)
        if not error <= _FAITHFUL:
            raise PassFailedError(
                f"The model's attention could not be reproduced: output '{name}' is off by {error:.2g}.",
                "This architecture gives its attention arguments that effc does not know; please report it.",
            )
