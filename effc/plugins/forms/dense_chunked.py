"""Dense attention that never holds more than a few rows of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.plugins.forms.base import AttentionForm, Cost, parameters
from effc.plugins.forms.entry import FormEntry

_CHUNK = 64


@dataclass(frozen=True)
class DenseChunked(AttentionForm):
    """Ordinary softmax attention over every key, computed for ``chunk`` queries at a time.

    Rows of a softmax do not depend on each other, so cutting the queries changes nothing in the result, and memory is
    O(chunk * length) instead of O(length ** 2) (Rabe and Staats, 2021). Causal chunks compute only the keys up to their
    own end, which is half of the work.
    """

    chunk: int
    op_type: ClassVar[str] = "ChunkedDenseAttention"

    def __str__(self) -> str:
        return f"dense-chunked:{self.chunk}"

    @property
    def is_dense(self) -> bool:
        """True: the result is that of ordinary attention."""
        return True

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """That of dense attention; scratch is one chunk's scores."""
        pairs = length * (length + 1) // 2 if causal else length * length
        return Cost(4 * pairs * head_dim, min(self.chunk, length) * length)

    def picture(self, length: int, causal: bool) -> NDArray[np.float64]:
        """One everywhere, or where the key is not behind the query."""
        return np.tri(length) if causal else np.ones((length, length))


def _parse(text: str, arguments: list[str], syntax: str) -> DenseChunked:
    return DenseChunked(*parameters(text, arguments, syntax, (_CHUNK,)))


DENSE_CHUNKED_FORMS: dict[str, FormEntry] = {
    "dense-chunked": FormEntry(
        "dense-chunked[:CHUNK]",
        f"ordinary attention in O(length) memory, CHUNK queries at a time ({_CHUNK})",
        "exact",
        _parse,
        "Rabe and Staats, 2021",
    ),
}
