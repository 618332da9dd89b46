"""Chunked dense attention: chunk by chunk, as it is defined."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.dense_chunked import DenseChunked
from effc.plugins.reference.dispatch import attend


@attend.register
def _(
    form: DenseChunked,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = key.shape[2]
    positions = torch.arange(length, device=query.device)
    chunks = []
    for rows, position in zip(
        query.split(form.chunk, dim=2), positions[length - query.shape[2] :].split(form.chunk), strict=True
    ):
        visible = torch.ones(1, 1, 1, length, dtype=torch.bool, device=query.device)
        if causal:
            visible = visible & (positions <= position[:, None])
        if key_mask is not None:
            visible = visible & key_mask.to(torch.bool)[:, None, None, :]
        scores = rows @ key.transpose(-1, -2) * scale
        weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
        chunks.append(weights * visible.any(dim=-1, keepdim=True) @ value)
    return torch.cat(chunks, dim=2)
