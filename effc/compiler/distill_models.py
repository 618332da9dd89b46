"""The two models of a distillation: their attention modules, weights that train, and weights that stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from effc.errors import EffcError, MissingDependencyError, PreconditionError
from effc.passes.distill_settings import DistillSettings
from effc.passes.observed_attention import ObservedAttention
from effc.passes.prune_masks import add_masks, apply_masks, masks_of
from effc.plugins.hook import IMPLEMENTATION, PARAMETERS, assigned
from effc.suggest import did_you_mean

# A matrix of which this share is exactly zero has been pruned: trained weights are never zero by chance.
_PRUNED = 0.05


def attention_modules(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """The attention modules by name. A model that does not run through effc's hook yet does so from then on, dense.

    Raises:
        PreconditionError: if the model does not use transformers' attention interface.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        ObservedAttention(model, inputs)
    return {name: module for name, (module, _) in assigned(model).items()}


def untrained_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules whose form computes nothing useful before it is trained."""
    if model.config._attn_implementation != IMPLEMENTATION:
        return {}
    return {
        name: module
        for name, (module, plan) in assigned(model).items()
        if plan.geometry is not None and plan.geometry.form.needs_recovery
    }


def form_parameters(layers: Mapping[str, nn.Module]) -> tuple[list[nn.Parameter], bool]:
    """What attention modules can learn by themselves, and whether it belongs to their forms.

    Where forms have no learned parameters, it is those of the modules.
    """
    own = [
        parameter
        for module in layers.values()
        if (held := getattr(module, PARAMETERS, None))
        for parameter in held.values()
    ]
    return own or [parameter for module in layers.values() for parameter in module.parameters()], bool(own)


@contextmanager
def training(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block exactly these parameters of the model require gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(before.get(parameter, False))


def chosen_parameters(model: PreTrainedModel, settings: DistillSettings) -> list[nn.Parameter]:
    """The parameters that the settings' globs name; all where there are none.

    Raises:
        PreconditionError: if a glob matches nothing.
    """
    named = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    for glob in settings.train:
        if not any(fnmatchcase(name, glob) for name in named):
            raise PreconditionError(f"'{glob}' (train) matches no parameter.", did_you_mean(glob, list(named)))
    if not settings.train:
        return list(named.values())
    return [value for name, value in named.items() if any(fnmatchcase(name, glob) for glob in settings.train)]


@contextmanager
def low_rank_updates(model: PreTrainedModel, settings: DistillSettings) -> Iterator[list[nn.Parameter]]:
    """Within the block linear layers have trainable low-rank updates (LoRA, Hu et al., 2021), merged at its end.

    Yields:
        what is to be trained: the updates, and learned parameters of attention forms.

    Raises:
        MissingDependencyError: if peft is not installed.
        PreconditionError: if weights are pruned, which a merged update would undo, or no layer can have an update.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingDependencyError(
            "Low-rank updates (lora) need the package peft.", "Install it: pip install 'effc[train]'"
        ) from None
    if masks_of(model):
        raise PreconditionError(
            "The model is pruned, and low-rank updates merged into its weights would fill the zeros again.",
            "Train the weights themselves: leave lora out.",
        )
    targets = [name for name, module in _blocks_linears(model)]
    if not targets:
        raise PreconditionError("The model has no linear layers in its blocks.", "Leave lora out.")
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, lora_dropout=0.0, target_modules=targets)
    try:
        wrapped: Any = get_peft_model(model, config)
    except ValueError as error:
        raise PreconditionError(f"peft cannot update this model: {error}.", "Leave lora out.") from error
    added = [value for name, value in model.named_parameters() if "lora_" in name]
    try:
        yield added + [value for name, value in model.named_parameters() if PARAMETERS in name.split(".")]
    except EffcError:
        wrapped.unload()
        raise
    wrapped.merge_and_unload()


def keep_zeros(model: PreTrainedModel) -> bool:
    """Make sure that pruned weights stay zero in training, also those of a checkpoint pruned elsewhere.

    Returns:
        whether there are any; :func:`effc.passes.prune_masks.apply_masks` is then to be called after every step.
    """
    known = masks_of(model)
    found = {}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, value in model.named_parameters():
        if value.ndim != 2 or name in known or PARAMETERS in name.split(".") or id(value) in tables:
            continue
        kept = value.detach() != 0
        if float(kept.float().mean()) <= 1 - _PRUNED and bool(kept.any()):
            found[name] = kept
    if found:
        add_masks(model, found)
    return bool(masks_of(model))


def zero_again(model: PreTrainedModel) -> None:
    """Set pruned weights to zero; to be called after every step."""
    apply_masks(model)


def _blocks_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of the repeated blocks, so neither heads nor poolers."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split(".")):
            yield name, module
