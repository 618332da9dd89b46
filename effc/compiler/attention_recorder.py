"""Counts a model's attention weights while it runs, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.pattern import Pattern

if TYPE_CHECKING:
    import torch

    from effc.compiler.source import SourceModel
    from effc.plugins.hook import ObservedLayer

_IMPLEMENTATION = "effc-attention-mass"
# Weights that are alive at a time, in numbers.
_WEIGHTS = 1 << 22


@dataclass
class HeadSums:
    """Running sums of one module."""

    layer: ObservedLayer
    forms: Sequence[AttentionForm]
    longest: int
    queries: int = 0
    mass: NDArray[np.float64] = field(init=False)
    kept: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.mass = np.zeros((self.layer.num_heads, 2 * self.longest - 1))
        self.kept = np.zeros((len(self.forms), self.layer.num_heads))

    def add(self, weights: torch.Tensor, first: int, real: torch.Tensor, inputs: _Inputs) -> None:
        """Count rows ``first ...`` of ``weights [batch, heads, rows, keys]`` where ``real [batch, rows]``."""
        import torch

        weights = weights * real[:, None, :, None]
        self.queries += int(real.sum())
        rows, keys = weights.shape[2:]
        # Shifting each row by one more column lines up equal distances.
        summed = weights.sum(dim=0, keepdim=True)
        padded = torch.nn.functional.pad(summed[0].flip(-1), (0, rows))
        diagonals = padded.flatten(1)[:, : rows * (keys + rows - 1)].unflatten(1, (rows, -1))
        # Column c of the shifted rows is the distance c + first - (keys - 1).
        start = first - (keys - 1) + self.longest - 1
        self.mass[:, start : start + keys + rows - 1] += diagonals.sum(dim=1).double().numpy()
        for number, form in enumerate(self.forms):
            seen = inputs.seen(form, self.layer.visibility.causal, first, rows, keys)
            counted = weights if seen.shape[0] > 1 else summed
            self.kept[number] += (counted * seen).sum(dim=(0, 2, 3)).double().numpy()

    def result(self, names: Sequence[str]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Means over the queries: mass by distance, and by candidate what it keeps."""
        shares = self.kept / self.queries
        return self.mass / self.queries, dict(zip(names, shares, strict=True))


class _Inputs:
    """What the modules of one run need to know of its input."""

    def __init__(self, batch: Mapping[str, Any]):
        self.ids = np.asarray(batch["input_ids"])
        mask = batch.get("attention_mask")
        self.real = np.ones_like(self.ids, dtype=bool) if mask is None else np.asarray(mask).astype(bool)
        # Every layer asks for the same rows.
        self._seen: dict[Any, torch.Tensor] = {}

    def seen(self, form: AttentionForm, causal: bool, first: int, rows: int, keys: int) -> torch.Tensor:
        """``[batch or 1, heads or 1, rows, keys]``: how much of each pair a form keeps."""
        import torch

        key = (form, causal, first, rows)
        if key not in self._seen:
            self._seen[key] = torch.from_numpy(self._shares(form, causal, first, rows, keys))
        return self._seen[key]

    def _shares(self, form: AttentionForm, causal: bool, first: int, rows: int, keys: int) -> NDArray[Any]:
        if isinstance(form, HeadForms):
            heads = {head: number for number, (_, part) in enumerate(form.parts) for head in part}
            parts = [self._shares(part, causal, first, rows, keys) for part, _ in form.parts]
            return np.concatenate([parts[heads[head]] for head in range(form.heads)], axis=1)
        if isinstance(form, Pattern):
            query = np.arange(first, first + rows)[:, None]
            marks = np.isin(self.ids, form.tokens)[:, None, :] if form.tokens else None
            # Marks bring an axis of the batch, which positions then need, too.
            visible = (
                form.visible(query, np.arange(keys)[None, :], causal, keys)
                if marks is None
                else np.stack([form.visible(query, np.arange(keys)[None, :], causal, keys, row[0]) for row in marks])
            )
            return visible[:, None] if visible.ndim == 3 else visible[None, None]
        picture = form.picture(keys, causal)
        assert picture is not None
        return picture[None, None, first : first + rows].astype(np.float32)


_running: tuple[Mapping[Any, HeadSums], _Inputs] | None = None


@contextmanager
def recording(source: SourceModel, sums: Mapping[Any, HeadSums], batch: Mapping[str, Any]) -> Iterator[None]:
    """Let the model's modules count their attention in this run, and compute what they always did otherwise."""
    global _running
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    own = source.model.config._attn_implementation
    _running = sums, _Inputs(batch)
    source.model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        _running = None
        source.model.set_attn_implementation(own)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' eager function computes, some rows at a time; shapes as in :mod:`effc.plugins.hook`."""
    import torch

    assert _running is not None
    sums, inputs = _running
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, length, _ = query.shape
    step = max(1, _WEIGHTS // (batch * heads * key.shape[2]))
    real = torch.from_numpy(inputs.real)
    outputs = []
    for first in range(0, length, step):
        rows = slice(first, min(first + step, length))
        scores = query[:, :, rows] @ key.transpose(-1, -2) * scale
        if (softcap := kwargs.get("softcap")) is not None:
            scores = torch.tanh(scores / softcap) * softcap
        for bias in (kwargs.get("position_bias"), attention_mask):
            if bias is not None:
                scores = _biased(scores, bias, rows)
        weights = torch.softmax(scores, dim=-1)
        outputs.append(weights @ value)
        if module in sums and length == key.shape[2] == real.shape[1]:
            sums[module].add(weights, first, real[:, rows], inputs)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _biased(scores: torch.Tensor, bias: torch.Tensor, rows: slice) -> torch.Tensor:
    """Scores with the rows of a mask or bias that may have one row for all."""
    import torch

    part = bias[..., rows, : scores.shape[-1]] if bias.shape[-2] > 1 else bias[..., : scores.shape[-1]]
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, torch.finfo(scores.dtype).min)
    return scores + part
