"""The attention modules of one model, observed once, and what each of them computes at the moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from effc.errors import PassFailedError, PreconditionError
from effc.passes.assign_attention import check_form, check_length, marked_tokens, with_token_ids
from effc.passes.bypassing import attention_calls, bypassing
from effc.plugins.forms.base import AttentionForm
from effc.plugins.hook import PARAMETERS, LayerPlan, ObservedLayer, assign, mark_tokens, mask_by_input, observe
from effc.plugins.operator import AttentionGeometry
from effc.plugins.reference import initial_parameters

# What the hook may differ from the model's own attention, in fp32, before anything is rewritten.
_FAITHFUL = 1e-3


class ObservedAttention:
    """Lets forms be tried on a model and taken back: modules without a form compute what they always did.

    Args:
        model: in eval mode, untouched; its attention goes through effc's hook from now on.
        inputs: forward arguments for the observing run.
        processor: the model's tokenizer, which knows the ids of named tokens; or None.

    Attributes:
        layers: the modules in execution order.
        bypassing: modules that compute attention without the interface, which no form can reach.
        forms: the form of each module that has one now, by name.

    Raises:
        PreconditionError: if the architecture does not use transformers' attention interface, or none of its modules
            can be rewritten.
        PassFailedError: if the hook does not reproduce the model's own attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, torch.Tensor],
        processor: Any | None = None,
        max_length: int | None = None,
    ):
        _check_interface(model)
        with torch.no_grad(), attention_calls(model) as called:
            before = model(**inputs)
        self.layers, after = observe(model, inputs)
        self.bypassing = bypassing(model, [layer.name for layer in self.layers], called)
        self.model, self.processor, self.max_length = model, processor, max_length
        self.forms: dict[str, AttentionForm] = {}
        _check_supported(type(model).__name__, self.layers)
        _check_faithful(type(model).__name__, before, after, inputs.get("attention_mask"))
        own_masks = [layer.module for layer in self.layers if layer.own_mask]
        if own_masks:
            mask_by_input(model, own_masks)
        self._marking: dict[torch.nn.Module, tuple[int, ...]] | None = None
        self._parameters: dict[tuple[str, AttentionForm], dict[str, torch.Tensor]] = {}
        self.use({})

    @property
    def rewritable(self) -> list[ObservedLayer]:
        """The layers that can be given a form."""
        return [layer for layer in self.layers if layer.visibility.unsupported is None and not layer.cross]

    def checked(self, form: AttentionForm, layer: ObservedLayer) -> AttentionForm:
        """``form`` as this layer can compute it, with token ids for names.

        Raises:
            PreconditionError: if the layer cannot compute it.
        """
        check_form(form, layer)
        check_length(form, layer, self.max_length)
        return with_token_ids(form, self.processor)

    def use(self, forms: Mapping[str, AttentionForm]) -> dict[str, LayerPlan]:
        """Let the named modules compute these forms from now on and all others what they always did.

        Learned parameters start from values that depend on the form and the layer's number alone, or are those that
        :meth:`set_parameters` gave; they are attributes of the module.
        """
        plans: dict[str, LayerPlan] = {}
        for number, layer in enumerate(self.layers):
            form = forms.get(layer.name, layer.visibility.pattern)
            plans[layer.name] = plan_of(layer, form)
            self._place_parameters(number, layer, form)
        assign({layer.module: plans[layer.name] for layer in self.layers})
        self._mark(forms)
        self.forms = dict(forms)
        return plans

    @contextmanager
    def using(self, forms: Mapping[str, AttentionForm]) -> Iterator[None]:
        """Within the block the modules compute these forms, and afterwards what they computed before."""
        before = self.forms
        self.use(forms)
        try:
            yield
        finally:
            self.use(before)

    def set_parameters(self, name: str, form: AttentionForm, parameters: Mapping[str, torch.Tensor]) -> None:
        """Give the learned parameters that a module has whenever it computes ``form``."""
        self._parameters[name, form] = dict(parameters)
        if self.forms.get(name) == form:
            self.use(self.forms)

    def _place_parameters(self, number: int, layer: ObservedLayer, form: AttentionForm) -> None:
        key = (layer.name, form)
        if key not in self._parameters:
            self._parameters[key] = initial_parameters(form, layer.num_heads, layer.kv_heads, layer.head_dim, number)
        if hasattr(layer.module, PARAMETERS):
            delattr(layer.module, PARAMETERS)
        if self._parameters[key]:
            values = {name: torch.nn.Parameter(tensor) for name, tensor in self._parameters[key].items()}
            layer.module.register_module(PARAMETERS, torch.nn.ParameterDict(values))

    def _mark(self, forms: Mapping[str, AttentionForm]) -> None:
        tokens = {layer.module: marked_tokens(forms[layer.name]) for layer in self.layers if layer.name in forms}
        wanted = {module: ids for module, ids in tokens.items() if ids}
        if self._marking is None:
            if not wanted:
                return
            # Registered once; what it marks is then changed in place.
            self._marking = {}
            mark_tokens(self.model, self._marking)
        self._marking.clear()
        self._marking.update(wanted)


def plan_of(layer: ObservedLayer, form: AttentionForm) -> LayerPlan:
    """What a module does that is given ``form``; one that cannot be lowered keeps torch's own attention."""
    if layer.visibility.unsupported:
        return LayerPlan(layer.name, layer.visibility, None)
    geometry = AttentionGeometry(
        form, layer.visibility.causal, layer.num_heads, layer.kv_heads, layer.head_dim, layer.scale
    )
    return LayerPlan(layer.name, layer.visibility, geometry, {} if layer.bias is None else layer.bias.extras())


def _check_interface(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise PreconditionError(
            f"{type(model).__name__} does not use transformers' attention interface, so its attention would stay "
            "dense whatever pattern is asked for.",
            "Compile a model of an architecture that does (BERT, RoBERTa, ModernBERT, Llama, ...).",
        )


def _check_supported(architecture: str, layers: list[ObservedLayer]) -> None:
    if not layers:
        raise PreconditionError(
            f"No attention module of {architecture} comes through transformers' attention interface.",
            "Compile a model of an architecture that uses it.",
        )
    unsupported = [layer for layer in layers if layer.visibility.unsupported]
    if len(unsupported) == len(layers):
        raise PreconditionError(
            f"The attention of {architecture} cannot be rewritten: {layers[0].visibility.unsupported} "
            f"({layers[0].name}).",
            "Compile a model whose attention depends on positions and padding only.",
        )
    unreadable = [layer for layer in unsupported if not layer.visibility.readable]
    if unreadable:
        raise PreconditionError(
            f"{unreadable[0].name} of {architecture} cannot be compiled: {unreadable[0].visibility.unsupported}.",
            "Compile a model whose attention masks depend on distance and padding only.",
        )


def _check_faithful(architecture: str, before: ModelOutput, after: ModelOutput, mask: torch.Tensor | None) -> None:
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
