"""The operator's inputs as the parts of a body use them: batches laid end to end, heads apart."""

from __future__ import annotations

from dataclasses import dataclass

from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.operator import KEY_MASK, AttentionGeometry

INPUTS = ("query", "key", "value", "key_mask", "marks", "distance_bias", "distance_slope")


@dataclass(frozen=True)
class Inputs:
    """Values of the outermost graph.

    Attributes:
        batch, queries, keys: sizes, scalars.
        offset: position of the first query, ``keys - queries``.
        query_rows: ``[batch * queries, heads, head_dim]``; ``key_rows`` and ``value_rows``
            ``[batch * keys, kv_heads, head_dim]``.
        mask_rows: ``[batch * keys]`` bool, or None where nothing is padded; ``mark_rows`` likewise.
        bias, slope: names of the distance inputs, or None.
    """

    geometry: AttentionGeometry
    batch: Value
    queries: Value
    keys: Value
    offset: Value
    query_rows: Value
    key_rows: Value
    value_rows: Value
    mask_rows: Value | None
    mark_rows: Value | None
    bias: Value | None
    slope: Value | None

    @property
    def has_bias(self) -> bool:
        """Whether scores depend on the distance."""
        return self.bias is not None or self.slope is not None


def read_inputs(s: Statements, geometry: AttentionGeometry, given: frozenset[str]) -> Inputs:
    """Split the inputs, without copying them."""
    queries, keys = s.size("query", 1, to="query_length"), s.size("key", 1, to="key_length")
    heads, kv_heads, dim = geometry.num_heads, geometry.kv_heads, geometry.head_dim
    return Inputs(
        geometry,
        s.size("query", 0, to="batch"),
        queries,
        keys,
        s("Sub", keys, queries, to="offset"),
        s.reshape("query", -1, heads, dim, to="query_rows"),
        s.reshape("key", -1, kv_heads, dim, to="key_rows"),
        s.reshape("value", -1, kv_heads, dim, to="value_rows"),
        s.reshape("key_mask", -1, to="mask_rows") if KEY_MASK in given else None,
        s.reshape("marks", -1, to="mark_rows") if "marks" in given else None,
        "distance_bias" if "distance_bias" in given else None,
        "distance_slope" if "distance_slope" in given else None,
    )
