"""The readable truth of every attention form: plain torch, any float dtype, O(length^2) memory.

Every lowering (ONNX function body, CPU kernel, CUDA kernel) is tested against these functions in float64.
"""

from __future__ import annotations

import torch

from effc.plugins.pattern import Pattern


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention restricted to the pairs that ``pattern``, causality and ``key_mask`` leave visible.

    Where ``query_length < key_length`` the queries are the last ones. A row that sees no key gives zeros.

    Args:
        query: ``[batch, heads, query_length, head_dim]``.
        key: ``[batch, kv_heads, key_length, head_dim]``; ``heads`` is a multiple of ``kv_heads`` (grouped queries,
            Ainslie et al., 2023).
        value: ``[batch, kv_heads, key_length, head_dim]``.
        pattern: which pairs are visible.
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        causal: also hide keys behind the query.
        key_mask: ``[batch, key_length]`` bool, False hides a key (padding).

    Returns:
        ``[batch, heads, query_length, head_dim]`` in the dtype of ``query``.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = pattern.mask(query.shape[2], key.shape[2], causal)
    visible = torch.from_numpy(mask).to(query.device)[None, None]
    if key_mask is not None:
        visible = visible & key_mask.to(torch.bool)[:, None, None, :]
    scores = (query @ key.transpose(-1, -2)) * scale
    weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
    # A softmax over nothing is uniform here: such rows are defined to be zero.
    weights = weights * visible.any(dim=-1, keepdim=True)
    return weights @ value
