"""Replace a model's attention by a pattern, through transformers' attention interface and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from effc.errors import PassFailedError, PreconditionError
from effc.passes.attention_settings import AttentionSection
from effc.passes.base import Pass, PassResult
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import parse_form
from effc.plugins.forms.terms import Local
from effc.plugins.hook import LayerPlan, ObservedLayer, assign, observe
from effc.plugins.operator import AttentionGeometry
from effc.plugins.pattern import Pattern
from effc.suggest import did_you_mean

# What the hook may differ from the model's own attention, in fp32, before anything is rewritten.
_FAITHFUL = 1e-3


class RewriteAttention(Pass[PreTrainedModel, PreTrainedModel]):
    """Give every attention module that comes through the interface the pattern of the recipe.

    Args:
        settings: the recipe's ``attention`` section.
        inputs: forward arguments for one observing run.

    After :meth:`run`, ``layers`` holds what was found and decided, in execution order.
    """

    name: ClassVar[str] = "rewrite-attention"
    version: ClassVar[int] = 1

    def __init__(self, settings: AttentionSection, inputs: Mapping[str, torch.Tensor]):
        self.settings: AttentionSection = settings
        self._inputs = inputs
        self._form = parse_form(settings.pattern)
        self.layers: list[tuple[ObservedLayer, LayerPlan, str | None]] = []

    def requires(self, model: PreTrainedModel) -> None:
        """The architecture must use the attention interface.

        Raises:
            PreconditionError: naming the architecture.
        """
        if not model._can_set_attn_implementation():
            raise PreconditionError(
                f"{type(model).__name__} does not use transformers' attention interface, so its attention would stay "
                "dense whatever pattern is asked for.",
                "Compile a model of an architecture that does (BERT, RoBERTa, ModernBERT, Llama, ...).",
            )

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Observe, decide and assign.

        Raises:
            PreconditionError: if no module can be rewritten, or an exclusion matches nothing.
            PassFailedError: if the hook does not reproduce the model's own attention.
        """
        self.requires(model)
        with torch.no_grad():
            before = model(**self._inputs)
        observed, after = observe(model, self._inputs)
        architecture = type(model).__name__
        if not observed:
            raise PreconditionError(
                f"No attention module of {architecture} comes through transformers' attention interface.",
                "Compile a model of an architecture that uses it.",
            )
        unsupported = [layer for layer in observed if layer.visibility.unsupported]
        if len(unsupported) == len(observed):
            raise PreconditionError(
                f"The attention of {architecture} cannot be rewritten: {observed[0].visibility.unsupported} "
                f"({observed[0].name}).",
                "Compile a model whose attention depends on positions and padding only.",
            )
        unreadable = [layer for layer in unsupported if not layer.visibility.readable]
        if unreadable:
            raise PreconditionError(
                f"{unreadable[0].name} of {architecture} cannot be compiled: {unreadable[0].visibility.unsupported}.",
                "Compile a model whose attention masks depend on distance and padding only.",
            )
        self._check_faithful(architecture, before, after)
        self._check_exclusions(observed)
        self.layers = [self._decide(layer) for layer in observed]
        assign({layer.module: plan for layer, plan, _ in self.layers})
        changed = [layer.name for layer, plan, reason in self.layers if reason is None]
        skipped = [(layer.name, reason) for layer, _, reason in self.layers if reason is not None]
        skipped += [(name, "does not use the attention interface") for name in _bypassing(model, observed)]
        return PassResult(model, bool(changed), changed, skipped, {"attention_modules": len(observed)})

    def unwanted(self) -> list[tuple[str, str]]:
        """Layers that stayed dense although a pattern was asked for them: ``(module, reason)``."""
        if self._form.is_dense:
            return []
        return [(layer.name, reason or "") for layer, plan, reason in self.layers if plan.geometry is None]

    def _decide(self, layer: ObservedLayer) -> tuple[ObservedLayer, LayerPlan, str | None]:
        source = layer.visibility
        if source.unsupported:
            return layer, LayerPlan(layer.name, source, None), source.unsupported
        form, reason = self._form, None
        if any(fnmatchcase(layer.name, glob) for glob in self.settings.exclude):
            form, reason = source.pattern, "excluded by the recipe"
        elif _narrower(source.pattern, form, source.causal):
            form = source.pattern
            reason = f"keeps the model's own {source.pattern}, which is at most as wide"
        elif form == source.pattern:
            reason = f"is {source.pattern} already"
        geometry = AttentionGeometry(form, source.causal, layer.num_heads, layer.kv_heads, layer.head_dim, layer.scale)
        return layer, LayerPlan(layer.name, source, geometry), reason

    def _check_exclusions(self, observed: list[ObservedLayer]) -> None:
        names = [layer.name for layer in observed]
        for glob in self.settings.exclude:
            if not any(fnmatchcase(name, glob) for name in names):
                raise PreconditionError(
                    f"The attention exclusion '{glob}' matches no attention module.", did_you_mean(glob, names)
                )

    def _check_faithful(self, architecture: str, before: ModelOutput, after: ModelOutput) -> None:
        mask = self._inputs.get("attention_mask")
        for name, reference in before.items():
            if not isinstance(reference, torch.Tensor) or not torch.is_floating_point(reference):
                continue
            difference, size = after[name] - reference, reference
            if mask is not None and reference.shape[:2] == mask.shape:
                difference, size = difference[mask.bool()], reference[mask.bool()]
            error = float(difference.norm() / size.norm().clamp_min(1e-12))
            if not error <= _FAITHFUL:
                raise PassFailedError(
                    f"effc's attention hook does not reproduce {architecture}: output '{name}' is off by {error:.2g}.",
                    "This architecture gives its attention arguments that effc does not know; please report it.",
                )


def _narrower(own: Pattern, wanted: AttentionForm, causal: bool) -> bool:
    """Whether the model's own window is kept: it lies inside the wanted form, or no window is wanted at all."""
    inner = own.interval(causal)
    if inner is None:
        return False
    if not isinstance(wanted, Pattern) or wanted.is_dense:
        return True
    reaches = [term.reach(causal) for term in wanted.terms if isinstance(term, Local)]
    return any(inner[0] <= left and inner[1] <= right for left, right in reaches)


def _bypassing(model: torch.nn.Module, observed: list[ObservedLayer]) -> list[str]:
    """Modules named like attention that neither came through the hook nor contain or belong to one that did."""
    seen = [layer.name for layer in observed]

    def related(name: str) -> bool:
        return any(s == name or s.startswith(f"{name}.") or name.startswith(f"{s}.") for s in seen)

    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and name and not related(name)
    ]


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
            "rewritten": reason is None,
            "reason": reason,
        }
        for layer, plan, reason in layers
    ]
