"""Reading what a model's own attention may see: from the mask function that transformers hands to a mask interface, or
from the mask that a model builds itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effc.plugins.forms.terms import Local
from effc.plugins.pattern import DENSE, Pattern

# A window wider than this is no restriction on any sequence that effc compiles for.
_WIDEST = 1 << 17
# What is added to a score below this hides the pair; biases on scores are far above it.
_HIDDEN = -5e3


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
    return _of_reach(None if left == _WIDEST else left, None if right == _WIDEST else right)


def read_mask_tensor(mask: torch.Tensor, padding: torch.Tensor | None = None) -> tuple[Visibility, torch.Tensor | None]:
    """Write a mask that the model built itself as a pattern, padding, and what it adds to the scores besides.

    Args:
        mask: ``[1 or batch, 1 or heads, length, length]`` bool (True is visible), or floats that are added to the
            scores.
        padding: ``[batch, length]``, 0 at padding; None where nothing is padded. One sequence must have none.

    Returns:
        what the mask shows, and ``[1 or batch, heads, length, length]`` that it adds to visible pairs (zero at hidden
        ones), None if it adds nothing.
    """
    length = mask.shape[-1]
    if mask.shape[-2] != length:
        return Visibility.unknown("it builds its own attention mask, between two texts"), None
    real = torch.ones(len(mask), length, dtype=torch.bool) if padding is None else padding.bool()
    visible = mask if mask.dtype == torch.bool else mask > _HIDDEN
    whole = int(real.all(dim=-1).long().argmax())
    if not torch.equal(visible, visible[:, :1].expand_as(visible)) or not real[whole].all():
        return Visibility.unknown("it builds its own attention mask, of another kind for every head"), None
    visible = visible[:, 0].expand(len(real), -1, -1)
    pattern = visible[whole]
    shown = pattern & real[:, None, :] | ~real[:, :, None]
    if not torch.equal(shown, visible | ~real[:, :, None]):
        return Visibility.unknown("it builds its own attention mask, which is no pattern and padding"), None
    reach = _reach(pattern)
    if reach is None:
        return Visibility.unknown("it builds its own attention mask, which is no window"), None
    visibility = _of_reach(*(None if side == length - 1 else side for side in reach))
    if mask.dtype == torch.bool:
        return visibility, None
    added = mask.float().masked_fill(mask <= _HIDDEN, 0.0)
    # A softmax does not see what is added to a whole row.
    relative = added - added.diagonal(dim1=-2, dim2=-1)[..., None]
    pairs = (visible & real[:, :, None])[:, None]
    different = (relative - relative[min(whole, len(relative) - 1)]) * pairs
    if not bool(different.abs().max() <= 1e-5 * max(1.0, float(added.abs().max()))):
        return Visibility.unknown("its own attention mask adds a bias that depends on the input"), None
    added = added[min(whole, len(added) - 1)][None]
    return visibility, added if added.any() else None


def _reach(visible: torch.Tensor) -> tuple[int, int] | None:
    """``(left, right)`` of a ``[length, length]`` window, or None if it is none."""
    position = torch.arange(len(visible))
    distance = position[None, :] - position[:, None]
    seen = distance[visible]
    if not len(seen):
        return None
    left, right = -int(seen.min()), int(seen.max())
    if left < 0 or right < 0 or not torch.equal(visible, (distance >= -left) & (distance <= right)):
        return None
    return left, right


def _of_reach(left: int | None, right: int | None) -> Visibility:
    """Of a window that reaches so far back and ahead; None reaches to the end."""
    if right == 0:
        return Visibility(True, DENSE if left is None else Pattern((Local(left + 1),)))
    if left is None and right is None:
        return Visibility(False)
    if min(left or 0, right or 0) < 0:
        return Visibility.unknown("its window leaves out the token itself")
    if left is None or right is None:
        return Visibility.unknown("its window is open on one side only")
    return Visibility(False, Pattern((Local(2 * left) if left == right else Local(left, right),)))
