"""Base of the passes that set single weights to zero and leave every shape as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from effc.passes.base import Pass, PassResult
from effc.passes.prune_calibration import Calibration, InputStatistics, check_texts
from effc.passes.prune_criteria import mask_share, mask_two_four, scores, sparsegpt
from effc.passes.prune_masks import add_masks, masks_of, sparsity
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_slice import weight_of
from effc.passes.prune_structure import check_linears, layer_linears, selected


class PruneWeights(Pass[PreTrainedModel, PreTrainedModel]):
    """Mask weights of the linear layers inside transformer layers.

    Args:
        settings: the entry of the recipe's ``prune`` list.
        calibration: texts to measure on; None goes by the weights alone.
    """

    def __init__(self, settings: PruneStep, calibration: Calibration | None = None) -> None:
        self.settings: PruneStep = settings
        self._calibration = calibration
        self._masked: list[str] = []

    def requires(self, model: PreTrainedModel) -> None:
        """There must be layers to mask, and data where the criterion needs it.

        Raises:
            PreconditionError: saying what is missing.
            UsageError: if a glob matches no layer.
        """
        check_linears(model, self.settings.include, self.settings.exclude, self.settings.text)
        if self.settings.criterion in ("wanda", "sparsegpt"):
            check_texts(self._calibration, f"The criterion '{self.settings.criterion}'", "magnitude")

    def misfit(self, weight: torch.Tensor) -> str | None:
        """Why a weight ``[out, in]`` cannot be masked, or None."""
        return None

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Mask weights, in place; see ``effc.passes.prune_masks`` for how to keep them while training."""
        self.requires(model)
        linears = layer_linears(model)
        chosen = selected(linears, self.settings.include, self.settings.exclude)
        skipped = [(name, "not chosen by include and exclude") for name in linears if name not in chosen]
        misfits = [(name, reason) for name in chosen if (reason := self.misfit(weight_of(linears[name])))]
        fitting = [name for name in chosen if name not in dict(misfits)]
        changed: list[str] = []
        if self._criterion() == "magnitude":
            self._mask_all(model, {name: (linears[name], None) for name in fitting})
            changed = fitting
        else:
            assert self._calibration is not None
            for measured in self._calibration.stages(fitting):
                self._mask_all(model, {name: (linears[name], statistics) for name, statistics in measured.items()})
                changed += measured
        self._masked = changed
        metrics: dict[str, Any] = {
            "sparsity": sparsity(model),
            "zeros": sum(int((~mask).sum()) for mask in masks_of(model).values()),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "criterion": self._criterion(),
            "calibration": None if self._calibration is None else self._calibration.data,
        }
        return PassResult(model, bool(changed), changed, [*skipped, *misfits], metrics)

    def _criterion(self) -> str:
        if self.settings.criterion != "auto":
            return self.settings.criterion
        return "magnitude" if self._calibration is None else "sparsegpt"

    def _mask_all(self, model: PreTrainedModel, layers: dict[str, tuple[nn.Module, InputStatistics | None]]) -> None:
        masks = {}
        for name, (module, statistics) in layers.items():
            weight = weight_of(module)
            if self._criterion() == "sparsegpt":
                assert statistics is not None
                found, mask = sparsegpt(weight, statistics, self.settings.share)
                weight.copy_(found)
            else:
                values = scores(weight, statistics)
                share = self.settings.share
                # Wanda compares within a row, because the scale of one output says nothing of another.
                mask = mask_two_four(values) if share is None else mask_share(values, share, statistics is not None)
            masks[f"{name}.weight"] = mask.T if isinstance(module, Conv1D) else mask
        add_masks(model, masks)
