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
        # A stable sort puts the lower position first among equal scores; torch.topk promises no order.
        strongest = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : form.count]
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, strongest, True) & visible
        weights = torch.softmax(scores.masked_fill(~kept, torch.finfo(scores.dtype).min), dim=-1)
        rows.append((weights * kept) @ value)
    return torch.cat(rows, dim=2)
