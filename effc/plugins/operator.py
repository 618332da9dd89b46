"""The ``effc::SparseAttention`` operator: its name, attributes and how torch emits it.

Inputs: ``query [batch, query_length, num_heads * head_dim]``, ``key`` and ``value``
``[batch, key_length, kv_num_heads * head_dim]``, and optionally ``key_mask [batch, key_length]`` (bool, False hides a
key). Output: ``[batch, query_length, num_heads * head_dim]``. Attributes: ``pattern`` (text form), ``causal``,
``num_heads``, ``kv_num_heads``, ``scale``. The heads stay packed in the last axis, as the projections produce them, so
that the graph needs no transposes around the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effc.plugins.pattern import Pattern

DOMAIN = "effc"
OP_TYPE = "SparseAttention"
VERSION = 1
# Carries the module's name through torch's exporter, which names nodes itself; the exporter turns it into node.name.
LAYER_ATTRIBUTE = "layer"


@dataclass(frozen=True)
class AttentionGeometry:
    """The attributes of one attention layer, all static."""

    pattern: Pattern
    causal: bool
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float

    def overload(self, masked: bool) -> str:
        """Name of the function body that computes exactly this."""
        direction = "causal" if self.causal else "bidirectional"
        parts = [str(self.pattern), direction, f"h{self.num_heads}", f"kv{self.kv_heads}", f"d{self.head_dim}"]
        parts += [f"s{self.scale:.6g}", "masked" if masked else "unmasked"]
        return "_".join(parts).replace(":", "_").replace("|", "_or_").replace(".", "p").replace("-", "m")


def emit(
    geometry: AttentionGeometry,
    layer: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Put one operator node into the graph that torch is exporting.

    Args:
        query: ``[batch, heads, length, head_dim]``, ``key`` and ``value`` ``[batch, kv_heads, length, head_dim]``.
        key_mask: ``[batch, length]`` bool, or None.

    Returns:
        ``[batch, length, heads, head_dim]``, the layout that transformers expects from an attention function.
    """
    batch, heads, length, head_dim = query.shape
    inputs = [query.transpose(1, 2).reshape(batch, length, heads * head_dim)]
    for states in (key, value):
        inputs.append(states.transpose(1, 2).reshape(batch, states.shape[2], geometry.kv_heads * head_dim))
    if key_mask is not None:
        inputs.append(key_mask)
    packed = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OP_TYPE}",
        inputs,
        attrs={
            "pattern": str(geometry.pattern),
            "causal": int(geometry.causal),
            "num_heads": geometry.num_heads,
            "kv_num_heads": geometry.kv_heads,
            "scale": geometry.scale,
            LAYER_ATTRIBUTE: layer,
        },
        dtype=query.dtype,
        shape=inputs[0].shape,
        version=VERSION,
    )
    return packed.view(batch, length, heads, head_dim)
