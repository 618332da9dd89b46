"""Which weights of a model are zero for good.

Masks are kept beside the model, not in its weights' names, so that it saves and loads like any other. Whoever trains a
pruned model calls :func:`apply_masks` after every step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_MASKS = "effc_masks"


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """By parameter name, which weights stay: bool, of the parameter's own shape. Empty where nothing was masked."""
    masks: dict[str, torch.Tensor] = vars(model).get(_MASKS, {})
    return masks


def add_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set weights to zero where a mask is False, now and whenever :func:`apply_masks` is called."""
    vars(model).setdefault(_MASKS, {}).update(masks)
    apply_masks(model)


def apply_masks(model: nn.Module) -> None:
    """Set all masked weights to zero again. Masks of parameters that are no longer there are dropped."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    masks = masks_of(model)
    for name in list(masks):
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != masks[name].shape:
            del masks[name]
            continue
        parameter.data.mul_(masks[name].to(parameter.device, parameter.dtype))


def sparsity(model: nn.Module) -> float:
    """Share of masked weights that are zero, over the parameters that have a mask; 0 where there are none."""
    masks = masks_of(model)
    total = sum(mask.numel() for mask in masks.values())
    return sum(int((~mask).sum()) for mask in masks.values()) / total if total else 0.0
