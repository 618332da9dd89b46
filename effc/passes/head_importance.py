"""Which heads of a model need to see everything: DuoAttention's question (Xiao et al., 2024), answered by measuring.

DuoAttention finds its retrieval heads by training one gate per head on synthetic passages. Here every key/value head in
turn is made to stream (sinks and a window) while all others stay as they are, and what that changes in the output of
its transformer layer is the head's importance. That takes one forward pass and no training, works on any text, and
sees heads one by one: it does not know what several heads together would lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from effc.passes.assign_attention import merged_heads
from effc.passes.observed_attention import ObservedAttention
from effc.plugins.forms.base import AttentionForm
from effc.plugins.hook import ObservedLayer

Importance = dict[str, list[float]]
"""By layer, for each key/value head: mean over the tokens of ``||change|| / ||output||`` at the layer's output."""


def head_importance(
    observed: ObservedAttention,
    streaming: Mapping[str, AttentionForm],
    batches: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Any],
) -> Importance:
    """Measure every head of the layers in ``streaming``, all in one pass over the batches.

    Args:
        observed: the model's layers; every one computes what it does in the source model meanwhile.
        streaming: for each layer to measure, what one of its heads computes in its turn.
        batches: inputs; a two-dimensional ``attention_mask`` says which tokens count.
        run: runs the model on one batch.
    """
    sums = {name: [0.0] * layer.kv_heads for name, layer in _chosen(observed, streaming)}
    counts = dict.fromkeys(streaming, 0)
    mask: torch.Tensor | None = None
    inside = False

    def measure(layer: ObservedLayer) -> Callable[..., None]:
        def hook(block: torch.nn.Module, arguments: Any, named: Any, output: Any) -> None:
            nonlocal inside
            if inside:
                return
            inside = True
            try:
                reference = _hidden(output)
                for head in range(layer.kv_heads):
                    form = one_head(layer, head, streaming[layer.name])
                    with observed.using({layer.name: form}):
                        changed = _hidden(block(*arguments, **named))
                    ratio = _token_ratios(changed - reference, reference, mask)
                    sums[layer.name][head] += float(ratio.sum())
                counts[layer.name] += ratio.numel()
            finally:
                inside = False

        return hook

    handles = [
        enclosing_block(observed.model, layer).register_forward_hook(measure(layer), with_kwargs=True)
        for _, layer in _chosen(observed, streaming)
    ]
    try:
        with observed.using({}):
            for batch in batches:
                given = batch.get("attention_mask")
                mask = None if given is None else torch.as_tensor(given).bool()
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [total / max(1, counts[name]) for total in heads] for name, heads in sums.items()}


def choose_heads(importance: Importance, share: float) -> dict[str, list[int]]:
    """The most important key/value heads of all layers together, ``share`` of their number, by layer."""
    ranked = sorted(
        ((value, name, head) for name, values in importance.items() for head, value in enumerate(values)),
        key=lambda entry: -entry[0],
    )
    kept: dict[str, list[int]] = {name: [] for name in importance}
    for _, name, head in ranked[: round(share * len(ranked))]:
        kept[name].append(head)
    return {name: sorted(heads) for name, heads in kept.items()}


def split_heads(layer: ObservedLayer, kept: Sequence[int], streaming: AttentionForm) -> AttentionForm:
    """The layer's form where some key/value heads, with all queries of theirs, stay as they are and the rest stream."""
    groups = layer.num_heads // layer.kv_heads
    return merged_heads(
        (layer.visibility.pattern if head in kept else streaming, tuple(range(head * groups, (head + 1) * groups)))
        for head in range(layer.kv_heads)
    )


def one_head(layer: ObservedLayer, head: int, streaming: AttentionForm) -> AttentionForm:
    """The layer's form where one key/value head streams and all others stay as they are."""
    return split_heads(layer, [other for other in range(layer.kv_heads) if other != head], streaming)


def enclosing_block(model: torch.nn.Module, layer: ObservedLayer) -> torch.nn.Module:
    """The transformer layer that an attention module belongs to: the outermost member of a list of modules around it,
    or the module itself where there is none.
    """
    module: torch.nn.Module = model
    for part in layer.name.split("."):
        inside_list = isinstance(module, torch.nn.ModuleList)
        module = module.get_submodule(part)
        if inside_list:
            return module
    return layer.module


def _chosen(observed: ObservedAttention, names: Mapping[str, Any]) -> list[tuple[str, ObservedLayer]]:
    return [(layer.name, layer) for layer in observed.layers if layer.name in names]


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states among what a transformer layer returns, ``[batch, length, size]``."""
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor


def _token_ratios(change: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``||change|| / ||reference||`` of every real token. By token, because a few tokens of language models have
    hidden states hundreds of times larger than all others (Sun et al., 2024).
    """
    ratio: torch.Tensor = change.norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-12)
    return ratio[mask] if mask is not None and mask.shape == ratio.shape else ratio.flatten()
