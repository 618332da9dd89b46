"""What texts say about the inputs of linear layers: their second moments, and what the output owes to each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from effc.errors import DataError, PreconditionError

# Of the outputs that a model may have, the first that is there is what a change is judged by.
OUTPUTS = ("logits", "last_hidden_state", "pooler_output")
# Second moments that are held at a time; larger models are measured in several runs.
_MOMENT_BYTES = 1 << 30
_STAGES = 6


@dataclass
class InputStatistics:
    """Moments of a linear layer's input over all real tokens.

    Attributes:
        moments: ``X^T X``, ``[in, in]``, float64.
        total: sum over the tokens, ``[in]``, float64.
        tokens: how many.
    """

    moments: torch.Tensor
    total: torch.Tensor
    tokens: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add ``[tokens, in]``."""
        self.moments += (rows.T @ rows).double()
        self.total += rows.sum(0).double()
        self.tokens += len(rows)

    @property
    def norms(self) -> torch.Tensor:
        """Root mean square of every input, ``[in]``."""
        return (self.moments.diagonal() / max(1, self.tokens)).sqrt()

    @property
    def mean(self) -> torch.Tensor:
        """Mean of every input, ``[in]``."""
        return self.total / max(1, self.tokens)


@dataclass
class Calibration:
    """Batches to measure on, and the model that they are for.

    Attributes:
        model: what is measured as it is at the moment of the measurement.
        batches: inputs by name, ``[batch, length]`` for texts.
        data: where they come from.
        progress: told what is measured, or None.
    """

    model: PreTrainedModel
    batches: Sequence[Mapping[str, Any]]
    data: str
    progress: Callable[[str], None] | None = None
    _extra: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.batches = [{name: torch.as_tensor(value) for name, value in batch.items()} for batch in self.batches]
        takes_cache = "use_cache" in inspect.signature(self.model.forward).parameters
        self._extra = {"use_cache": False} if takes_cache else {}

    @property
    def tokens(self) -> int:
        """Real tokens of all batches; 0 where the inputs are no texts."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches if "attention_mask" in batch)

    def stages(self, names: Iterable[str], apart: int = _STAGES) -> Iterator[dict[str, InputStatistics]]:
        """The inputs of linear layers in groups, in the order of ``names``. Each group is measured when it is asked
        for, so that it sees what was changed before it.
        """
        pending = list(names)
        size = max(1, -(-len(pending) // apart))
        while pending:
            count, held = 0, 0
            for name in pending[:size]:
                held += 8 * _inputs_of(self.model.get_submodule(name)) ** 2
                if count and held > _MOMENT_BYTES:
                    break
                count += 1
            yield self.statistics(pending[:count])
            pending = pending[count:]

    def statistics(self, names: Iterable[str]) -> dict[str, InputStatistics]:
        """Moments of the inputs of linear layers. Layers that read the same tensor share them.

        Raises:
            DataError: if a layer never ran.
        """
        found: dict[str, InputStatistics] = {}
        seen: dict[str, Any] = {"tensor": None, "name": None, "mask": None}

        def hook_of(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
                value = arguments[0]
                if value is seen["tensor"]:
                    found[name] = found[seen["name"]]
                    return
                seen["tensor"], seen["name"] = value, name
                if name not in found:
                    size = value.shape[-1]
                    empty = torch.zeros(size, size, dtype=torch.float64)
                    found[name] = InputStatistics(empty, torch.zeros(size, dtype=torch.float64))
                found[name].add(real_rows(value, seen["mask"]))

            return hook

        with _hooked(self.model, {name: hook_of(name) for name in names}), torch.no_grad():
            for batch in self._told("activations"):
                seen["tensor"], seen["mask"] = None, token_masks(batch)
                self.model(**batch, **self._extra)
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"'{missing[0]}' does not run on the calibration data, so nothing is known of its inputs.",
                "Leave it out with exclude.",
            )
        return found

    def owed(self, readers: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
        """How much the model's output owes to groups of inputs of linear layers.

        Removing a group changes the output, to first order, by the gradient times the inputs of the group (Molchanov
        et al., 2017). That is summed up as the change of the predicted distribution (Fisher information) where the
        output is logits, and as the squared change of the hidden states where it is those; estimated with one backward
        pass per batch from random directions.

        Args:
            readers: for each layer, how many neighbouring inputs form a group.

        Returns:
            by layer, one value per group, comparable between layers.
        """
        generator = torch.Generator().manual_seed(seed)
        owed: dict[str, torch.Tensor] = {}
        current: dict[str, Any] = {}

        def hook_of(name: str, width: int) -> Callable[..., Any]:
            def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> Any:
                value = arguments[0]
                value = value if value.requires_grad else value.detach().requires_grad_(True)

                def take(gradient: torch.Tensor) -> None:
                    product = real_rows(value.detach() * gradient, current["mask"])
                    per_group = product.unflatten(-1, (-1, width)).sum(-1).double().square().sum(0)
                    owed[name] = owed.get(name, torch.zeros_like(per_group)) + per_group

                value.register_hook(take)
                return (value, *arguments[1:])

            return hook

        hooks = {name: hook_of(name, width) for name, width in readers.items()}
        with _hooked(self.model, hooks), torch.enable_grad():
            for batch in self._told("gradients"):
                current["mask"] = token_masks(batch)
                outputs = self.model(**batch, **self._extra)
                name = next(name for name in OUTPUTS if outputs.get(name) is not None)
                output_direction(name, outputs[name], current["mask"], generator).backward()
        missing = [name for name in readers if name not in owed]
        if missing:
            raise DataError(f"The model's output does not depend on '{missing[0]}'.", "Leave it out with exclude.")
        return owed

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """What the model makes of a batch."""
        with torch.no_grad():
            return self.model(**batch, **self._extra)

    def _told(self, what: str) -> Iterator[Mapping[str, Any]]:
        for number, batch in enumerate(self.batches, 1):
            if self.progress:
                self.progress(f"{what}, batch {number} of {len(self.batches)}")
            yield batch


def check_texts(calibration: Calibration | None, what: str, otherwise: str) -> None:
    """Refuse to measure where there is nothing to measure on.

    Args:
        what: is measured, as the beginning of a sentence.
        otherwise: a criterion that needs no texts.

    Raises:
        PreconditionError: saying what needs texts.
    """
    if calibration is None:
        raise PreconditionError(
            f"{what} is measured on text, and none is given.",
            f"Give some with --calibration or --data, or use the criterion {otherwise}.",
        )


def real_rows(value: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[batch, length, size]`` as ``[tokens, size]`` without padding."""
    for mask in masks:
        if value.ndim == 3 and value.shape[:2] == mask.shape:
            return value[mask]
    return value.reshape(-1, value.shape[-1])


def token_masks(batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    names = ("attention_mask", "decoder_attention_mask")
    return [batch[name].bool() for name in names if name in batch and batch[name].ndim == 2]


def output_direction(
    name: str, output: torch.Tensor, masks: Sequence[torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """A scalar whose gradient is a random direction of the output, in the metric that fits it.

    The square of what a small change of the output changes in it is in expectation, summed over the rows: twice the
    Kullback-Leibler divergence for logits of several classes (their Fisher information), the squared relative change
    for anything else.
    """
    rows = real_rows(output, masks)
    if name == "logits" and rows.shape[-1] > 1:
        chances = rows.detach().softmax(-1)
        targets = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(rows, targets, reduction="sum")
    scale = rows.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    direction: torch.Tensor = (rows / scale * torch.randn(rows.shape, generator=generator)).sum()
    return direction


def _inputs_of(module: torch.nn.Module) -> int:
    from effc.passes.prune_structure import linear_sizes

    sizes = linear_sizes(module)
    return 0 if sizes is None else sizes[0]


@contextmanager
def _hooked(model: torch.nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
