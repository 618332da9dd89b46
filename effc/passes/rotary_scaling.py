"""Scaling rotary embeddings to longer texts, by the formulas that transformers has for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from effc.errors import PreconditionError

_TYPES = {"rope-linear": "linear", "rope-dynamic": "dynamic", "rope-yarn": "yarn"}


def rotary_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The modules that make the cosines and sines of rotary embeddings, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "rope_type") and getattr(getattr(module, "config", None), "rope_parameters", None)
    ]


def scale_rotary(model: PreTrainedModel, old: int, new: int, method: str) -> list[str]:
    """Make a model's rotary embeddings reach ``new`` instead of ``old`` tokens; returns the names of changed modules.

    Where layers of different kinds have embeddings of their own, those of sliding layers stay: distances within a
    window do not grow.

    Raises:
        PreconditionError: if the embeddings are scaled already.
    """
    modules = rotary_modules(model)
    if method == "rope-unscaled":
        for _, module in modules:
            module.config.max_position_embeddings = new
        return []
    for config in {id(module.config): module.config for _, module in modules}.values():
        for layer_type, parameters in _by_layer_type(config.rope_parameters):
            if parameters["rope_type"] != "default":
                raise PreconditionError(
                    f"{type(model).__name__} scales its rotary embeddings already ('{parameters['rope_type']}').",
                    "Use --positions rope-unscaled, or change rope_parameters in the model's config.json.",
                )
            if layer_type is None or "sliding" not in layer_type:
                parameters.update(rope_type=_TYPES[method], factor=new / old)
                if method == "rope-yarn":
                    parameters["original_max_position_embeddings"] = old
        # transformers' dynamic scaling is relative to the length that the config gives.
        if method != "rope-dynamic":
            config.max_position_embeddings = new
    for name, module in modules:
        rebuilt = type(module)(config=module.config)
        if method == "rope-dynamic":
            rebuilt.__class__ = type(f"Exportable{type(module).__name__}", (_ByLength, type(module)), {})
        model.set_submodule(name, rebuilt.to(dtype=torch.float32), strict=True)
    return [name for name, _ in modules]


def _by_layer_type(parameters: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    if "rope_type" in parameters:
        return [(None, parameters)]
    return [(name, own) for name, own in parameters.items() if isinstance(own, dict)]


class _ByLength(nn.Module):
    """Dynamic scaling without state: frequencies follow from the length of each input, in eager mode and in a graph.

    transformers' own keeps those of the longest text so far, and branches on lengths, which no graph can hold.
    """

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        own: Any = self
        parameters = own.config.rope_parameters
        prefix = "" if layer_type is None else f"{layer_type}_"
        arguments: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
        frequencies = getattr(self, f"{prefix}inv_freq")
        scaling = getattr(self, f"{prefix}attention_scaling")
        if (parameters if layer_type is None else parameters[layer_type])["rope_type"] == "dynamic":
            length = position_ids.max() + 1
            frequencies, scaling = ROPE_INIT_FUNCTIONS["dynamic"](own.config, x.device, seq_len=length, **arguments)
        # The model's own arithmetic, below the decorators that would update the frequencies.
        own_class: Any = type(self).__mro__[2]
        changed = {f"{prefix}inv_freq": frequencies, f"{prefix}attention_scaling": scaling}
        return inspect.unwrap(own_class.forward)(_With(self, changed), x, position_ids, **arguments)


class _With:
    """A module with some attributes changed, for one call."""

    def __init__(self, module: nn.Module, changed: dict[str, Any]):
        self._module, self._changed = module, changed

    def __getattr__(self, name: str) -> Any:
        return self._changed[name] if name in self._changed else getattr(self._module, name)
