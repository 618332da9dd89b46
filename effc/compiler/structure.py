"""What a model's config cannot say of its shape: factors of low rank, widths of single layers, sizes modules keep.

It is found by comparing the model with one built from its config, and is enough to build the model again.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from effc.passes.low_rank_linear import LowRankLinear
from effc.passes.prune_config import build_like
from effc.passes.prune_masks import masks_of
from effc.plugins.hook import PARAMETERS


class Factors(BaseModel):
    """The arguments of a :class:`LowRankLinear`."""

    model_config = ConfigDict(extra="forbid")

    in_features: int
    out_features: int
    rank: int
    bias: bool


class Structure(BaseModel):
    """Differences between a model and what its config describes.

    Attributes:
        architecture: class of the model, one of transformers'.
        low_rank: linear layers that are two, by name.
        shapes: of parameters that have another one.
        attributes: numbers that modules hold of themselves, by module.
        masked: parameters whose zeros stay zero.
        left_out: weights that are not part of the checkpoint.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    architecture: str
    low_rank: dict[str, Factors] = Field(default_factory=dict)
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = Field(default_factory=dict)
    masked: list[str] = Field(default_factory=list)
    left_out: list[str] = Field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the config says it all."""
        return not (self.low_rank or self.shapes or self.attributes)


def describe_structure(model: PreTrainedModel) -> Structure:
    """Find what the config of ``model`` does not say."""
    plain = build_like(model, type(model.config).from_dict(model.config.to_dict()))
    factors = {name: _factors(module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    expected = dict(plain.named_parameters(remove_duplicate=False))
    inside = tuple(f"{factor}." for factor in factors)
    shapes = {}
    left_out = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if PARAMETERS in name.split("."):
            left_out.append(name)
        elif not name.startswith(inside) and (name not in expected or expected[name].shape != parameter.shape):
            shapes[name] = list(parameter.shape)
    modules = dict(plain.named_modules())
    attributes = {}
    for name, module in model.named_modules():
        if name in modules and not isinstance(module, LowRankLinear):
            changed = {
                key: value
                for key, value in vars(module).items()
                if type(value) is int and not key.startswith("_") and vars(modules[name]).get(key, value) != value
            }
            if changed:
                attributes[name] = changed
    return Structure(
        architecture=type(model).__name__,
        low_rank=factors,
        shapes=shapes,
        attributes=attributes,
        masked=sorted(masks_of(model)),
        left_out=left_out,
    )


def apply_structure(model: PreTrainedModel, structure: Structure) -> None:
    """Give a model that was built from its config the shapes of another; its weights are then to be loaded."""
    for name, factor in structure.low_rank.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LowRankLinear(**factor.model_dump()))
    for name, shape in structure.shapes.items():
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        module.register_parameter(key, nn.Parameter(torch.zeros(shape), requires_grad=False))
    for name, values in structure.attributes.items():
        vars(model.get_submodule(name)).update(values)


def _factors(module: LowRankLinear) -> Factors:
    bias = module.bias is not None
    return Factors(in_features=module.in_features, out_features=module.out_features, rank=module.rank, bias=bias)
