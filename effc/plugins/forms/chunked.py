"""Chunked attention: the sequence is cut, each piece attends to itself, two cuts may be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm, Cost, parameters, whole_number
from effc.plugins.forms.entry import FormEntry
from effc.suggest import did_you_mean

Merge = Literal["concat", "add", "gate"]
_SIZE = 512


@dataclass(frozen=True)
class Chunked(AttentionForm):
    """Attention inside chunks of ``size`` tokens, of one chunking or of two that are merged.

    Chunking A has the chunks ``i // size``, chunking B, shifted by half a chunk as in Swin (Liu et al., 2021), the
    chunks ``(i + size // 2) // size``. ``y_A`` and ``y_B`` are softmax attention inside the query's chunk of either,
    ``l_A`` and ``l_B`` the log-sum-exp of its scores. A row of the output is, by ``merge``:

    * ``concat``: ``y_A``; the outputs of the chunks one behind the other (blockwise attention, Qiu et al., 2020; the
      chunked layers of Llama 4). No information crosses a chunk's edge, save through global tokens.
    * ``add``: ``(y_A + y_B) / 2``; the outputs of overlapping chunks averaged, as SLED (Ivgi et al., 2023) joins
      overlapping chunks, but without choosing one of them. A chunking of which a row sees no key counts as zeros.
    * ``gate``: ``g y_A + (1 - g) y_B`` with ``g = sigmoid(l_A - l_B + gate)``. At ``gate = 0`` this is the exact merge
      of partial attentions by their log-sum-exp (FlashInfer, Ye et al., 2025): one softmax over the keys of both
      chunks, those in both counted twice. ``gate`` is a learned number per head (as the gate of Infini-attention,
      Munkhdalai et al., 2024) that starts at 0 and prefers A where positive; a gate without the log-sum-exp would
      weigh a chunk that holds nothing of interest like any other.

    The first ``tokens`` tokens see and are seen by all, in either chunking.

    Extra input: ``gate [heads]``, of ``gate`` only; zeros if missing.

    Raises:
        UsageError: on an odd ``size`` where two chunkings are merged.
    """

    size: int
    merge: Merge = "concat"
    tokens: int = 0
    op_type: ClassVar[str] = "ChunkedAttention"
    extra_inputs: ClassVar[tuple[str, ...]] = ("gate",)
    learned: ClassVar[tuple[str, ...]] = ("gate",)

    def __post_init__(self) -> None:
        if self.merge != "concat" and self.size % 2:
            raise UsageError(
                f"'{self}' shifts its chunks by half of them, but their size is odd.", "Give an even number of tokens."
            )

    def __str__(self) -> str:
        text = f"chunked:{self.size}:{self.merge}"
        return f"{text}:{self.tokens}" if self.tokens else text

    @property
    def shifts(self) -> tuple[int, ...]:
        """By how many positions each chunking is shifted."""
        return (0,) if self.merge == "concat" else (0, self.size // 2)

    def visible(
        self, shift: int, query: NDArray[np.int64], key: NDArray[np.int64], causal: bool = False
    ) -> NDArray[np.bool_]:
        """True where one chunking lets position ``query`` attend to position ``key``; both broadcast."""
        result = (query + shift) // self.size == (key + shift) // self.size
        result = result | (query < self.tokens) | (key < self.tokens)
        return np.asarray(result & (key <= query) if causal else result, dtype=bool)

    def scores(self, length: int, causal: bool) -> int:
        """Exact number of scores of all chunkings."""
        tokens = min(self.tokens, length)
        total = 0
        for shift in self.shifts:
            edges = np.arange(-shift, length + self.size, self.size).clip(0, length)
            outside = (edges[1:] - np.maximum(edges[:-1], tokens)).clip(0)
            if causal:
                # Rows behind the global tokens see all of those; the global rows see what lies before them.
                total += int((outside * (outside + 1) // 2).sum()) + tokens * (length - tokens)
                total += tokens * (tokens + 1) // 2
            else:
                total += int((outside**2).sum()) + 2 * tokens * length - tokens**2
        return total

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Two matrix products over the scores of every chunking; scratch is 64 rows of a chunk and the global rows."""
        tokens = min(self.tokens, length)
        scratch = 64 * (min(self.size, length) + tokens) + tokens * length
        return Cost(4 * self.scores(length, causal) * head_dim, scratch)

    def picture(self, length: int, causal: bool) -> NDArray[np.float64]:
        """The share of chunkings that see a pair."""
        position = np.arange(length)
        seen = [self.visible(shift, position[:, None], position[None, :], causal) for shift in self.shifts]
        return np.asarray(np.mean(np.stack(seen), axis=0), dtype=np.float64)


def _parse(text: str, arguments: list[str], syntax: str) -> Chunked:
    if len(arguments) > 3:
        parameters(text, arguments, syntax, (_SIZE, 0, 0))
    size = whole_number(text, arguments[0], syntax) if arguments else _SIZE
    merge = arguments[1] if len(arguments) > 1 else "concat"
    if merge not in get_args(Merge):
        raise UsageError(f"'{merge}' in '{text}' is no merge of chunks.", did_you_mean(merge, get_args(Merge)))
    tokens = whole_number(text, arguments[2], syntax, 0) if len(arguments) > 2 else 0
    return Chunked(size, merge, tokens)  # type: ignore[arg-type]


CHUNKED_FORMS: dict[str, FormEntry] = {
    "chunked": FormEntry(
        "chunked[:SIZE[:MERGE[:GLOBAL]]]",
        f"inside chunks of SIZE tokens ({_SIZE}); MERGE is concat (default) for one chunking, add or gate for two, "
        "shifted by half a chunk; the first GLOBAL tokens (0) see and are seen by all",
        "hierarchical and chunked",
        _parse,
        "Blockwise attention, Qiu et al., 2020; SLED, Ivgi et al., 2023",
    ),
}
