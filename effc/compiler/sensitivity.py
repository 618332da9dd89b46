"""How much a model's output changes when some of its attention is replaced, measured on texts in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from effc.compiler.calibration_text import CalibrationText
from effc.compiler.inputs import token_mask
from effc.compiler.quality import ClassQuality, MaskedQuality, Quality, TokenClassQuality
from effc.compiler.source import SourceModel
from effc.compiler.verify import choose_quality, torch_runner
from effc.passes.head_importance import enclosing_block
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.base import AttentionForm

Variant = Mapping[str, AttentionForm]
"""The form of every module that is not as in the source model, by name."""
_COUNTED = (ClassQuality, TokenClassQuality, MaskedQuality)


@dataclass(frozen=True)
class Effect:
    """What one variant changes, over all real tokens.

    Attributes:
        attention_error: ``||change|| / ||output||`` at the output of the attention module; NaN where several changed.
        output_error: the same at the model's logits or last hidden state.
        cosine: mean cosine of those.
        drop: quality lost, see :mod:`effc.compiler.quality`.
        drop_name: what ``drop`` is, in words.
        counted: whether ``drop`` counts predictions, so that small changes do not show in it.
    """

    attention_error: float
    output_error: float
    cosine: float
    drop: float
    drop_name: str
    counted: bool

    @property
    def error(self) -> float:
        """What a budget bounds: the drop, and where that counts predictions at least 1 - cosine."""
        return max(self.drop, 1.0 - self.cosine) if self.counted else self.drop

    @property
    def error_name(self) -> str:
        """What :attr:`error` is, in words."""
        return f"{self.drop_name}, at least 1 - cosine of the logits" if self.counted else self.drop_name


def measure_effects(
    source: SourceModel,
    observed: ObservedAttention,
    variants: Sequence[Variant],
    texts: CalibrationText,
    progress: Callable[[], None] | None = None,
) -> list[Effect]:
    """The effect of each variant, alone, on the model's output.

    Layers in front of the first one that a variant changes are not run again for it.

    Args:
        progress: called after every run of a batch.
    """
    runs = [EffectSum(source, texts) for _ in variants]
    changed = [[layer for layer in observed.layers if layer.name in variant] for variant in variants]
    model = torch_runner(source)
    for batch in texts.batches:
        for run in runs:
            # Masks tokens for masked language models, the same ones in every run.
            prepared = run.quality.prepare(batch)
        mask = token_mask(prepared)
        with observed.using({}), _recorded_blocks(observed) as blocks, _attention_outputs(observed) as outputs:
            expected = model(prepared)
            expected_outputs = dict(outputs)
        predicts = source.task.name == "causal-lm" and texts.samples
        loss = next_token_loss(prepared, expected) if predicts else None
        for run, variant, layers in zip(runs, variants, changed, strict=True):
            with observed.using(variant), blocks.skipped(layers), _attention_outputs(observed, layers) as outputs:
                actual = model(prepared)
            if len(layers) == 1 and layers[0].name in outputs:
                name = layers[0].name
                run.attention.add(expected_outputs[name], outputs[name], mask)
            run.add(prepared, expected, actual, loss)
            if progress:
                progress()
    return [run.effect() for run in runs]


class _Ratio:
    """``||change|| / ||reference||`` and the mean cosine over any number of tensors, padding left out."""

    def __init__(self) -> None:
        self._change = self._size = self._cosine = 0.0
        self._vectors = 0

    def add(self, reference: torch.Tensor, actual: torch.Tensor, mask: Any | None) -> None:
        if mask is not None and tuple(reference.shape[:2]) == tuple(mask.shape):
            real = torch.as_tensor(mask).bool()
            reference, actual = reference[real], actual[real]
        reference, actual = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (reference, actual))
        self._change += float((actual - reference).square().sum(dtype=torch.float64))
        self._size += float(reference.square().sum(dtype=torch.float64))
        self._cosine += float(torch.nn.functional.cosine_similarity(reference, actual).sum(dtype=torch.float64))
        self._vectors += len(reference)

    @property
    def error(self) -> float:
        if not self._vectors:
            return math.nan
        value = math.sqrt(self._change / self._size) if self._size else 0.0
        return value if math.isfinite(value) else math.inf

    @property
    def cosine(self) -> float:
        value = self._cosine / self._vectors if self._vectors else 1.0
        return value if math.isfinite(value) else 0.0


class EffectSum:
    """What is summed up over the batches of one variant."""

    def __init__(self, source: SourceModel, texts: CalibrationText):
        self.quality: Quality = choose_quality(source, texts.samples or None, texts.max_length)
        self.attention, self.output = _Ratio(), _Ratio()
        self._loss = [0.0, 0.0]
        self._tokens = 0

    def add(
        self, batch: Mapping[str, Any], expected: Mapping[str, Any], actual: Mapping[str, Any], loss: Any | None
    ) -> None:
        name = next(name for name in ("logits", "last_hidden_state", "pooler_output") if name in expected)
        self.output.add(torch.from_numpy(expected[name]), torch.from_numpy(actual[name]), token_mask(batch))
        if loss is None:
            self.quality.update(batch, expected, actual)
        else:
            # Not by PerplexityQuality, which computes the source's loss in float64 again for every variant.
            total, tokens = next_token_loss(batch, actual)
            self._loss = [self._loss[0] + loss[0], self._loss[1] + total]
            self._tokens += tokens

    def effect(self) -> Effect:
        if self._tokens:
            difference = (self._loss[1] - self._loss[0]) / self._tokens
            drop, name = (math.expm1(difference) if difference < 700 else math.inf), "relative increase of perplexity"
            drop = drop if not math.isnan(drop) else math.inf
        else:
            score = self.quality.score()
            drop, name = score.drop, score.drop_name
        counted = isinstance(self.quality, _COUNTED)
        return Effect(self.attention.error, self.output.error, self.output.cosine, drop, name, counted)


def next_token_loss(batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[float, int]:
    """Cross-entropy in nats of the next tokens of a batch, summed, and the number of tokens."""
    mask = np.asarray(batch["attention_mask"]) != 0
    predicted = torch.from_numpy(mask[:, 1:] & mask[:, :-1])
    logits = torch.from_numpy(outputs["logits"])[:, :-1][predicted]
    targets = torch.from_numpy(np.asarray(batch["input_ids"]))[:, 1:][predicted]
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")), len(targets)


@contextmanager
def _attention_outputs(observed: ObservedAttention, layers: Sequence[Any] | None = None) -> Iterator[dict[str, Any]]:
    """What the attention modules return in a run, by name; the last call where one runs several times."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
            found[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    chosen = observed.layers if layers is None else layers
    handles = [layer.module.register_forward_hook(keep(layer.name)) for layer in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Blocks:
    """What every transformer layer returned in one run, so that it need not run again on the same input."""

    def __init__(self, blocks: list[torch.nn.Module]):
        self._order = blocks
        self.outputs: dict[torch.nn.Module, Any] = {}
        self.calls = 0

    @contextmanager
    def skipped(self, changed: Sequence[Any]) -> Iterator[None]:
        """Within the block, layers in front of the first changed one return what they did in the recorded run."""
        first = next((i for i, block in enumerate(self._order) if _holds(block, changed)), 0)
        # A layer that runs several times (ALBERT) has other inputs each time.
        before = self._order[:first] if self.calls == len(self._order) else []
        for block in before:
            block.forward = _always(self.outputs[block])
        try:
            yield
        finally:
            for block in before:
                del block.forward


@contextmanager
def _recorded_blocks(observed: ObservedAttention) -> Iterator[_Blocks]:
    blocks = list(dict.fromkeys(enclosing_block(observed.model, layer) for layer in observed.layers))
    record = _Blocks(blocks)

    def keep(block: torch.nn.Module, _: Any, output: Any) -> None:
        record.outputs[block] = output
        record.calls += 1

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _holds(block: torch.nn.Module, layers: Sequence[Any]) -> bool:
    inside = set(block.modules())
    return any(layer.module in inside for layer in layers)


def _always(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output
