"""Low-rank attention: queries and keys meet in a fixed number of landmarks or projected keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import PreconditionError, UsageError
from effc.plugins.forms.base import AttentionForm, Cost, parameters, whole_number
from effc.plugins.forms.entry import FormEntry
from effc.plugins.forms.linear import APPROXIMATE
from effc.suggest import did_you_mean

NEWTON_ITERATIONS = 6
"""As many as the paper uses."""
RIDGE = 1e-3
"""Added to the diagonal of the normal equations, whose largest entries are near 1, so that fp32 can factorise them."""
METHODS = ("newton", "cholesky")
_GROUP = "linear and low rank"


class LowRankForm(AttentionForm):
    """Bidirectional forms whose scores have at most a fixed rank."""

    supports_causal: ClassVar[bool] = False

    def refuse_causal(self) -> None:
        """What a reference or body asked for the causal form does.

        Raises:
            PreconditionError: always.
        """
        raise PreconditionError(
            f"'{self}' has no causal form: it pools over all positions before any of them is seen.",
            "Use a causal form such as performer:256 or linear:elu.",
        )

    def picture(self, length: int, causal: bool) -> NDArray[np.float64]:
        """One shade wherever a key takes part: its weight is approximated."""
        return np.full((length, length), APPROXIMATE)


@dataclass(frozen=True)
class Nystrom(LowRankForm):
    """Nyströmformer (Xiong et al., 2021): ``softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V``.

    The landmarks Q~ and K~ are means over ``landmarks`` segments, which cut the visible tokens, not the positions, into
    parts that differ by one token at most: padding changes nothing. Where queries and keys are equally many they are
    taken for the same tokens, and hidden ones are left out of Q~ too. With no more visible keys than landmarks every
    token is a landmark, and the result is that of dense attention. The paper's depthwise convolution is not included.

    ``newton`` takes the paper's six iterations towards the pseudo-inverse; ``cholesky`` solves the normal equations
    ``(A^T A + RIDGE) X = A^T B`` instead.
    """

    landmarks: int = 64
    method: str = "newton"
    op_type: ClassVar[str] = "NystromAttention"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"'{self.method}' is no way to the pseudo-inverse of nystrom.", did_you_mean(self.method, METHODS)
            )

    def __str__(self) -> str:
        return f"nystrom:{self.landmarks}" + ("" if self.method == "newton" else f":{self.method}")

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Pooling, two thin attentions and the pseudo-inverse; dense if there are no more tokens than landmarks."""
        landmarks = self.landmarks
        if length <= landmarks:
            return Cost(4 * length * length * head_dim, length * length)
        flops = length * landmarks * head_dim * (2 * 2 + 2 * 4)
        if self.method == "newton":
            flops += NEWTON_ITERATIONS * 4 * 2 * landmarks**3 + 2 * landmarks**2 * head_dim
        else:
            flops += 2 * landmarks**3 + landmarks**3 // 3 + 6 * landmarks**2 * head_dim
        return Cost(flops, length * landmarks)


@dataclass(frozen=True)
class Linformer(LowRankForm):
    """Linformer (Wang et al., 2020): ``softmax(Q (E K)^T) F V`` with learned projections E and F over the positions.

    ``key_projection`` E and ``value_projection`` F, ``[projected, length]`` each, are shared by the heads (the paper's
    headwise sharing). They start as means over segments. Hidden keys and positions that a shorter text does not have
    are left out, and what remains of a row is scaled up so that its absolute sum stays; a projected key of which
    nothing remains is hidden. Texts longer than ``length`` cannot be computed.
    """

    projected: int = 256
    length: int = 512
    op_type: ClassVar[str] = "LinformerAttention"
    extra_inputs: ClassVar[tuple[str, ...]] = ("key_projection", "value_projection")
    learned: ClassVar[tuple[str, ...]] = ("key_projection", "value_projection")

    def __post_init__(self) -> None:
        # A single column would be broadcast over longer inputs instead of being refused.
        if self.length < 2:
            raise UsageError(f"'{self}' is made for fewer than two positions.", "Write linformer:256:512.")
        if self.projected > self.length:
            raise UsageError(
                f"'{self}' projects {self.length} positions onto {self.projected}, which are more.",
                "Write linformer:PROJECTED:LENGTH with PROJECTED at most LENGTH.",
            )

    def __str__(self) -> str:
        return f"linformer:{self.projected}:{self.length}"

    @property
    def needs_recovery(self) -> bool:
        """True: the projections have to be learned."""
        return True

    @property
    def max_length(self) -> int:
        """The longest sequence that the projections cover."""
        return self.length

    def check_length(self, key_length: int) -> None:
        """Make sure that a text is not longer than the projections.

        Raises:
            PreconditionError: saying by how much it is.
        """
        if key_length > self.length:
            raise PreconditionError(
                f"'{self}' has learned projections of {self.length} positions; this input has {key_length}.",
                f"Cut the input to {self.length} tokens, or use linformer:{self.projected}:{key_length}.",
            )

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Both projections, then attention to the projected keys."""
        return Cost(8 * length * self.projected * head_dim, length * self.projected)


def _parse_nystrom(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    if len(arguments) > 2:
        raise UsageError(f"'{text}' has too many parameters.", f"Write {syntax}.")
    landmarks = whole_number(text, arguments[0], syntax) if arguments else Nystrom.landmarks
    return Nystrom(landmarks, *arguments[1:])


def _parse_linformer(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    return Linformer(*parameters(text, arguments, syntax, (256, 512)))


LOW_RANK_FORMS: dict[str, FormEntry] = {
    "nystrom": FormEntry(
        "nystrom[:LANDMARKS[:METHOD]]",
        "softmax through LANDMARKS segment means (64); pseudo-inverse by METHOD newton or cholesky (newton); "
        "bidirectional",
        _GROUP,
        _parse_nystrom,
        "Nyströmformer, Xiong et al., 2021",
    ),
    "linformer": FormEntry(
        "linformer[:PROJECTED[:LENGTH]]",
        "keys and values projected onto PROJECTED positions (256) from at most LENGTH (512); bidirectional; needs "
        "recovery",
        _GROUP,
        _parse_linformer,
        "Wang et al., 2020",
    ),
}
