"""Texts that are written at once, whatever runs the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Rows(ABC):
    """Texts in progress, numbered from 0; the last one takes the number of one that leaves.

    One thread works with them.

    Attributes:
        capacity: how many there may be.
        longest: tokens that a text may have in all; None if nothing but the model bounds it.
    """

    def __init__(self, capacity: int, longest: int | None = None):
        self.capacity, self.longest = capacity, longest

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def add(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run a prompt ``[length]`` and make it the last row; logits of what follows it, ``[vocabulary]``."""

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run the next token of every row; logits of what follows, ``[rows, vocabulary]``."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """Forget a row."""
