"""The terms of position-based patterns: each is one rule for which (query i, key j) pairs are visible.

A rule is a predicate over positions that can be checked against the paper it comes from. Causality and padding
restrict it from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError

Positions = NDArray[np.int64]
Visible = NDArray[np.bool_]

RANDOM_BLOCK = 64
"""Random patterns choose whole blocks of this many keys for whole blocks of as many queries."""
HASH_PRIME = 2**31 - 1


@dataclass(frozen=True)
class Scope:
    """What a rule may look at besides the two positions.

    Attributes:
        length: number of keys.
        causal: whether keys behind the query are hidden (the pattern applies that itself, after the rules).
        marks: ``[..., length]`` True for tokens that ``global:TOKEN`` names.
    """

    length: int
    causal: bool
    marks: Visible | None = None


@dataclass(frozen=True)
class Dense:
    """Every key is visible: ordinary softmax attention (Vaswani et al., 2017)."""

    rank: ClassVar[int] = 0

    def __str__(self) -> str:
        return "dense"

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        return np.ones(np.broadcast_shapes(query.shape, key.shape), dtype=bool)


@dataclass(frozen=True)
class Local:
    """Sliding window (Longformer, Beltagy et al., 2020; Mistral for the causal form).

    ``local:W`` sees ``|i - j| <= W // 2``, causal ``i - W < j <= i``. ``local:LEFT:RIGHT`` sees
    ``i - LEFT <= j <= i + RIGHT`` in either direction.
    """

    window: int
    right: int | None = None
    rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.right is None and self.window < 1:
            raise UsageError(
                f"The window of 'local:{self.window}' must be at least 1.",
                "Give the total number of visible positions, for example local:256.",
            )

    def __str__(self) -> str:
        return f"local:{self.window}" if self.right is None else f"local:{self.window}:{self.right}"

    def reach(self, causal: bool) -> tuple[int, int]:
        """How many positions before and after the query are visible: ``(left, right)``."""
        if self.right is not None:
            return self.window, 0 if causal else self.right
        return (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        left, right = self.reach(scope.causal)
        distance = key - query
        return (distance >= -left) & (distance <= right)


@dataclass(frozen=True)
class Dilated:
    """Sliding window with gaps (Longformer, Beltagy et al., 2020): every ``dilation``-th key of a wider window.

    Sees distances that are multiples of D up to ``(W // 2) * D`` on both sides, causal ``(W - 1) * D`` backwards.
    """

    window: int
    dilation: int
    rank: ClassVar[int] = 2

    def __str__(self) -> str:
        return f"dilated:{self.window}:{self.dilation}"

    def reach(self, causal: bool) -> tuple[int, int]:
        """How many steps of ``dilation`` before and after the query are visible."""
        return (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        left, right = self.reach(scope.causal)
        distance = key - query
        inside = (distance >= -left * self.dilation) & (distance <= right * self.dilation)
        return np.asarray(inside & (distance % self.dilation == 0), dtype=bool)


@dataclass(frozen=True)
class Block:
    """Blocks of ``block`` tokens, each seeing itself and ``neighbours`` blocks on either side (blockwise attention,
    Qiu et al., 2020; the window of BigBird, Zaheer et al., 2020).
    """

    block: int
    neighbours: int = 0
    rank: ClassVar[int] = 3

    def __str__(self) -> str:
        return f"block:{self.block}:{self.neighbours}" if self.neighbours else f"block:{self.block}"

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        return np.asarray(np.abs(query // self.block - key // self.block) <= self.neighbours, dtype=bool)


@dataclass(frozen=True)
class Strided:
    """Every ``stride``-th key, counted from the query (Sparse Transformer, Child et al., 2019)."""

    stride: int
    rank: ClassVar[int] = 4

    def __str__(self) -> str:
        return f"strided:{self.stride}"

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        return np.asarray((key - query) % self.stride == 0, dtype=bool)


@dataclass(frozen=True)
class Random:
    """``count`` scattered key blocks for every block of queries (BigBird, Zaheer et al., 2020).

    Query block q (of 64) sees the key blocks ``draw(q, 0) ... draw(q, count - 1)``, which may coincide. The draws come
    from a counter-based hash, so that every implementation gets the same pairs at every length.
    """

    count: int
    seed: int = 0
    rank: ClassVar[int] = 5

    def __str__(self) -> str:
        return f"random:{self.count}:{self.seed}"

    def draw(self, query_block: Positions, number: int, scope: Scope) -> Positions:
        """The ``number``-th key block that each query block sees; causal patterns draw from what lies before."""
        blocks = np.int64(-(-scope.length // RANDOM_BLOCK))
        among = query_block + 1 if scope.causal else blocks
        state = (self.seed % HASH_PRIME * 7919 + query_block * 104729 + number * 1299709 + 1) % HASH_PRIME
        for _ in range(3):
            state = (state * state + 48271) % HASH_PRIME
        return state % among

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        query_block, key_block = query // RANDOM_BLOCK, key // RANDOM_BLOCK
        result = np.zeros(np.broadcast_shapes(query.shape, key.shape), dtype=bool)
        for number in range(self.count):
            result |= key_block == self.draw(query_block, number, scope)
        return result


@dataclass(frozen=True)
class Global:
    """The first ``count`` tokens see and are seen by all (Longformer, BigBird)."""

    count: int
    rank: ClassVar[int] = 6

    def __str__(self) -> str:
        return f"global:{self.count}"

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        return (query < self.count) | (key < self.count)


@dataclass(frozen=True)
class GlobalTokens:
    """Tokens named by id or name (``global:sep``, ``global:#102``) see and are seen by all (Longformer).

    Names (``cls``, ``sep``, ``bos``, ``eos``, ``mask``, ``pad``, ``unk``) become ids when a model is at hand. Which
    positions they stand at is known only with the input; ``Scope.marks`` says.
    """

    tokens: tuple[int | str, ...]
    rank: ClassVar[int] = 7

    def __str__(self) -> str:
        return "global:" + "+".join(f"#{token}" if isinstance(token, int) else token for token in self.tokens)

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality; leading axes are those of the marks."""
        if scope.marks is None:
            return np.zeros(np.broadcast_shapes(query.shape, key.shape), dtype=bool)
        return np.asarray(scope.marks[..., query] | scope.marks[..., key], dtype=bool)


@dataclass(frozen=True)
class Sinks:
    """The first ``count`` keys are seen by all (StreamingLLM, Xiao et al., 2023)."""

    count: int
    rank: ClassVar[int] = 8

    def __str__(self) -> str:
        return f"sinks:{self.count}"

    def visible(self, query: Positions, key: Positions, scope: Scope) -> Visible:
        """True where ``key`` may be attended from ``query``, before causality."""
        return np.broadcast_to(key < self.count, np.broadcast_shapes(query.shape, key.shape))


Term = Dense | Local | Dilated | Block | Strided | Random | Global | GlobalTokens | Sinks
