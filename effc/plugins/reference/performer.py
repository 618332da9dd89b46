"""FAVOR+ (Choromanski et al., 2021): positive orthogonal random features."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effc.plugins.forms.linear import Performer
from effc.plugins.reference.dispatch import initial_parameters
from effc.plugins.reference.linear import Features, feature_maps, needed


@feature_maps.register
def _(
    form: Performer, query: torch.Tensor, key: torch.Tensor, scale: float, extras: Mapping[str, torch.Tensor]
) -> Features:
    features = needed(extras, "features", form).to(query.dtype)
    query, key = query * scale**0.5, key * scale**0.5
    # Factors of a whole query row cancel: its norm, its largest exponent and 1 / sqrt(M).
    query_exponents = query @ features.T
    query_maps = torch.exp(query_exponents - query_exponents.amax(dim=-1, keepdim=True).detach())
    key_exponents = key @ features.T
    largest = key_exponents.amax(dim=-1, keepdim=True).detach()
    return Features(query_maps, torch.exp(key_exponents - largest), (largest - key.square().sum(-1, True) / 2)[..., 0])


@initial_parameters.register
def _(form: Performer, num_heads: int, kv_heads: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    return {"features": orthogonal_features(form.count, head_dim, seed)}


def orthogonal_features(count: int, head_dim: int, seed: int) -> torch.Tensor:
    """``[count, head_dim]`` fp32: blocks of orthogonal rows, each row as long as a Gaussian vector of its own."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // head_dim)
    gaussian = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(gaussian)
    # Without these signs QR does not draw uniformly from the orthogonal group (Mezzadri, 2007).
    basis = basis * torch.diagonal(upper, dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64).norm(dim=-1)
    features: torch.Tensor = (basis.transpose(-1, -2) * lengths[..., None]).flatten(0, 1)[:count]
    return features.float().contiguous()
