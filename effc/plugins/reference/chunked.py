"""Chunked attention as its definition says: attention in each chunking, then the merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.chunked import Chunked
from effc.plugins.reference.dispatch import attend, initial_parameters


@attend.register
def _(
    form: Chunked,
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
    positions = torch.arange(length)
    rows = positions[length - query.shape[2] :, None]
    scores = query @ key.transpose(-1, -2) * scale
    outputs, sums = [], []
    for shift in form.shifts:
        visible = torch.from_numpy(form.visible(shift, rows.numpy(), positions.numpy(), causal)).to(query.device)
        if key_mask is not None:
            visible = visible & key_mask.to(torch.bool)[:, None, None, :]
        hidden = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        sees_any = visible.any(dim=-1, keepdim=True)
        outputs.append(torch.softmax(hidden, dim=-1) * sees_any @ value)
        sums.append(hidden.logsumexp(dim=-1, keepdim=True))
    if form.merge == "concat":
        return outputs[0]
    if form.merge == "add":
        return (outputs[0] + outputs[1]) / 2
    gate = (extras or {}).get("gate")
    offset = 0 if gate is None else gate.to(query.dtype)[:, None, None]
    share = torch.sigmoid(sums[0] - sums[1] + offset)
    return share * outputs[0] + (1 - share) * outputs[1]


@initial_parameters.register
def _(form: Chunked, num_heads: int, kv_heads: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    return {"gate": torch.zeros(num_heads)} if form.merge == "gate" else {}
