"""Reading what a model's own attention may see from the mask function that transformers hands to a mask interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effc.plugins.forms.terms import Local
from effc.plugins.pattern import DENSE, Pattern

# A window wider than this is no restriction on any sequence that effc compiles for.
_WIDEST = 1 << 17


@dataclass(frozen=True)
class Visibility:
    """What one attention module sees before any rewrite.

    ``unsupported`` holds the reason why it cannot be lowered, or None. ``readable`` is False where ``causal`` and
    ``pattern`` do not say what the module sees, so that torch could not compute it either.
    """

    causal: bool
    pattern: Pattern = DENSE
    unsupported: str | None = None
    readable: bool = True

    @classmethod
    def unknown(cls, reason: str) -> Visibility:
        """Of a module whose mask is no pattern, or cannot be read."""
        return cls(False, unsupported=reason, readable=False)


def read_mask_function(mask_function: Callable[..., torch.Tensor]) -> Visibility:
    """Find causality and window of ``mask_function(batch, head, query_index, key_index)`` by evaluating it.

    The function is asked about one distant query and every key around it, and about another query to make sure that
    only the distance counts. Functions that look at data (packed sequences, image blocks) or at absolute positions
    (chunked attention) cannot be written as a pattern.
    """
    distance = torch.arange(-_WIDEST, _WIDEST + 1)
    zero = torch.zeros((), dtype=torch.long)
    seen = []
    # A prime apart, so that no chunk size puts both at the same place of their chunk.
    for position in (8 * _WIDEST, 8 * _WIDEST + 12_347):
        query = torch.full_like(distance, position)
        try:
            seen.append(torch.as_tensor(mask_function(zero, zero, query, query + distance)).expand(distance.shape))
        except (IndexError, RuntimeError):
            return Visibility.unknown("its mask depends on the input (packed or block-wise sequences)")
    if not torch.equal(seen[0], seen[1]):
        return Visibility.unknown("its mask depends on absolute positions (chunked attention)")
    visible = distance[seen[0]]
    if not len(visible):
        return Visibility.unknown("its mask hides everything")
    left, right = -int(visible.min()), int(visible.max())
    if len(visible) != left + right + 1:
        return Visibility.unknown("its mask has gaps")
    if right == 0:
        return Visibility(True, DENSE if left == _WIDEST else Pattern((Local(left + 1),)))
    if left == right:
        return Visibility(False, DENSE if left == _WIDEST else Pattern((Local(2 * left),)))
    return Visibility.unknown("its window has different reach to the left and to the right")
