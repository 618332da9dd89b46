"""Let a model's config say the sizes that pruning left, wherever the config can say them.

Whether it can is tried: a model is built from the edited config, without memory for its weights, and an edit is kept
only if more weights have the right shape than before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

FFN_KEYS = ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner")
HEAD_KEYS = (
    "num_attention_heads",
    "n_heads",
    "num_heads",
    "n_head",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
KV_HEAD_KEYS = ("num_key_value_heads",)
LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "encoder_layers")
DECODER_LAYER_KEYS = ("decoder_layers", "num_decoder_layers")


def build_like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class from another config, without memory for its weights.

    Raises:
        whatever the class raises where it cannot be built from this config.
    """
    with torch.device("meta"):
        made: PreTrainedModel = type(model)(config)
    return made


def mismatches(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """How many weights of ``model`` have another shape than the config says, or None if it says nothing at all."""
    try:
        fresh = type(config).from_dict(config.to_dict())
        expected = {name: tensor.shape for name, tensor in build_like(model, fresh).state_dict().items()}
    except Exception:
        # Configs and models refuse sizes with errors of all kinds.
        return None
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = [name for name, shape in found.items() if expected.get(name) != shape]
    return len(differing) + len(expected.keys() - found.keys())


def adopt(model: PreTrainedModel, edits: Mapping[str, Any]) -> bool:
    """Put ``edits`` into the config that the model's modules share, if the model then fits it better.

    Returns:
        whether they were kept.
    """
    before = mismatches(model, model.config)
    edited = copy.deepcopy(model.config)
    for name, value in edits.items():
        setattr(edited, name, value)
    after = mismatches(model, edited)
    if after is None or (before is not None and after >= before):
        return False
    for name, value in edits.items():
        setattr(model.config, name, value)
    return True


def resized(config: PreTrainedConfig, keys: tuple[str, ...], old: int, new: int) -> dict[str, int]:
    """The edits that turn a size into another, wherever one of ``keys`` says the old one."""
    return {key: new for key in keys if getattr(config, key, None) == old}


def inner_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Configs that parts of the model keep for themselves, besides the model's own."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config is not model.config:
            found[id(config)] = config
    return list(found.values())
