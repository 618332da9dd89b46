"""What ``effc.json`` says of engines, as far as running them needs it, read without pydantic, which a server lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

Profiles = Sequence[Mapping[str, Sequence[Sequence[int]]]]
"""For each optimization profile, smallest, best and largest shape of every input."""


class BuiltEngine(Protocol):
    """One engine; see ``EngineRecord`` of the manifest."""

    @property
    def file(self) -> str: ...
    @property
    def graph(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def profiles(self) -> Profiles: ...


class BuiltEngines(Protocol):
    """Engines that were built together; see ``EnginesRecord`` of the manifest."""

    @property
    def flavour(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def version_compatible(self) -> bool: ...
    @property
    def plugin(self) -> str | None: ...
    @property
    def plugin_embedded(self) -> bool: ...
    @property
    def tensor_parallel(self) -> int: ...
    @property
    def engines(self) -> Sequence[BuiltEngine]: ...


@dataclass(frozen=True)
class Engine:
    """See :class:`BuiltEngine`."""

    file: str
    graph: str
    arch: str
    profiles: Profiles


@dataclass(frozen=True)
class Engines:
    """See :class:`BuiltEngines`.

    Attributes:
        pads: texts of different lengths may share a run of the decode engine, padded in front.
    """

    flavour: str
    version: str
    version_compatible: bool
    plugin: str | None
    plugin_embedded: bool
    engines: Sequence[Engine]
    pads: bool
    tensor_parallel: int = 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Engines:
        """The inverse of :meth:`to_json`."""
        return cls(**{**values, "engines": [Engine(**entry) for entry in values["engines"]]})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "engines": [vars(engine) for engine in self.engines]}


def longest_text(engine: BuiltEngine) -> int:
    """Tokens of the longest text that a prefill or decode engine takes."""
    return max(profile["attention_mask"][2][1] for profile in engine.profiles)


def most_rows(engine: BuiltEngine, length: int) -> int:
    """Most texts of this length that one run of a prefill or decode engine takes; 0 if it takes none so long."""
    shapes = [profile["attention_mask"][2] for profile in engine.profiles]
    return max((rows for rows, longest in shapes if longest >= length), default=0)
