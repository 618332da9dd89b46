"""Hedgehog (Zhang et al., 2024): learned feature maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.linear import Hedgehog
from effc.plugins.reference.dispatch import initial_parameters
from effc.plugins.reference.linear import Features, feature_maps, needed


@feature_maps.register
def _(
    form: Hedgehog, query: torch.Tensor, key: torch.Tensor, scale: float, extras: Mapping[str, torch.Tensor]
) -> Features:
    return Features(
        _both_signs(query @ needed(extras, "query_map", form).to(query.dtype)),
        _both_signs(key @ needed(extras, "key_map", form).to(key.dtype)),
    )


def _both_signs(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.cat([x, -x], dim=-1), dim=-1)


@initial_parameters.register
def _(form: Hedgehog, num_heads: int, kv_heads: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    return {"query_map": _identities(num_heads, head_dim), "key_map": _identities(kv_heads, head_dim)}


def _identities(heads: int, head_dim: int) -> torch.Tensor:
    return torch.eye(head_dim).repeat(heads, 1, 1)
