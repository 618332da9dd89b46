"""Hierarchical attention as its definition says: one softmax over exact scores and scores of block means."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.hierarchical import Hierarchical
from effc.plugins.reference.dispatch import attend


@attend.register
def _(
    form: Hierarchical,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    batch, heads, query_length, _ = query.shape
    length = key.shape[2]
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.ones(batch, length, dtype=torch.bool) if key_mask is None else key_mask.to(torch.bool)
    mask = mask.to(query.device)
    key, value = (states.masked_fill(~mask[:, None, :, None], 0) for states in (key, value))

    position = torch.arange(length - query_length, length, device=query.device)
    own = position[:, None] // form.block
    near = (own - torch.arange(length, device=query.device) // form.block).abs() <= 1
    if causal:
        near &= torch.arange(length, device=query.device) <= position[:, None]
    keys, values = [key], [value]
    biases = [torch.zeros(batch, length, dtype=query.dtype, device=query.device)]
    visible = [near & mask[:, None, :]]
    for level in range(1, form.levels):
        counts = _block_sums(mask[:, None, :, None].to(query.dtype), form.size(level))
        mean_key, mean_value = (_block_sums(states, form.size(level)) / counts.clamp_min(1) for states in (key, value))
        count = counts[:, 0, :, 0]
        node = torch.arange(count.shape[1])
        seen = torch.from_numpy(form.sees(level, own.cpu().numpy(), node.numpy(), causal)).to(query.device)
        keys.append(mean_key)
        values.append(mean_value)
        biases.append(count.clamp_min(1).log())
        visible.append(seen & (count > 0)[:, None, :])

    seen_keys = torch.cat(visible, dim=-1)[:, None]
    scores = query @ torch.cat(keys, dim=2).transpose(-1, -2) * scale + torch.cat(biases, dim=-1)[:, None, None]
    weights = torch.softmax(scores.masked_fill(~seen_keys, torch.finfo(scores.dtype).min), dim=-1)
    return (weights * seen_keys.any(dim=-1, keepdim=True)) @ torch.cat(values, dim=2)


def _block_sums(states: torch.Tensor, size: int) -> torch.Tensor:
    """Sums of ``[batch, heads, length, width]`` over blocks of ``size`` positions, the last one possibly shorter."""
    if size >= states.shape[2]:
        return states.sum(dim=2, keepdim=True)
    padded = torch.nn.functional.pad(states, (0, 0, 0, -states.shape[2] % size))
    blocks: torch.Tensor = padded.unflatten(2, (-1, size))
    return blocks.sum(dim=3)
