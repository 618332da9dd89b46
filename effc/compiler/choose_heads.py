"""``duo``: which key/value heads stay dense and which stream, from how much each of them matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effc.compiler.manifest import AttentionSearch, LayerSensitivity
from effc.compiler.search_task import ROUNDING, SearchTask
from effc.compiler.verify import torch_runner
from effc.errors import DataError, PreconditionError
from effc.passes.assign_attention import within_own_window
from effc.passes.attention_settings import Duo
from effc.passes.head_importance import choose_heads, head_importance, split_heads
from effc.plugins.forms.base import AttentionForm
from effc.plugins.hook import ObservedLayer


def choose_streaming(task: SearchTask, layers: list[ObservedLayer], request: Duo) -> AttentionSearch:
    """Choose a form for each head of ``layers``.

    Raises:
        DataError: if the texts are too short to tell heads apart.
        PreconditionError: if every layer has a window of its own that is as narrow.
    """
    streaming: dict[str, AttentionForm] = {}
    for layer in layers:
        form = within_own_window(layer.visibility.pattern, request.streaming, layer.visibility.causal)
        if form != layer.visibility.pattern:
            streaming[layer.name] = form
    if not streaming:
        raise PreconditionError(
            f"Every layer has a window of its own that is at most as wide as '{request.streaming}'.",
            "Leave them as they are, or give a narrower window, for example duo:0.5:64.",
        )
    model = torch_runner(task.source)
    task.total = 2 * len(task.texts.batches)

    def run(batch: Mapping[str, Any]) -> None:
        model(batch)
        task.count()

    importance = head_importance(task.observed, streaming, task.texts.batches, run)
    if not any(value > ROUNDING for values in importance.values() for value in values):
        raise DataError(
            f"'{request.streaming}' changes nothing on these texts, whose longest has {task.texts.longest} tokens.",
            "Give longer texts, or a narrower window, for example duo:0.5:64.",
        )
    kept = choose_heads(importance, request.share)
    measured = [layer for layer in layers if layer.name in streaming]
    chosen = {layer.name: split_heads(layer, kept[layer.name], streaming[layer.name]) for layer in measured}
    heads = max(layer.kv_heads for layer in measured)
    rows = [
        LayerSensitivity(
            layer=layer.name,
            values=[*importance[layer.name], *([None] * (heads - layer.kv_heads))],
            chosen=str(chosen[layer.name]),
            kept=kept[layer.name],
        )
        for layer in measured
    ]
    return task.record([str(head) for head in range(heads)], rows, chosen)
