"""Export of the forward graph that a generating graph is made from: positions are an input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from effc.exporters.onnx_graph import export_onnx

_AXES = {0: "batch", 1: "sequence"}


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model must be told where in the text a token stands; without position, ALiBi models know anyway."""
    return "position_ids" in inspect.signature(model.forward).parameters


def export_for_generation(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> ir.Model:
    """Export one forward pass of a causal model, without caches, with transformers' own exporter.

    Args:
        model: in eval mode, its attention assigned by the rewrite pass.
        inputs: ``input_ids`` and ``attention_mask`` ``[batch, length]``, an example.

    Returns:
        The graph with the inputs ``input_ids``, ``attention_mask`` and, where the model takes it, ``position_ids``.

    Raises:
        PassFailedError: if torch cannot export the model.
    """
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if takes_positions(model):
        given["position_ids"] = positions_of(inputs["attention_mask"])
    return export_onnx(model, given, dict.fromkeys(given, _AXES))


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """``[batch, length]``: each token's place among the tokens that are no padding, as transformers counts it."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)
