"""Different forms for different heads of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm, Cost


@dataclass(frozen=True)
class HeadForms(AttentionForm):
    """Each head computes one of ``parts``; written ``dense@0-2;local:256|sinks:4@3-8``.

    In a graph every part becomes an operator of its own over its heads.

    Raises:
        UsageError: if a head is given twice, or one below the highest is not given at all.
    """

    parts: tuple[tuple[AttentionForm, tuple[int, ...]], ...]
    op_type: ClassVar[str] = ""

    def __post_init__(self) -> None:
        heads = sorted(head for _, part in self.parts for head in part)
        if heads != list(range(len(heads))):
            raise UsageError(
                f"'{self}' does not give every head exactly one form.",
                "Write, for example, dense@0-2;local:256@3-11, each head of the layer once.",
            )

    def __str__(self) -> str:
        return ";".join(f"{form}@{_ranges(heads)}" for form, heads in self.parts)

    @property
    def heads(self) -> int:
        """How many heads the layer must have."""
        return sum(len(heads) for _, heads in self.parts)

    @property
    def is_dense(self) -> bool:
        """True if every head is dense."""
        return all(form.is_dense for form, _ in self.parts)

    @property
    def needs_recovery(self) -> bool:
        """True if some head's form does."""
        return any(form.needs_recovery for form, _ in self.parts)

    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """The mean over the heads; scratch is the largest."""
        costs = [(form.cost(length, causal, head_dim), len(heads)) for form, heads in self.parts]
        flops = sum(cost.flops * count for cost, count in costs) // self.heads
        return Cost(flops, max(cost.scratch for cost, _ in costs))

    def picture(self, length: int, causal: bool) -> NDArray[np.float64] | None:
        """The mean over the heads."""
        pictures = [(form.picture(length, causal), len(heads)) for form, heads in self.parts]
        total = np.zeros((length, length))
        for picture, count in pictures:
            if picture is None:
                return None
            total += picture * (count / self.heads)
        return total


def _ranges(numbers: tuple[int, ...]) -> str:
    """``0-2,5`` for (0, 1, 2, 5); joined by ``+`` because a comma parts layers."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return "+".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def parse_ranges(text: str, what: str) -> tuple[int, ...]:
    """Read ``0-2+5``.

    Raises:
        UsageError: if it is not of that shape.
    """
    numbers: list[int] = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        try:
            numbers.extend(range(int(first), int(last or first) + 1))
        except ValueError:
            raise UsageError(f"'{text}' is not a list of {what}.", "Write, for example, 0-2+5.") from None
    return tuple(numbers)
