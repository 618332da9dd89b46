"""Replace a model's attention by other forms, through transformers' attention interface and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from effc.errors import PreconditionError
from effc.passes.assign_attention import forms_of_layers, within_own_window
from effc.passes.attention_settings import AttentionSection
from effc.passes.base import Pass, PassResult
from effc.passes.bypassing import BYPASSES
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.forms.terms import Dense, Sinks
from effc.plugins.hook import LayerPlan, ObservedLayer
from effc.plugins.pattern import DENSE, Pattern
from effc.suggest import did_you_mean


class RewriteAttention(Pass[PreTrainedModel, PreTrainedModel]):
    """Give every attention module that comes through the interface the form that the recipe has for it.

    Args:
        settings: the recipe's ``attention`` section; its pattern must be a form, not a search for one.
        inputs: forward arguments for one observing run.
        processor: the model's tokenizer, for forms that name tokens.
        observed: the model's modules, where they have been observed already.

    After :meth:`run`, ``layers`` holds what was found and decided, in execution order, and ``observed`` lets forms be
    changed again.
    """

    name: ClassVar[str] = "rewrite-attention"
    version: ClassVar[int] = 2

    def __init__(
        self,
        settings: AttentionSection,
        inputs: Mapping[str, torch.Tensor],
        processor: Any | None = None,
        observed: ObservedAttention | None = None,
    ):
        self.settings: AttentionSection = settings
        self.observed = observed
        self._inputs, self._processor = inputs, processor
        self.layers: list[tuple[ObservedLayer, LayerPlan, str | None]] = []
        self.bypassing: list[str] = []

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Observe, decide and assign.

        Raises:
            PreconditionError: if no module can be rewritten, a module cannot compute its form, or an exclusion or a
                range of layers matches nothing.
            PassFailedError: if the hook does not reproduce the model's own attention.
        """
        observed = self.observed or ObservedAttention(model, self._inputs, self._processor)
        self.observed = observed
        names = [layer.name for layer in observed.layers]
        check_exclusions(self.settings, [*names, *observed.bypassing])
        wanted = dict.fromkeys(names, DENSE) | forms_of_layers(
            self.settings, numbered_layers(observed.layers, self.settings)
        )
        decided = {layer.name: decide(observed, layer, wanted[layer.name], self.settings) for layer in observed.layers}
        plans = observed.use({name: form for name, (form, _) in decided.items()})
        self.layers = [(layer, plans[layer.name], decided[layer.name][1]) for layer in observed.layers]
        changed = [layer.name for layer, _, reason in self.layers if reason is None]
        skipped = [(layer.name, reason) for layer, _, reason in self.layers if reason is not None]
        self.bypassing = [name for name in observed.bypassing if not excluded(name, self.settings)]
        skipped += [(name, BYPASSES) for name in observed.bypassing]
        return PassResult(model, bool(changed), changed, skipped, {"attention_modules": len(names)})

    def unwanted(self) -> list[tuple[str, str]]:
        """Layers that stayed dense although a pattern was asked for them: ``(module, reason)``."""
        wanted = forms_of_layers(self.settings, numbered_layers((layer for layer, _, _ in self.layers), self.settings))
        kept = [
            (layer.name, reason or "")
            for layer, plan, reason in self.layers
            if plan.geometry is None and layer.name in wanted and not wanted[layer.name].is_dense
        ]
        return kept + [(name, BYPASSES) for name in self.bypassing if self.settings.wants_rewrite]


def numbered_layers(layers: Iterable[ObservedLayer], settings: AttentionSection) -> list[str]:
    """The modules that forms are asked for, in the order in which ranges number them."""
    return [layer.name for layer in layers if not layer.cross or settings.cross_attention]


def decide(
    observed: ObservedAttention, layer: ObservedLayer, wanted: AttentionForm, settings: AttentionSection
) -> tuple[AttentionForm, str | None]:
    """What a layer computes that is asked for ``wanted``, and why it is not rewritten, or None if it is.

    Raises:
        PreconditionError: if the layer cannot compute the form.
    """
    source = layer.visibility
    if source.unsupported:
        return source.pattern, source.unsupported
    if layer.cross and not settings.cross_attention:
        return source.pattern, "cross-attention stays as it is unless attention.cross_attention is set"
    if excluded(layer.name, settings):
        return source.pattern, "excluded by the recipe"
    if layer.cross:
        check_between_texts(wanted, layer.name)
    form = within_own_window(source.pattern, observed.checked(wanted, layer), source.causal)
    if form == wanted == source.pattern:
        return form, f"is {source.pattern} already"
    if form == source.pattern:
        return form, f"keeps the model's own {source.pattern}, which is at most as wide"
    return form, None


def check_exclusions(settings: AttentionSection, names: list[str]) -> None:
    """Make sure that every exclusion matches a module.

    Raises:
        PreconditionError: naming the one that does not.
    """
    for glob in settings.exclude:
        if not any(fnmatchcase(name, glob) for name in names):
            raise PreconditionError(
                f"The attention exclusion '{glob}' matches no attention module.", did_you_mean(glob, names)
            )


def excluded(name: str, settings: AttentionSection) -> bool:
    """Whether the section leaves a module as it is."""
    return any(fnmatchcase(name, glob) for glob in settings.exclude)


def check_between_texts(form: AttentionForm, layer: str) -> None:
    """Make sure that a form asks for no distance between positions of two different texts.

    Raises:
        PreconditionError: naming the layer and forms that cross-attention can compute.
    """
    parts = [part for part, _ in form.parts] if isinstance(form, HeadForms) else [form]
    for part in parts:
        if isinstance(part, Pattern) and not all(isinstance(term, (Dense, Sinks)) for term in part.terms):
            raise PreconditionError(
                f"{layer} is cross-attention, and '{part}' compares positions of its two texts, which do not belong "
                "together.",
                "Leave attention.cross_attention out, or choose by content for these layers, for example "
                '{"*EncDecAttention": "topk:64"}.',
            )


def describe(layers: list[tuple[ObservedLayer, LayerPlan, str | None]]) -> list[dict[str, Any]]:
    """The layers as plain values, in the shape of ``effc.json``."""
    return [
        {
            "layer": layer.name,
            "source": str(layer.visibility.pattern),
            "pattern": str(plan.geometry.form if plan.geometry else layer.visibility.pattern),
            "causal": layer.visibility.causal,
            "num_heads": layer.num_heads,
            "kv_heads": layer.kv_heads,
            "head_dim": layer.head_dim,
            "bias": str(layer.bias) if layer.bias is not None else None,
            "rewritten": reason is None,
            "reason": reason,
        }
        for layer, plan, reason in layers
    ]
