"""Linformer (Wang et al., 2020) in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.low_rank import Linformer
from effc.plugins.reference.dispatch import attend, initial_parameters
from effc.plugins.reference.linear import needed
from effc.plugins.reference.nystrom import segment_means


@attend.register
def _(
    form: Linformer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    if causal:
        form.refuse_causal()
    form.check_length(key.shape[2])
    visible = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    if key_mask is not None:
        visible = key_mask.to(torch.bool)
    hidden = ~visible[:, None, :, None]
    keys, key_mass = _projected(needed(extras or {}, "key_projection", form), key.masked_fill(hidden, 0.0), visible)
    values, _ = _projected(needed(extras or {}, "value_projection", form), value.masked_fill(hidden, 0.0), visible)
    groups = query.shape[1] // key.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill((key_mass == 0)[:, None, None, :], -1e30)
    return torch.softmax(scores, dim=-1) @ values * visible.any(dim=-1)[:, None, None, None]


def _projected(
    projection: torch.Tensor, states: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[batch, kv_heads, projected, head_dim]``, and the absolute sum ``[batch, projected]`` of what is visible."""
    projection = projection.to(states.dtype)
    kept = projection[None, :, : states.shape[2]] * visible[:, None, :]
    mass = kept.abs().sum(dim=-1, keepdim=True)
    whole = projection.abs().sum(dim=-1, keepdim=True)[None]
    return (kept * (whole / torch.where(mass > 0, mass, 1.0)))[:, None] @ states, mass[..., 0]


@initial_parameters.register
def _(form: Linformer, num_heads: int, kv_heads: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    means = segment_means(torch.ones(1, form.length, dtype=torch.bool), form.projected)[0].float()
    return {"key_projection": means, "value_projection": means.clone()}
