"""Attention to the strongest scores of each query: the definition of ``effc.plugins.forms.content.TopK``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.content import TopK
from effc.plugins.reference.dispatch import attend

# Queries whose scores are held at once.
_ROWS = 64


@attend.register
def _(
    form: TopK,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    groups, length = query.shape[1] // key.shape[1], key.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    positions = torch.arange(length, device=key.device)
    first = length - query.shape[2]
    rows = []
    for start in range(0, query.shape[2], _ROWS):
        scores = (query[:, :, start : start + _ROWS] @ key.transpose(-1, -2)) * scale
        visible = torch.ones(1, 1, 1, length, dtype=torch.bool, device=key.device)
        if key_mask is not None:
            visible = key_mask.to(torch.bool)[:, None, None, :]
        if causal:
            own = positions[first + start : first + start + scores.shape[2]]
            visible = visible & (positions <= own[:, None])
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        kept = strongest(scores, form.count) & visible
        weights = torch.softmax(scores.masked_fill(~kept, torch.finfo(scores.dtype).min), dim=-1)
        rows.append((weights * kept) @ value)
    return torch.cat(rows, dim=2)


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which ``count`` scores of each row are the largest, of equal ones those at the lower positions; bool."""
    # torch.topk promises no order among equal scores, and sorting whole rows stably takes many times as long.
    least = torch.topk(scores.detach(), min(count, scores.shape[-1]), dim=-1).values[..., -1:]
    above, level = scores > least, scores == least
    places = level.cumsum(dim=-1, dtype=torch.int32)
    return above | (level & (places <= count - above.sum(dim=-1, keepdim=True)))
