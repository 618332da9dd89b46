"""What a compiled model gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Outputs(Mapping[str, Any]):
    """A model's outputs by name, attribute or position: ``out["logits"]``, ``out.logits``, ``out[0]``.

    Iterates over names, as the output classes of transformers do; :meth:`to_tuple` gives the values.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._values[key]
        return self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        # Looked up in __dict__: copying asks for attributes before __init__ has run.
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"There is no output '{name}'; there are: {', '.join(values)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={type(value).__name__}{list(value.shape)}" for name, value in self._values.items())
        return f"Outputs({shapes})"

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in the order of the model's outputs."""
        return tuple(self._values.values())
