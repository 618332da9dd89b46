"""Small models of several families to prune, and what they compute."""

from __future__ import annotations

import torch
from family_configs import FAMILIES
from transformers import PreTrainedModel

from effc.passes.prune_calibration import Calibration

LENGTHS = (20, 9, 3)


def fresh(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A family's model and a ragged batch for it."""
    model = FAMILIES[name].model().requires_grad_(False)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model, FAMILIES[name].inputs(LENGTHS)


def calibration(name: str, model: PreTrainedModel, batches: int = 3) -> Calibration:
    """Other inputs than those of :func:`fresh`."""
    return Calibration(model, [FAMILIES[name].inputs((24, 17), seed=seed) for seed in range(1, batches + 1)], "texts")


def output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The main output at real tokens."""
    with torch.no_grad():
        found = model(**inputs)
    value = found["logits"] if found.get("logits") is not None else found["last_hidden_state"]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return value if mask is None else value[mask.bool()]


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Relative, to ``first``."""
    return float((second - first).norm() / first.norm())
