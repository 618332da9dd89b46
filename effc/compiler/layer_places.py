"""Which module of a torch model computes what a layer of its graph does, found by running both on the same inputs.

Names do not tell: packed projections lose them, and a shared module has one name for many calls. Outputs do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Relative deviation of two computations of the same in fp32, after any number of layers.
_SAME = 1e-2
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Place:
    """Where torch computes the output of a layer of the graph.

    Attributes:
        module: the name of a module without children.
        call: which of its calls in one run.
        start: the first of its output columns that is the layer's.
        factor: what the graph's output is multiplied with in torch ``[width]``; not 1 where smoothing has divided it.
    """

    module: str
    call: int
    start: int
    factor: torch.Tensor


def find_places(
    model: torch.nn.Module, run: Callable[[], Any], layers: Iterable[tuple[str, torch.Tensor]]
) -> list[Place | None]:
    """The place of each layer, None where no module computes it.

    Args:
        run: runs the model, on inputs of many rows.
        layers: name and output ``[..., width]`` of each layer of the graph, on the same inputs. The outputs may differ
            by a bias and a factor for each column.
    """
    with called_leaves(model) as calls, torch.no_grad():
        run()
    rows = {key: _centred(output) for key, output in calls.items() if output.is_floating_point() and output.ndim > 1}
    order, found = list(rows), list[Place | None]()
    for name, output in layers:
        # The module of that name first, then the others from the last one found on: graph and calls go the same way.
        own = [key for key in order if key[0] == name]
        found.append(_place(_centred(output), rows, [*own, *order]))
        if (place := found[-1]) is not None:
            last = order.index((place.module, place.call))
            order = order[last:] + order[:last]
    return found


@contextmanager
def called_leaves(model: torch.nn.Module) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """The outputs of all modules without children, by name and number of the call, in the order of the calls."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    counts: dict[str, int] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name, counts.get(name, 0)] = output.detach()
            counts[name] = counts.get(name, 0) + 1

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not next(module.children(), None)]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _centred(output: torch.Tensor) -> torch.Tensor:
    rows = output.reshape(-1, output.shape[-1]).float()
    return rows - rows.mean(dim=0)


def _place(
    output: torch.Tensor, rows: Mapping[tuple[str, int], torch.Tensor], order: Iterable[tuple[str, int]]
) -> Place | None:
    """The first place in an order that computes ``output``."""
    if len(output) < _LEAST_ROWS:
        return None
    for key in order:
        found = rows[key]
        if len(found) != len(output) or found.shape[1] < output.shape[1]:
            continue
        start = _first_column(found, output)
        part = found[:, start : start + output.shape[1]]
        if part.shape != output.shape:
            continue
        factor = (part * output).sum(dim=0) / output.square().sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        if torch.linalg.norm(part - factor * output) <= _SAME * torch.linalg.norm(part):
            return Place(*key, start, factor)
    return None


def _first_column(found: torch.Tensor, output: torch.Tensor) -> int:
    """The column that goes most with the first one of ``output`` that varies."""
    index = int(output.norm(dim=0).gt(0).int().argmax())
    likeness = (found * output[:, index : index + 1]).sum(dim=0).abs() / found.norm(dim=0).clamp_min(1e-30)
    return max(0, int(likeness.argmax()) - index)
