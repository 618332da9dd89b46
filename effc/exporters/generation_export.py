"""The forward graph that a generating graph is made from: positions as an input, logits of the last token only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from effc.exporters.generation_graph import KEPT_LOGITS
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
        The graph with the inputs ``input_ids``, ``attention_mask``, ``position_ids`` (where the model takes it) and
        ``logits_to_keep`` (likewise), for :func:`effc.exporters.generation_graph.add_caches`.

    Raises:
        PassFailedError: if torch cannot export the model.
    """
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if takes_positions(model):
        given["position_ids"] = positions_of(inputs["attention_mask"])
    axes = {name: _AXES for name in given}
    if KEPT_LOGITS in inspect.signature(model.forward).parameters:
        given[KEPT_LOGITS] = torch.tensor([inputs["input_ids"].shape[1] - 1])
    return export_onnx(model, given, axes)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """``[batch, length]``: each token's place among the tokens that are no padding, as transformers counts it."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)
