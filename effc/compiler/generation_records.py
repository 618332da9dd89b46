"""What ``effc.json`` says of a generating graph, read without pydantic, which a server does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class CacheGroup:
    """See ``CacheGroupRecord`` of the manifest."""

    pattern: str
    kind: str
    sinks: int
    recent: int | None
    queries: int
    state: Mapping[str, list[int]]
    initial: Mapping[str, float]
    distance: bool


@dataclass(frozen=True)
class CachedLayer:
    """See ``CachedLayerRecord`` of the manifest."""

    layer: str
    group: int
    num_heads: int
    kv_heads: int
    head_dim: int
    kept_in: str = "fp32"


@dataclass(frozen=True)
class Generation:
    """See ``GenerationRecord`` of the manifest."""

    file: str
    groups: list[CacheGroup]
    layers: list[CachedLayer]
    positions: bool
    eos_token_ids: list[int]
    pad_token_id: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Generation:
        """From the record's JSON."""
        return cls(
            **_known(cls, values)
            | {
                "groups": [CacheGroup(**_known(CacheGroup, entry)) for entry in values["groups"]],
                "layers": [CachedLayer(**_known(CachedLayer, entry)) for entry in values["layers"]],
            }
        )


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}
