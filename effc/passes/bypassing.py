"""Finding attention that does not come through transformers' attention interface, so that no form can reach it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

BYPASSES = "does not use the attention interface"


@contextmanager
def attention_calls(model: torch.nn.Module) -> Iterator[set[str]]:
    """Names of the modules named like attention that ran and mixed tokens; a single query, as in pooling, is none."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(states, torch.Tensor) or states.ndim < 3 or states.shape[-2] > 1:
                called.add(name)

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name and type(module).__name__.endswith("Attention")
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def bypassing(model: torch.nn.Module, seen: Collection[str], called: Collection[str]) -> list[str]:
    """Those of the modules ``called`` that neither are, contain nor belong to one that was ``seen`` by the hook.

    Of nested ones the outermost is named.
    """

    def related(name: str, others: Collection[str]) -> bool:
        return any(s == name or s.startswith(f"{name}.") or name.startswith(f"{s}.") for s in others)

    found: list[str] = []
    for name, _ in model.named_modules():
        if name in called and not related(name, seen) and not related(name, found):
            found.append(name)
    return found
