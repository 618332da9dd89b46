"""What every attention form has in common: a text form, a cost and a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError


@dataclass(frozen=True)
class Cost:
    """What one head costs for one sequence.

    Attributes:
        flops: floating-point operations of the matrix products (two per multiply-add), feature maps included.
        scratch: elements of the largest intermediate that an O(length) lowering holds per head.
    """

    flops: int
    scratch: int


class AttentionForm(ABC):
    """One way to compute attention. Immutable and hashable; ``str(form)`` is its canonical text form.

    The torch definition is ``effc.plugins.reference.attend``, the ONNX function body ``effc.plugins.bodies.body_text``;
    both dispatch on the type.

    Attributes:
        op_type: the ONNX operator of domain ``effc`` that the form becomes.
        extra_inputs: names of the operator's inputs behind query, key, value and key_mask, in order; each is optional
            in the graph unless the form's definition says otherwise.
        learned: names of those extra inputs that are parameters of the layer.
        supports_causal: False if a form mixes positions in such a way that none can be hidden from earlier ones.
    """

    op_type: ClassVar[str]
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[tuple[str, ...]] = ()
    supports_causal: ClassVar[bool] = True

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def is_dense(self) -> bool:
        """True if the form is ordinary softmax attention over every key."""
        return False

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the form's parameters cover; None if any."""
        return None

    @property
    def needs_recovery(self) -> bool:
        """True if a model loses too much by this form alone, so that it must be trained afterwards."""
        return False

    @abstractmethod
    def cost(self, length: int, causal: bool, head_dim: int) -> Cost:
        """Cost of one head at ``length`` tokens."""

    def picture(self, length: int, causal: bool) -> NDArray[np.float64] | None:
        """``[length, length]`` between 0 (unseen) and 1 (exact softmax weight); None if content decides."""
        return None


def whole_number(text: str, value: str, syntax: str, minimum: int = 1) -> int:
    """Read one parameter of a text form.

    Raises:
        UsageError: if it is no whole number or below ``minimum``.
    """
    try:
        number = int(value)
    except ValueError:
        raise UsageError(f"'{value}' in '{text}' is not a whole number.", f"Write {syntax}.") from None
    if number < minimum:
        raise UsageError(f"'{value}' in '{text}' must be at least {minimum}.", f"Write {syntax}.")
    return number


def parameters(text: str, arguments: list[str], syntax: str, defaults: tuple[int, ...], minimum: int = 1) -> list[int]:
    """Read colon-separated whole numbers; those that are missing take their defaults.

    Raises:
        UsageError: if there are too many, or one is no number of at least ``minimum``.
    """
    if len(arguments) > len(defaults):
        raise UsageError(f"'{text}' has too many parameters.", f"Write {syntax}.")
    given = [whole_number(text, argument, syntax, minimum) for argument in arguments]
    return given + list(defaults[len(given) :])
