"""Nyström attention (Xiong et al., 2021) in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.low_rank import NEWTON_ITERATIONS, RIDGE, Nystrom
from effc.plugins.reference.dispatch import attend

_HIDDEN = -1e30


@attend.register
def _(
    form: Nystrom,
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
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    visible = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    if key_mask is not None:
        visible = key_mask.to(torch.bool)
    value = value.masked_fill(~visible[:, None, :, None], 0.0)
    visible_queries = visible if query.shape[2] == key.shape[2] else visible.new_ones(query.shape[0], query.shape[2])

    key_pool = segment_means(visible, form.landmarks).to(key.dtype)[:, None]
    query_pool = segment_means(visible_queries, form.landmarks).to(key.dtype)[:, None]
    key_landmarks = key_pool @ key.masked_fill(~visible[:, None, :, None], 0.0)
    query_landmarks = query_pool @ query.masked_fill(~visible_queries[:, None, :, None], 0.0)
    hidden_slots = (key_pool.sum(dim=-1) == 0)[:, :, None, :]

    to_landmarks = _softmax(query @ key_landmarks.transpose(-1, -2) * scale, hidden_slots)
    between = _softmax(query_landmarks @ key_landmarks.transpose(-1, -2) * scale, hidden_slots)
    between = between * (query_pool.sum(dim=-1, keepdim=True) > 0)
    from_landmarks = _softmax(query_landmarks @ key.transpose(-1, -2) * scale, ~visible[:, None, None, :])
    gathered = from_landmarks @ value
    solved = _NEWTON_OR_CHOLESKY[form.method](between, gathered)
    # With no more tokens than landmarks each landmark is a token, and its own value is what belongs to it.
    few = (visible.sum(dim=-1) <= form.landmarks)[:, None, None, None]
    values = torch.where(few, key_pool @ value, solved)
    return to_landmarks @ values * visible.any(dim=-1)[:, None, None, None]


def segment_means(visible: torch.Tensor, segments: int) -> torch.Tensor:
    """The matrix that takes means over equal parts of the visible tokens.

    Args:
        visible: ``[batch, length]`` bool.

    Returns:
        ``[batch, segments, length]`` float; each row sums to 1, or is zero where there are fewer tokens than segments.
    """
    rank = visible.long().cumsum(dim=-1) - 1
    count = visible.sum(dim=-1, keepdim=True)
    segment = rank * segments // count.clamp_min(segments)
    member = (segment[:, None, :] == torch.arange(segments, device=visible.device)[None, :, None]) & visible[:, None, :]
    return member / member.sum(dim=-1, keepdim=True).clamp_min(1)


def _softmax(scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores.masked_fill(hidden, _HIDDEN), dim=-1).masked_fill(hidden, 0.0)


def newton_solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``pinv(matrix) @ right`` by the third-order iteration of the paper (Razavi et al., 2014), six steps."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    columns = matrix.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    rows = matrix.sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    inverse = matrix.transpose(-1, -2) / (columns * rows).clamp_min(torch.finfo(matrix.dtype).tiny)
    for _ in range(NEWTON_ITERATIONS):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse @ right


def cholesky_solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``(matrix^T matrix + RIDGE)^-1 matrix^T right``, which is near ``pinv(matrix) @ right``."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    normal = matrix.transpose(-1, -2) @ matrix + RIDGE * identity
    return torch.cholesky_solve(matrix.transpose(-1, -2) @ right, torch.linalg.cholesky(normal))


_NEWTON_OR_CHOLESKY = {"newton": newton_solve, "cholesky": cholesky_solve}
