"""A linear layer whose weight is a product of two thinner ones."""

from __future__ import annotations

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """``up(down(x))`` in place of ``x W^T + b``.

    Args:
        in_features, out_features: of the whole.
        rank: what lies between.
        bias: whether ``up`` has one.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> torch.Tensor:
        """The product ``[out, in]``: models ask their layers' weights for dtype and device."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the whole, ``[out]``."""
        return self.up.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        result: torch.Tensor = self.up(self.down(inputs))
        return result

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        return f"{self.in_features} -> {self.rank} -> {self.out_features}"
