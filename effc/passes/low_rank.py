"""Low-rank factorization of linear layers by a truncated singular value decomposition.

``plain`` decomposes the weight. ``whitened`` decomposes what the layer makes of its inputs on calibration texts
(SVD-LLM, Wang et al., 2024): with ``X^T X = S S^T``, the singular values of ``W S`` are exactly what their directions
contribute to the squared output, so that cutting the smallest loses least. Where there is a bias, it takes up the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.low_rank_linear import LowRankLinear
from effc.passes.low_rank_ranks import Spectrum, choose_ranks
from effc.passes.low_rank_settings import LowRankSection
from effc.passes.prune_calibration import Calibration, InputStatistics, check_texts
from effc.passes.prune_slice import weight_of
from effc.passes.prune_structure import check_linears, layer_linears, selected

# Of the mean second moment, so that inputs that calibration never saw still count for something.
_DAMPING = 1e-4


class LowRank(Pass[PreTrainedModel, PreTrainedModel]):
    """Factorize the linear layers inside transformer layers to a rank, an energy or a budget of weights.

    Args:
        settings: the recipe's ``low_rank`` section.
        calibration: texts to measure on; None decomposes the weights alone.
    """

    name: ClassVar[str] = "low-rank"
    version: ClassVar[int] = 1

    def __init__(self, settings: LowRankSection, calibration: Calibration | None = None) -> None:
        self.settings: LowRankSection = settings
        self._calibration = None if settings.criterion == "plain" else calibration
        self._factored: list[str] = []

    def requires(self, model: PreTrainedModel) -> None:
        """There must be layers to factorize, and data where that is asked for.

        Raises:
            PreconditionError: saying what is missing.
            UsageError: if a glob matches no layer.
        """
        check_linears(model, self.settings.include, self.settings.exclude, "--low-rank")
        if self.settings.criterion == "whitened":
            check_texts(self._calibration, "Whitened factorization", "plain")

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Replace layers by two thinner ones, in place.

        Raises:
            PreconditionError: if no layer would shrink.
        """
        self.requires(model)
        linears = layer_linears(model)
        chosen = selected(linears, self.settings.include, self.settings.exclude)
        skipped = [(name, "not chosen by include and exclude") for name in linears if name not in chosen]
        before = sum(parameter.numel() for parameter in model.parameters())
        spectra = {
            name: _spectrum(linears[name], statistics)
            for stage in self._stages(chosen)
            for name, statistics in stage.items()
        }
        ranks = choose_ranks(spectra, self.settings)
        smaller = [name for name in chosen if ranks[name] < spectra[name].break_even]
        for name in chosen:
            if name not in smaller:
                reason = f"rank {ranks[name]} saves nothing; below {spectra[name].break_even} it would"
                skipped.append((name, reason))
        if not smaller:
            raise PreconditionError(
                f"Low rank {self.settings.text} shrinks no layer: {skipped[-1][0]}: {skipped[-1][1]}.",
                "Ask for a smaller budget.",
            )
        for stage in self._stages(smaller):
            for name, statistics in stage.items():
                factored = _factored(linears[name], statistics, ranks[name])
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, factored)
        self._factored = smaller
        weights = sum(spectra[name].parameters for name in chosen)
        metrics: dict[str, Any] = {
            "parameters_before": before,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "share_of_weights": sum(spectra[name].cost(ranks[name]) for name in chosen) / weights,
            "ranks": {name: ranks[name] for name in smaller},
            "energy_kept": {name: round(spectra[name].kept(ranks[name]), 6) for name in smaller},
            "criterion": "plain" if self._calibration is None else "whitened",
            "calibration": None if self._calibration is None else self._calibration.data,
        }
        return PassResult(model, True, smaller, skipped, metrics)

    def ensures(self, model: PreTrainedModel) -> None:
        """Every factor must be finite.

        Raises:
            PassFailedError: naming the layer where one is not.
        """
        for name in self._factored:
            if not all(bool(p.isfinite().all()) for p in model.get_submodule(name).parameters()):
                raise PassFailedError(f"The factors of '{name}' are not finite.", "Give more calibration texts.")

    def _stages(self, names: list[str]) -> Iterator[Mapping[str, InputStatistics | None]]:
        if self._calibration is None:
            yield dict.fromkeys(names)
        else:
            yield from self._calibration.stages(names)


def _root(statistics: InputStatistics, centred: bool) -> torch.Tensor:
    """Lower triangular ``S`` with ``S S^T`` the (centred) second moments per token, ``[in, in]``."""
    moments = statistics.moments / max(1, statistics.tokens)
    if centred:
        moments = moments - torch.outer(statistics.mean, statistics.mean)
    moments = moments.clone()
    moments.diagonal().add_(_DAMPING * float(moments.diagonal().mean()) + 1e-12)
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(moments)
    if int(info):
        # Too few tokens for all directions: rounding made some of them negative.
        values, vectors = torch.linalg.eigh(moments)
        factor = torch.linalg.qr((vectors * values.clamp_min(1e-12).sqrt()).T).R.T
    return factor


def _scaled(module: nn.Module, statistics: InputStatistics | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrix to decompose and the root it was multiplied with."""
    weight = weight_of(module).double()
    if statistics is None:
        return weight, None
    root = _root(statistics, module._parameters.get("bias") is not None)
    return weight @ root, root


def _spectrum(module: nn.Module, statistics: InputStatistics | None) -> Spectrum:
    matrix, _ = _scaled(module, statistics)
    outputs, inputs = matrix.shape
    small = matrix @ matrix.T if outputs <= inputs else matrix.T @ matrix
    energies = torch.linalg.eigvalsh(small).flip(0).clamp_min(0)
    return Spectrum(inputs, outputs, energies / energies.sum().clamp_min(1e-30))


def _factored(module: nn.Module, statistics: InputStatistics | None, rank: int) -> LowRankLinear:
    matrix, root = _scaled(module, statistics)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = values[:rank].sqrt()
    up, down = left[:, :rank] * scale, scale[:, None] * right[:rank]
    if root is not None:
        down = torch.linalg.solve_triangular(root.T, down.T, upper=True).T
    bias = module._parameters.get("bias")
    weight = weight_of(module)
    result = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias is not None).to(weight.dtype)
    result.requires_grad_(module.get_parameter("weight").requires_grad).train(module.training)
    result.down.weight.data.copy_(down)
    result.up.weight.data.copy_(up)
    if bias is not None:
        made_up = 0 if statistics is None else (weight.double() - up @ down) @ statistics.mean
        result.up.bias.data.copy_(bias.double() + made_up)
    return result
