"""Finding the tables of absolute positions in a model, and changing them together with all that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Buffers that some models slice to the length of the input, ``[1, positions]``.
_POSITION_IDS, _SEGMENT_IDS = "position_ids", "token_type_ids"


@dataclass(frozen=True)
class PositionTable:
    """One learned table of absolute positions.

    Attributes:
        name: of the module.
        module: its ``weight`` is ``[offset + positions, size]``.
        offset: rows before that of position 0: padding and its like (RoBERTa, OPT, BART).
    """

    name: str
    module: nn.Embedding
    offset: int

    @property
    def positions(self) -> int:
        """How many positions it has rows for."""
        return self.module.num_embeddings - self.offset

    def replace(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put ``rows(those of the positions)`` in place of the positions' rows."""
        with torch.no_grad():
            weight = self.module.weight
            changed = torch.cat((weight[: self.offset], rows(weight[self.offset :]))).contiguous()
        self.module.weight = nn.Parameter(changed, requires_grad=weight.requires_grad)
        self.module.num_embeddings = len(changed)


def position_tables(model: PreTrainedModel) -> list[PositionTable]:
    """The learned tables of absolute positions of a model that reads text, each once."""
    return [PositionTable(name, module, _offset(module)) for name, module in _embeddings(model)]


def is_sinusoidal(module: nn.Module) -> bool:
    """Whether a module computes positions by a fixed formula rather than from a learned table."""
    return "Sinusoidal" in type(module).__name__


def resize_buffers(model: PreTrainedModel, old: int, new: int) -> list[str]:
    """Bring the buffers that models slice for positions and segments to a new length; returns their names."""
    changed = []
    for name, module in model.named_modules():
        for kind in (_POSITION_IDS, _SEGMENT_IDS):
            buffer = module._buffers.get(kind)
            if buffer is None or buffer.ndim != 2 or buffer.shape[1] < old:
                continue
            length = new + buffer.shape[1] - old
            longer = torch.arange(length, dtype=buffer.dtype)[None] if kind == _POSITION_IDS else buffer[:, :1]
            setattr(module, kind, longer.expand(1, length).contiguous())
            changed.append(f"{name}.{kind}")
    return changed


def _embeddings(model: PreTrainedModel) -> Iterator[tuple[str, nn.Embedding]]:
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("pos" in last or last == "wpe") or is_sinusoidal(module):
            continue
        if limit in (module.num_embeddings, module.num_embeddings - _offset(module)):
            yield name, module


def _offset(module: Any) -> int:
    offset = getattr(module, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if module.padding_idx is None else int(module.padding_idx) + 1
