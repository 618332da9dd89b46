"""Unstructured pruning: a share of the weights of every linear layer becomes zero."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedModel

from effc.errors import PassFailedError
from effc.passes.prune_slice import weight_of
from effc.passes.prune_weights import PruneWeights

# Of a share, by rounding within rows or blocks.
_TOLERANCE = 0.02


class PruneUnstructured(PruneWeights):
    """Set ``settings.share`` of the weights of every layer to zero, wherever they are."""

    name: ClassVar[str] = "prune-unstructured"
    version: ClassVar[int] = 1

    def ensures(self, model: PreTrainedModel) -> None:
        """As many weights must be zero as were asked for.

        Raises:
            PassFailedError: naming the layer where they are not.
        """
        assert self.settings.share is not None
        for name in self._masked:
            weight = weight_of(model.get_submodule(name))
            zeros = float((weight == 0).double().mean())
            if zeros < self.settings.share - max(_TOLERANCE, 1 / min(weight.shape)):
                raise PassFailedError(f"Only {zeros:.3f} of '{name}' is zero.", "Report this model.")
