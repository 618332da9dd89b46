"""2:4 pruning: two of every four neighbouring weights become zero, the form that sparse tensor cores compute."""

from __future__ import annotations

from typing import ClassVar

import torch
from transformers import PreTrainedModel

from effc.errors import PassFailedError
from effc.passes.prune_criteria import GROUP, KEPT_OF_GROUP
from effc.passes.prune_slice import weight_of
from effc.passes.prune_weights import PruneWeights


class PruneTwoFour(PruneWeights):
    """Set two of every four weights along the input dimension to zero.

    That is the dimension a matrix product sums over (K), where TensorRT's sparse tactics look for zeros.
    """

    name: ClassVar[str] = "prune-2:4"
    version: ClassVar[int] = 1

    def misfit(self, weight: torch.Tensor) -> str | None:
        """The inputs must be a multiple of four."""
        return None if weight.shape[1] % GROUP == 0 else f"its {weight.shape[1]} inputs are no multiple of {GROUP}"

    def ensures(self, model: PreTrainedModel) -> None:
        """No four neighbours may hold more than two weights.

        Raises:
            PassFailedError: naming the layer where they do.
        """
        for name in self._masked:
            if not is_two_four(weight_of(model.get_submodule(name))):
                raise PassFailedError(f"'{name}' is not 2:4 along its inputs.", "Report this model.")


def is_two_four(weight: torch.Tensor) -> bool:
    """Whether no four neighbours along the inputs of ``[out, in]`` hold more than two weights."""
    groups = weight.unflatten(1, (-1, GROUP))
    return bool(((groups != 0).sum(-1) <= KEPT_OF_GROUP).all())
