"""One search for attention under way: model, texts, what is fixed, and what an assignment loses and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from effc.compiler.calibration_text import CalibrationText
from effc.compiler.manifest import AttentionSearch, LayerSensitivity
from effc.compiler.progress import Progress
from effc.compiler.sensitivity import Effect, Variant, measure_effects
from effc.compiler.source import SourceModel
from effc.passes.assign_attention import within_own_window
from effc.passes.attention_settings import AttentionSection
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.base import AttentionForm
from effc.plugins.hook import ObservedLayer

ROUNDING = 2e-5
"""Relative errors below this are two ways to compute the same in fp32."""


@dataclass
class SearchTask:
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
            layer.num_heads * flops_of(self.form_of(layer, assignment), self.length, layer)
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


def possible(observed: ObservedAttention, layer: ObservedLayer, form: AttentionForm) -> AttentionForm:
    """The form as the layer can compute it.

    Raises:
        PreconditionError: if it cannot.
    """
    return within_own_window(layer.visibility.pattern, observed.checked(form, layer), layer.visibility.causal)


def flops_of(form: AttentionForm, length: int, layer: ObservedLayer) -> int:
    """Floating-point operations of one head of a layer."""
    return _head_flops(form, length, layer.visibility.causal, layer.head_dim)


@cache
def _head_flops(form: AttentionForm, length: int, causal: bool, head_dim: int) -> int:
    return form.cost(length, causal, head_dim).flops
