"""Attention to the key blocks of the largest pooled scores: the definition of ``BlockTopK``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.content import BlockTopK
from effc.plugins.reference.dispatch import attend


@attend.register
def _(
    form: BlockTopK,
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
    positions = torch.arange(length, device=key.device)
    rows = []
    for block in range(first // form.block, -(-length // form.block)):
        start, stop = max(block * form.block, first), min((block + 1) * form.block, length)
        chosen = chosen_blocks(form, grouped, key, visible, causal, block)
        seen = chosen.repeat_interleave(form.block, dim=-1)[..., None, None, :length] & visible[:, None, None, None, :]
        if causal:
            seen = seen & (positions <= positions[start:stop, None])
        scores = grouped[:, :, :, start - first : stop - first] @ key[:, :, None].transpose(-1, -2) * scale
        weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
        rows.append((weights * seen) @ value[:, :, None])
    return torch.cat(rows, dim=3).flatten(1, 2)


def chosen_blocks(
    form: BlockTopK, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, causal: bool, block: int
) -> torch.Tensor:
    """Which key blocks the queries of ``block`` see, ``[batch, kv_heads, key_blocks]`` bool.

    Args:
        query: ``[batch, kv_heads, groups, query_length, head_dim]``, the last positions.
        key: ``[batch, kv_heads, key_length, head_dim]``.
        visible: ``[batch, key_length]`` bool, False for padding.
    """
    length, first = key.shape[2], key.shape[2] - query.shape[3]
    blocks = -(-length // form.block)
    start, stop = block * form.block, min((block + 1) * form.block, length)
    if causal:
        stop = max(start, first) + 1
        start = stop - form.block
    start = max(start, first)
    # Its mean would differ from this sum by one factor for all key blocks, which orders them alike.
    pooled = (query[:, :, :, start - first : stop - first] * visible[:, None, None, start:stop, None]).sum(dim=(2, 3))
    padding = blocks * form.block - length
    held = torch.nn.functional.pad(visible, (0, padding)).unflatten(1, (blocks, form.block))
    keys = torch.nn.functional.pad(key, (0, 0, 0, padding)).unflatten(2, (blocks, form.block))
    counts = held.sum(dim=2)
    sums = (keys * held[:, None, :, :, None]).sum(dim=3)
    scores = (pooled[:, :, None, :] @ sums.transpose(-1, -2))[:, :, 0] / counts.clamp_min(1)[:, None]
    numbers = torch.arange(blocks, device=key.device)
    possible = counts > 0
    if causal:
        possible = possible & (numbers <= block)
    sink = (numbers == possible.to(torch.int64).argmax(dim=1, keepdim=True)) & possible
    infinite = torch.full_like(scores, torch.inf)
    scores = torch.where(possible[:, None], scores, -infinite)
    scores = torch.where(sink[:, None], infinite, scores)
    own = (numbers == block).expand_as(scores)
    # The own block counts among the chosen even if it holds padding only.
    ranked = torch.sort(scores.masked_fill(own, -torch.inf), dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(own).scatter(-1, ranked[..., : form.count - 1], True)
    result: torch.Tensor = (chosen & possible[:, None]) | own
    return result
