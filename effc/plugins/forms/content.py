"""Attention where the content decides which keys a query sees: strongest scores, strongest blocks, important tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effc.plugins.forms.base import AttentionForm, Cost, parameters, whole_number
from effc.plugins.forms.entry import FormEntry

SUMMARY_BLOCK = 64
"""``dynamic`` cuts queries and keys into blocks of this many positions."""
_GROUP = "content-based"


@dataclass(frozen=True)
class TopK(AttentionForm):
    """Softmax over the ``count`` strongest scores of each query (Gupta et al., "Memory-efficient Transformers via
    Top-k Attention", 2021).

    ``o_i = sum_{j in T_i} softmax_j(s_ij) v_j``, where ``T_i`` holds the ``count`` visible keys of the largest
    ``s_ij = scale * q_i . k_j``; of equal scores the one at the lower position comes first. With no more than ``count``
    visible keys this is dense attention. Every score is computed, so that this form saves no products of queries and
    keys and costs a selection on top: it shows how few weights matter.
    """

    count: int
    op_type: ClassVar[str] = "TopKAttention"

    def __str__(self) -> str:
        return f"topk:{self.count}"

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """All scores, then ``count`` values per query; scratch is the scores of a block of 64 queries."""
        pairs = length * (length + 1) // 2 if causal else length * length
        kept = min(self.count, length)
        weighted = length * kept - (kept * (kept - 1) // 2 if causal else 0)
        return Cost(2 * head_dim * (pairs + weighted), 64 * length)


@dataclass(frozen=True)
class BlockTopK(AttentionForm):
    """Exact attention to the ``count`` key blocks of the largest pooled scores.

    Positions are cut into blocks of ``block``, counted from position 0. Query block b and key block c get the score
    ``mean(q) . mean(k)``: the mean of c's unpadded keys and the mean of b's pool of queries, taken over the query heads
    that share a key/value head, so that these heads share one selection. The pool is

    * bidirectional: the unpadded queries of b;
    * causal: the unpadded ones of the ``block`` queries that end with b's first query, or with the first query there is
      if that lies later. So no output depends on what comes behind it.

    Where there are fewer queries than keys, the pool holds those that are there. Chosen are, for each batch row,
    key/value head and query block: b itself, the first block that has an unpadded key (the attention sink), then blocks
    by score, ``count`` in all; of equal scores the lower position. Blocks without unpadded keys and, if causal, those
    after b are never chosen. Queries see the unpadded keys of the chosen blocks, if causal up to themselves.

    The estimate by mean-pooled queries and keys is that of MInference (Jiang et al., 2024; its block-sparse heads).
    MoBA (Lu et al., 2025) and NSA (Yuan et al., 2025) choose blocks by pooled keys in training, Quest (Tang et al.,
    2024) by per-channel bounds of a page while decoding.
    """

    count: int
    block: int
    op_type: ClassVar[str] = "BlockTopKAttention"

    def __str__(self) -> str:
        return f"topk-blocks:{self.count}:{self.block}"

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Pooling, all pooled scores, then the chosen blocks; scratch is the scores of one block of queries."""
        blocks = -(-length // self.block)
        pooled = 2 * head_dim * (2 * length + (blocks * (blocks + 1) // 2 if causal else blocks * blocks))
        tail = blocks * self.block - length
        pairs = 0
        for number in range(blocks):
            rows = self.block - (tail if number == blocks - 1 else 0)
            if causal:
                pairs += rows * (rows + 1) // 2 + rows * min(number, self.count - 1) * self.block
            else:
                pairs += rows * min(self.count * self.block, length)
        return Cost(4 * head_dim * pairs + pooled, self.block * min(self.count * self.block, length))


@dataclass(frozen=True)
class Dynamic(AttentionForm):
    """Important tokens and near ones exactly, all others through the means of their blocks.

    Positions are cut into blocks of 64, counted from position 0. A query of block b sees

    * **near** keys exactly: those of the blocks ``b - w ... b + w`` with ``w = window / 64``, if causal ``b - w ... b``
      and not behind the query;
    * **important** keys exactly: the ``tokens`` unpadded keys of largest importance; of equal importance the lower
      position. Bidirectional: among all keys of the sequence. Causal: among those of the blocks before ``b - w``, so
      that no output depends on what comes behind it, and decoding token by token gives what the whole gives;
    * the **others** of each block (if causal, of those before ``b - w``) as one pair of mean key and mean value, with
      the logarithm of their number added to the score.

    One softmax runs over all three. It is exact where the keys behind a mean are equal, since
    ``n exp(s) = exp(s + log n)``.

    Importance is ``w . k_j + u |k_j|^2`` for each key/value head; ``scorer [kv_heads, head_dim + 1]`` holds w and,
    last, u. It starts from ``w = 0, u = -1``: keys of small norm draw most attention (Devoto et al., "A Simple and
    Effective L2 Norm-Based Strategy for KV Cache Compression", 2024). Calibration fits it to the attention that keys
    receive. Keeping the keys that gather attention is H2O's idea (Zhang et al., 2023); a mean weighted by the
    logarithm of its count is the proportional attention of Token Merging (Bolya et al., 2023).
    """

    tokens: int
    window: int
    op_type: ClassVar[str] = "DynamicAttention"
    extra_inputs: ClassVar[tuple[str, ...]] = ("scorer",)
    learned: ClassVar[tuple[str, ...]] = ("scorer",)

    def __str__(self) -> str:
        return f"dynamic:{self.tokens}:{self.window}"

    @property
    def reach(self) -> int:
        """How many blocks on one side of a query's own are near."""
        return self.window // SUMMARY_BLOCK

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Scoring and means of all keys, then near and important keys and one mean per farther block."""
        blocks = -(-length // SUMMARY_BLOCK)
        tail = blocks * SUMMARY_BLOCK - length
        pairs = 0
        for number in range(blocks):
            rows = SUMMARY_BLOCK - (tail if number == blocks - 1 else 0)
            far_before = max(0, number - self.reach)
            near_before = (number - far_before) * SUMMARY_BLOCK
            if causal:
                important = min(self.tokens, far_before * SUMMARY_BLOCK)
                pairs += rows * (near_before + important + far_before) + rows * (rows + 1) // 2
            else:
                near = min((number + self.reach + 1) * SUMMARY_BLOCK, length) - far_before * SUMMARY_BLOCK
                far_after = max(0, blocks - 1 - number - self.reach)
                pairs += rows * (near + min(self.tokens, length - near) + far_before + far_after)
        columns = min(self.tokens, length) + (self.reach * (1 if causal else 2) + 1) * SUMMARY_BLOCK + blocks
        return Cost(4 * head_dim * pairs + 6 * head_dim * length, SUMMARY_BLOCK * columns)


def _parse_topk(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    return TopK(*parameters(text, arguments, syntax, (64,)))


def _parse_topk_blocks(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    count, block = parameters(text, arguments, syntax, (8, 64))
    # A query's own block and the first one are always among them.
    whole_number(text, str(count), syntax, 2)
    return BlockTopK(count, block)


def _parse_dynamic(text: str, arguments: list[str], syntax: str) -> AttentionForm:
    tokens, window = parameters(text, arguments, syntax, (256, 64), 0)
    whole_number(text, str(tokens), syntax)
    return Dynamic(tokens, -(-window // SUMMARY_BLOCK) * SUMMARY_BLOCK)


CONTENT_FORMS: dict[str, FormEntry] = {
    "topk": FormEntry(
        "topk[:COUNT]",
        "the COUNT strongest scores of each query (64); computes every score, so it saves no time",
        _GROUP,
        _parse_topk,
        "Top-k attention, Gupta et al., 2021",
    ),
    "topk-blocks": FormEntry(
        "topk-blocks[:COUNT[:BLOCK]]",
        "COUNT blocks (8, at least 2) of BLOCK keys (64) for each block of queries, chosen by pooled scores; the own "
        "block and the first are always among them",
        _GROUP,
        _parse_topk_blocks,
        "MInference, Jiang et al., 2024; MoBA, Lu et al., 2025",
    ),
    "dynamic": FormEntry(
        "dynamic[:TOKENS[:WINDOW]]",
        "exact attention to the TOKENS most important keys (256) and WINDOW positions on either side of the query's "
        "block of 64 (64, rounded up to whole blocks), block means for the rest",
        _GROUP,
        _parse_dynamic,
        "H2O, Zhang et al., 2023; Token Merging, Bolya et al., 2023",
    ),
}
