"""How many directions each layer keeps, by one of the three budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effc.passes.low_rank_settings import LowRankSection

# Kernels compute this many columns at a time; ranks of large layers are multiples of it.
_MULTIPLE = 8
_SMALLEST_ROUNDED = 64
_HALVINGS = 60


@dataclass(frozen=True)
class Spectrum:
    """A layer as the choice of its rank sees it.

    Attributes:
        inputs, outputs: its size.
        energies: squared singular values, falling, as shares of their sum.
    """

    inputs: int
    outputs: int
    energies: torch.Tensor

    @property
    def parameters(self) -> int:
        """Weights of the layer as it is."""
        return self.inputs * self.outputs

    @property
    def break_even(self) -> int:
        """The smallest rank that saves nothing."""
        return -(-self.parameters // (self.inputs + self.outputs))

    def cost(self, rank: int) -> int:
        """Weights at a rank; a layer that would not shrink stays whole."""
        return rank * (self.inputs + self.outputs) if rank < self.break_even else self.parameters

    def rounded(self, rank: int) -> int:
        """A rank that kernels like."""
        step = _MULTIPLE if min(self.inputs, self.outputs) >= _SMALLEST_ROUNDED else 1
        return max(step, round(rank / step) * step)

    def kept(self, rank: int) -> float:
        """Share of the squared output that a rank keeps."""
        return float(self.energies[:rank].sum())


def choose_ranks(spectra: Mapping[str, Spectrum], settings: LowRankSection) -> dict[str, int]:
    """The rank of every layer. One of at least ``break_even`` means that the layer had better stay whole."""
    if settings.rank is not None:
        return {name: min(settings.rank, min(s.inputs, s.outputs)) for name, s in spectra.items()}
    if settings.energy is not None:
        return {name: s.rounded(_rank_for(s, settings.energy)) for name, s in spectra.items()}
    assert settings.parameters is not None
    return _within(spectra, settings.parameters * sum(s.parameters for s in spectra.values()))


def _rank_for(spectrum: Spectrum, energy: float) -> int:
    reached = spectrum.energies.cumsum(0) >= energy
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(spectrum.energies)


def _within(spectra: Mapping[str, Spectrum], budget: float) -> dict[str, int]:
    """Spend a budget of weights where each brings most of its layer's output: directions above one threshold stay."""

    def ranks(threshold: float) -> dict[str, int]:
        return {
            name: s.rounded(int((s.energies / (s.inputs + s.outputs) >= threshold).sum()))
            for name, s in spectra.items()
        }

    low, high = 0.0, max(float(s.energies[0]) / (s.inputs + s.outputs) for s in spectra.values())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = ranks(middle)
        if sum(spectra[name].cost(rank) for name, rank in found.items()) > budget:
            low = middle
        else:
            high = middle
    return ranks(high)
