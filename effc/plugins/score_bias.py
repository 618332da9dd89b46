"""Reading what a model adds to its attention scores by distance, so that it can be computed for visible pairs only.

T5 and its kin hand every attention module a tensor ``[1, heads, queries, keys]`` (Raffel et al., 2020): a learned value
for each bucket of distances, the same for every distance beyond the last bucket. ALiBi (Press et al., 2022) adds a
slope times the distance. Both depend on ``key - query`` alone, so ``2 * reach + 1`` numbers a head say everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# Distances at which a model's own function of the distance is evaluated to find where it becomes constant.
_FURTHEST = 1 << 15
# Relative to the largest bias; models compute it in fp32.
_TOLERANCE = 1e-5


class NoDistanceBias(Exception):
    """What is added to the scores is not a function of the distance that the operator knows; says which it is."""


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """What one attention module adds to its scores, as the operator's extra inputs have it.

    Attributes:
        table: ``[heads, 2 * reach + 1]`` at the distances ``-reach ... reach``, beyond as at the nearer end; or None.
        slope: ``[heads]``, times the distance ``key - query``; or None.
    """

    table: torch.Tensor | None = None
    slope: torch.Tensor | None = None

    def extras(self) -> dict[str, torch.Tensor]:
        """By the names of the operator's inputs."""
        named = {"distance_bias": self.table, "distance_slope": self.slope}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __str__(self) -> str:
        if self.table is not None:
            return f"relative position bias, constant beyond distance {self.table.shape[-1] // 2}"
        return "bias that grows linearly with the distance (ALiBi)"

    def added(self, query_length: int, key_length: int) -> torch.Tensor:
        """``[heads, query_length, key_length]``, for checks only."""
        query = torch.arange(key_length - query_length, key_length)[:, None]
        distance = torch.arange(key_length)[None, :] - query
        if self.table is not None:
            reach = self.table.shape[-1] // 2
            return self.table[:, distance.clamp(-reach, reach) + reach]
        assert self.slope is not None
        return self.slope[:, None, None] * distance


def read_score_bias(added: torch.Tensor, causal: bool, modules: Iterable[torch.nn.Module] = ()) -> ScoreBias | None:
    """Write what was added to the scores in one run as a function of the distance.

    A softmax does not see what is added to a whole row, so rows are compared after taking off what they add at
    distance 0. Of causal attention only pairs that look back count.

    Args:
        added: ``[1 or batch, heads, length, length]``, finite.
        causal: whether the module only looks back.
        modules: where to find the model's own function of the distance (``compute_bias`` of the T5 family), which
            tells the bias beyond the observed length. Without one it must be constant over half of that length.

    Returns:
        None if nothing is added.

    Raises:
        NoDistanceBias: if the bias depends on anything but the distance, or neither becomes constant nor grows
            linearly.
    """
    if not added.any():
        return None
    length = added.shape[-1]
    if added.shape[-2] != length:
        raise NoDistanceBias("it adds a bias to scores between two texts")
    if not torch.equal(added, added[:1].expand_as(added)):
        raise NoDistanceBias("the bias that it adds to the scores depends on the input")
    rows = _relative_to_self(added[0].float())
    counted = torch.ones(length, length, dtype=torch.bool).tril() if causal else torch.ones(length, length).bool()
    before, after = rows[:, -1].flip(-1), rows[:, 0]
    bias = _beyond(before, after, causal, _own_function(added, modules), length)
    difference = ((bias.added(length, length) - rows) * counted).abs().max()
    if float(difference) > _TOLERANCE * max(1.0, float((rows * counted).abs().max())):
        raise NoDistanceBias("the bias that it adds to the scores is no function of the distance alone")
    return bias


def _relative_to_self(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.diagonal(dim1=-2, dim2=-1)[..., None]


def _own_function(added: torch.Tensor, modules: Iterable[torch.nn.Module]) -> Callable[[int, int], torch.Tensor] | None:
    """The ``compute_bias(queries, keys)`` of the module that made the bias, which other modules may share."""
    length = added.shape[-1]
    for module in modules:
        compute: Callable[[int, int], torch.Tensor] | None = getattr(module, "compute_bias", None)
        # Modules that use another one's bias have the method, but no table.
        if compute is None or not isinstance(getattr(module, "relative_attention_bias", None), torch.nn.Module):
            continue
        try:
            with torch.no_grad():
                made = compute(length, length)
        except TypeError:
            continue
        if made.shape == added[:1].shape and torch.allclose(made, added[:1]):
            return compute
    return None


def _beyond(
    before: torch.Tensor,
    after: torch.Tensor,
    causal: bool,
    function: Callable[[int, int], torch.Tensor] | None,
    length: int,
) -> ScoreBias:
    """The bias from its values at the distances 0, -1, ... and 0, 1, ..., ``[heads, distances]`` each."""
    known = length
    if function is not None:
        with torch.no_grad():
            after = function(1, _FURTHEST)[0, :, 0].float()
            before = function(_FURTHEST, 1)[0, :, :, 0].float()
        before, after, known = before - before[:, :1], after - after[:, :1], 2 * _FURTHEST
    if causal:
        after = torch.zeros_like(before)
    reach = max(_constant_from(before), _constant_from(after))
    if 2 * reach <= known and reach < before.shape[-1]:
        table = torch.cat((before[:, 1 : reach + 1].flip(-1), after[:, : reach + 1]), dim=-1)
        return ScoreBias(table=table.contiguous())
    steps = torch.arange(before.shape[-1])
    slope = (before[:, -1] / -steps[-1]).contiguous()
    scale = max(1.0, float(before.abs().max()))
    linear = bool((before + slope[:, None] * steps).abs().max() <= _TOLERANCE * scale)
    if linear and (causal or bool((after - slope[:, None] * steps).abs().max() <= _TOLERANCE * scale)):
        return ScoreBias(slope=slope)
    raise NoDistanceBias("the bias that it adds to the scores neither becomes constant nor grows linearly")


def _constant_from(values: torch.Tensor) -> int:
    """The first index from which on every head's values stay as they are at the end."""
    differs = ((values - values[:, -1:]).abs() > 0).any(dim=0)
    return int(differs.nonzero().max()) + 1 if differs.any() else 0
