"""Linear attention: a feature map of queries and keys in place of the softmax, O(length) time, O(1) state."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm, Cost, parameters
from effc.plugins.forms.entry import FormEntry
from effc.suggest import did_you_mean

APPROXIMATE = 0.3
"""Shade of a pair in a picture whose weight is approximated and not computed."""
EMPTY_STABILISER = -1e30
"""The largest exponent among no keys."""
CAUSAL_CHUNK = 128
"""Positions whose pairs a causal lowering computes as a block; what lies before comes from the running state."""
MAPS = ("elu", "relu")
_GROUP = "linear and low rank"


class LinearForm(AttentionForm):
    """Attention ``o_i = phi(q_i) S / (phi(q_i) . z)`` with ``S = sum_j phi(k_j) v_j^T`` and ``z = sum_j phi(k_j)``.

    The sums run over the visible keys j, if causal ``j <= i``; a row whose denominator is zero gives zeros. The weight
    of a pair is thus ``phi(q_i) . phi(k_j)``, and S and z are all that decoding has to remember of the past.
    """

    op_type: ClassVar[str] = "LinearAttention"
    has_stabiliser: ClassVar[bool] = False
    """True if the state is kept relative to the largest exponent among its keys, which is then part of it."""

    @abstractmethod
    def features(self, head_dim: int) -> int:
        """Width of the feature map."""

    @abstractmethod
    def map_flops(self, head_dim: int) -> int:
        """Floating-point operations of the matrix products in one token's feature map."""

    def state_shapes(self, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the recurrent state of one sequence, by name, in the order of the operator's state inputs."""
        features = self.features(head_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "state": (kv_heads, features, head_dim),
            "normaliser": (kv_heads, features),
        }
        return shapes | {"stabiliser": (kv_heads,)} if self.has_stabiliser else shapes

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Feature maps, state and its use; causal forms also compute the pairs within each chunk."""
        features = self.features(head_dim)
        flops = length * (2 * self.map_flops(head_dim) + 4 * features * (head_dim + 1))
        if causal:
            full, rest = divmod(length, CAUSAL_CHUNK)
            flops += 2 * (full * CAUSAL_CHUNK**2 + rest**2) * (features + head_dim)
        return Cost(flops, max(features * head_dim, min(length, CAUSAL_CHUNK) * max(features, CAUSAL_CHUNK)))

    def picture(self, length: int, causal: bool) -> NDArray[np.float64]:
        """One shade wherever a key takes part: its weight is not that of the softmax."""
        shade = np.full((length, length), APPROXIMATE)
        return np.tril(shade) if causal else shade


@dataclass(frozen=True)
class Linear(LinearForm):
    """Elementwise feature maps: ``elu`` is ``elu(x) + 1`` (Katharopoulos et al., 2020), ``relu`` is ``max(x, 0)``.

    As in that paper the map takes queries and keys as they are: the scale of the softmax is not applied. (For ``relu``
    it would cancel.)
    """

    map: str = "elu"

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise UsageError(f"'{self.map}' is not a feature map of linear attention.", did_you_mean(self.map, MAPS))

    def __str__(self) -> str:
        return f"linear:{self.map}"

    @property
    def needs_recovery(self) -> bool:
        """True: no softmax is approximated."""
        return True

    def features(self, head_dim: int) -> int:
        """Width of the feature map."""
        return head_dim

    def map_flops(self, head_dim: int) -> int:
        """None: the map is elementwise."""
        return 0


@dataclass(frozen=True)
class Performer(LinearForm):
    """FAVOR+ (Choromanski et al., 2021): positive orthogonal random features, an unbiased estimate of the softmax.

    ``phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(M)`` with ``x' = sqrt(scale) x``, so that ``phi(q) . phi(k)`` has the mean
    ``exp(scale q . k)``. ``features [M, head_dim]`` are the rows of W, shared by the heads: blocks of head_dim
    orthogonal rows with the lengths of Gaussian vectors.
    """

    count: int = 256
    extra_inputs: ClassVar[tuple[str, ...]] = ("features",)
    learned: ClassVar[tuple[str, ...]] = ("features",)
    has_stabiliser: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"performer:{self.count}"

    def features(self, head_dim: int) -> int:
        """Width of the feature map."""
        return self.count

    def map_flops(self, head_dim: int) -> int:
        """One projection onto the random features."""
        return 2 * head_dim * self.count


@dataclass(frozen=True)
class Hedgehog(LinearForm):
    """Hedgehog (Zhang et al., 2024): learned feature maps that imitate the softmax after training.

    ``phi(x) = softmax([x A, -x A])`` with one matrix A for each head: ``query_map [heads, head_dim, head_dim]`` and
    ``key_map [kv_heads, head_dim, head_dim]``, identities to start from. The scale of the softmax is not applied: A
    learns its own.
    """

    extra_inputs: ClassVar[tuple[str, ...]] = ("query_map", "key_map")
    learned: ClassVar[tuple[str, ...]] = ("query_map", "key_map")

    def __str__(self) -> str:
        return "hedgehog"

    @property
    def needs_recovery(self) -> bool:
        """True: the maps have to be learned."""
        return True

    def features(self, head_dim: int) -> int:
        """Width of the feature map."""
        return 2 * head_dim

    def map_flops(self, head_dim: int) -> int:
        """One square projection."""
        return 2 * head_dim * head_dim


def _parse_linear(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    if len(arguments) > 1:
        raise UsageError(f"'{text}' has too many parameters.", f"Write {syntax}.")
    return Linear(*arguments)


def _parse_performer(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    return Performer(*parameters(text, arguments, syntax, (256,)))


def _parse_hedgehog(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    parameters(text, arguments, syntax, ())
    return Hedgehog()


LINEAR_FORMS: dict[str, FormEntry] = {
    "linear": FormEntry(
        "linear[:MAP]",
        "linear attention with the feature map MAP: elu, that is elu(x) + 1, or relu (elu); needs recovery",
        _GROUP,
        _parse_linear,
        "Katharopoulos et al., 2020",
    ),
    "performer": FormEntry(
        "performer[:FEATURES]",
        "softmax estimated by FEATURES positive orthogonal random features (256)",
        _GROUP,
        _parse_performer,
        "FAVOR+, Choromanski et al., 2021",
    ),
    "hedgehog": FormEntry(
        "hedgehog",
        "linear attention with a learned feature map per head; needs recovery",
        _GROUP,
        _parse_hedgehog,
        "Zhang et al., 2024",
    ),
}
