"""Important and near tokens exactly, the rest by block means: the definition of ``Dynamic``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.content import SUMMARY_BLOCK, Dynamic
from effc.plugins.reference.dispatch import attend, initial_parameters
from effc.plugins.reference.topk import strongest


@attend.register
def _(
    form: Dynamic,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    length, first = key.shape[2], key.shape[2] - query.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1))
    visible = torch.ones(query.shape[0], length, dtype=torch.bool, device=key.device)
    if key_mask is not None:
        visible = key_mask.to(torch.bool)
    visible = visible[:, None].expand(key.shape[:3])
    positions = torch.arange(length, device=key.device)
    scores_of_tokens = importance(key, (extras or {}).get("scorer"))
    lowest = torch.finfo(query.dtype).min
    rows = []
    for block in range(first // SUMMARY_BLOCK, -(-length // SUMMARY_BLOCK)):
        start, stop = max(block * SUMMARY_BLOCK, first), min((block + 1) * SUMMARY_BLOCK, length)
        near = near_keys(form, positions, block, causal)
        before = positions < (block - form.reach) * SUMMARY_BLOCK
        far = visible & (before if causal else ~near)
        important = most_important(form, scores_of_tokens, visible & before if causal else visible) & ~near
        exact = ((visible & near) | important)[:, :, None, None, :]
        if causal:
            exact = exact & (positions <= positions[start:stop, None])
        own = grouped[:, :, :, start - first : stop - first]
        scores = own @ key[:, :, None].transpose(-1, -2) * scale
        means, mean_values, counts = summaries(key, value, far & ~important)
        coarse = own @ means[:, :, None].transpose(-1, -2) * scale + counts.clamp_min(1).log()[:, :, None, None]
        seen = torch.cat([exact.expand_as(scores), (counts > 0)[:, :, None, None].expand_as(coarse)], dim=-1)
        weights = torch.softmax(torch.cat([scores, coarse], dim=-1).masked_fill(~seen, lowest), dim=-1) * seen
        rows.append(weights @ torch.cat([value, mean_values], dim=2)[:, :, None])
    return torch.cat(rows, dim=3).flatten(1, 2)


def importance(key: torch.Tensor, scorer: torch.Tensor | None) -> torch.Tensor:
    """``w . k_j + u |k_j|^2``, ``[batch, kv_heads, key_length]``; ``-|k_j|^2`` without a scorer.

    It only orders tokens, so that no gradient reaches the scorer.

    Args:
        scorer: ``[kv_heads, head_dim + 1]``, w and then u.
    """
    key = key.detach()
    norms = (key * key).sum(dim=-1)
    if scorer is None:
        return -norms
    scorer = scorer.detach().to(key.dtype)
    return (key * scorer[:, None, :-1]).sum(dim=-1) + norms * scorer[:, None, -1]


def near_keys(form: Dynamic, positions: torch.Tensor, block: int, causal: bool) -> torch.Tensor:
    """Which positions lie in the blocks around ``block`` that are attended exactly (before causality), bool."""
    distance = positions // SUMMARY_BLOCK - block
    return (distance >= -form.reach) & (distance <= (0 if causal else form.reach))


def most_important(form: Dynamic, scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The ``form.tokens`` keys of largest importance, bool, of the shape of ``among [batch, kv_heads, key_length]``."""
    return strongest(scores.masked_fill(~among, -torch.inf), form.tokens) & among


def summaries(
    key: torch.Tensor, value: torch.Tensor, members: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean key and mean value ``[batch, kv_heads, blocks, head_dim]`` and number ``[batch, kv_heads, blocks]`` of the
    members of each block.
    """
    blocks = -(-key.shape[2] // SUMMARY_BLOCK)
    padding = blocks * SUMMARY_BLOCK - key.shape[2]
    held = torch.nn.functional.pad(members, (0, padding)).unflatten(2, (blocks, SUMMARY_BLOCK)).to(key.dtype)
    counts = held.sum(dim=-1)

    def mean(states: torch.Tensor) -> torch.Tensor:
        blocked = torch.nn.functional.pad(states, (0, 0, 0, padding)).unflatten(2, (blocks, SUMMARY_BLOCK))
        means: torch.Tensor = (blocked * held[..., None]).sum(dim=3) / counts.clamp_min(1)[..., None]
        return means

    return mean(key), mean(value), counts


@initial_parameters.register
def _(form: Dynamic, num_heads: int, kv_heads: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    scorer = torch.zeros(kv_heads, head_dim + 1)
    scorer[:, -1] = -1.0
    return {"scorer": scorer}
