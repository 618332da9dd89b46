"""Softmax attention over the pairs that a pattern leaves visible: the definition, O(length^2) memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.pattern import Pattern
from effc.plugins.reference.dispatch import attend


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention restricted to the pairs that ``pattern``, causality and ``key_mask`` leave visible.

    See :func:`effc.plugins.reference.attend` for shapes and :class:`effc.plugins.pattern.Pattern` for ``extras``.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    visible = visible_pairs(pattern, query.shape[2], key.shape[2], causal, key_mask, extras).to(query.device)
    scores = (query @ key.transpose(-1, -2)) * scale
    bias = distance_bias(query.shape[2], key.shape[2], extras)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
    # A softmax over nothing is uniform here: such rows are defined to be zero.
    weights = weights * visible.any(dim=-1, keepdim=True)
    return weights @ value


def visible_pairs(
    pattern: Pattern,
    query_length: int,
    key_length: int,
    causal: bool,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``[batch or 1, 1, query_length, key_length]`` bool."""
    marks = (extras or {}).get("marks")
    mask = pattern.mask(query_length, key_length, causal, None if marks is None else marks.cpu().numpy())
    visible = torch.from_numpy(mask)
    visible = visible[None, None] if visible.ndim == 2 else visible[:, None]
    if key_mask is not None:
        visible = visible.to(key_mask.device) & key_mask.to(torch.bool)[:, None, None, :]
    return visible


def distance_bias(query_length: int, key_length: int, extras: Mapping[str, torch.Tensor] | None) -> torch.Tensor | None:
    """What is added to the scores by distance alone, ``[1, heads, query_length, key_length]``, or None."""
    table, slope = (extras or {}).get("distance_bias"), (extras or {}).get("distance_slope")
    if table is None and slope is None:
        return None
    device = (slope if table is None else table).device  # type: ignore[union-attr]
    query = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    distance = torch.arange(key_length, device=device)[None, :] - query
    total = None
    if table is not None:
        reach = table.shape[-1] // 2
        total = table[:, (distance.clamp(-reach, reach) + reach)]
    if slope is not None:
        sloped = slope[:, None, None] * distance.to(slope.dtype)
        total = sloped if total is None else total + sloped
    assert total is not None
    return total[None]


@attend.register
def _(
    form: Pattern,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    return sparse_attention(query, key, value, form, scale=scale, causal=causal, key_mask=key_mask, extras=extras)
