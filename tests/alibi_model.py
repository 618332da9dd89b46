"""A small causal model that builds its own 4-D mask with ALiBi's slopes in it, as code outside transformers does."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class AlibiConfig(PreTrainedConfig):
    model_type = "alibi-test"
    vocab_size = 100
    hidden_size = 32
    heads = 4
    # By the key's position alone, as BLOOM has it, or by the distance.
    by_key = False


class AlibiAttention(nn.Module):
    def __init__(self, config: AlibiConfig):
        super().__init__()
        self.config, self.is_causal = config, True
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shape = (*states.shape[:-1], self.config.heads, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(states).chunk(3, dim=-1))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        attended, _ = function(self, query, key, value, mask, scaling=query.shape[-1] ** -0.5)
        return attended.reshape(states.shape)


class AlibiModel(PreTrainedModel):
    config_class = AlibiConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: AlibiConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(AlibiAttention(config) for _ in range(2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutput:
        length = input_ids.shape[1]
        position = torch.arange(length)
        distance = position[None, :] - position[:, None]
        slopes = 2.0 ** -torch.arange(1, self.config.heads + 1)
        added = slopes[:, None, None] * (position[None, :] if self.config.by_key else distance)
        visible = (distance <= 0) & attention_mask.bool()[:, None, None, :]
        mask = torch.where(visible, added[None], torch.finfo(torch.float32).min)
        states = self.embeddings(input_ids)
        for layer in self.layers:
            states = states + layer(states, mask)
        return BaseModelOutput(last_hidden_state=states)
