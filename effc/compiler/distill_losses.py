"""What a student is judged by: losses between what it and its teacher computed on the same batch.

A loss is any function ``loss(student, teacher, batch) -> tensor`` on two :class:`Seen` and the batch that both read. It
returns one number to minimise, as a tensor that gradients flow through. An attribute ``needs``, a collection of
``"hidden_states"`` and ``"attention"``, tells what it reads besides the outputs; a function without it gets both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from effc.errors import PreconditionError, UsageError
from effc.passes.distill_settings import LOSSES, split_loss

HIDDEN, ATTENTION = "hidden_states", "attention"
_DEFAULTS = {
    "feature-extraction": ("embedding", "hidden"),
    "causal-lm": ("logits", "hidden"),
    "masked-lm": ("logits", "hidden"),
}


@dataclass(frozen=True)
class Seen:
    """What one model computed on a batch.

    Attributes:
        outputs: the model's outputs by name, such as ``logits`` or ``last_hidden_state [batch, length, width]``.
        hidden_states: ``[batch, length, width]``, the embeddings and what each layer returned; empty unless needed.
        attention: what each attention module returned, ``[batch, length, width]``, by the module's name; empty unless
            needed.
        mask: ``[batch, length]`` bool, False for padding; None where there is none.
    """

    outputs: Mapping[str, torch.Tensor]
    hidden_states: Sequence[torch.Tensor]
    attention: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None


Loss = Callable[[Seen, Seen, Mapping[str, torch.Tensor]], torch.Tensor]
LossChoice = str | Loss | tuple[Loss, float]


@dataclass(frozen=True)
class Term:
    """One summand of the training loss."""

    name: str
    weight: float
    loss: Loss

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides the outputs."""
        needs: Collection[str] = getattr(self.loss, "needs", (HIDDEN, ATTENTION))
        return frozenset(needs)


def terms_of(choices: Sequence[LossChoice], task: str | None, temperature: float) -> list[Term]:
    """The summands that are asked for, or those that suit the task.

    Raises:
        UsageError: if one is neither a known name nor callable.
    """
    if not choices:
        choices = _DEFAULTS.get(task or "", ("logits", "hidden"))
    terms = []
    for choice in choices:
        if isinstance(choice, str):
            try:
                name, weight = split_loss(choice)
            except ValueError as error:
                raise UsageError(f"{error}.", "Or give a function of your own, see docs/distillation.md.") from None
            terms.append(Term(name, weight, _BUILT_IN[name](temperature)))
            continue
        loss, weight = choice if isinstance(choice, tuple) else (choice, 1.0)
        if not callable(loss):
            raise UsageError(
                f"{loss!r} is no loss.", f"Give one of {', '.join(LOSSES)} or a function (student, teacher, batch)."
            )
        name = getattr(loss, "__name__", type(loss).__name__)
        terms.append(Term(name, float(weight), loss))
    return terms


class LogitsLoss:
    """``T^2 KL(teacher || student)`` of the predictions at temperature T, mean over tokens (Hinton et al., 2015)."""

    needs: frozenset[str] = frozenset()

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, student: Seen, teacher: Seen, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own, wanted = (_output(seen, "logits").float() / self.temperature for seen in (student, teacher))
        own, wanted = _same_shape(own, wanted, "logits")
        own, wanted = _real(own, teacher.mask), _real(wanted, teacher.mask)
        loss = functional.kl_div(
            functional.log_softmax(own, -1), functional.log_softmax(wanted, -1), reduction="none", log_target=True
        )
        return loss.sum(dim=-1).mean() * self.temperature**2


class HiddenLoss:
    """Error of the hidden states, ``|student - teacher|^2 / |teacher|^2``, mean over layers (FitNets, TinyBERT).

    A student with fewer layers is compared with the teacher's layers at the same relative depth.
    """

    needs = frozenset({HIDDEN})

    def __init__(self, cosine: bool = False):
        self.cosine = cosine

    def __call__(self, student: Seen, teacher: Seen, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pairs = list(_layer_pairs(student.hidden_states, teacher.hidden_states))
        losses = [self._one(own, wanted, teacher.mask) for own, wanted in pairs]
        return torch.stack(losses).mean()

    def _one(self, own: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        own, wanted = _same_shape(own.float(), wanted.float(), "hidden")
        own, wanted = _real(own, mask), _real(wanted, mask)
        if self.cosine:
            return 1 - functional.cosine_similarity(own, wanted, dim=-1).mean()
        return relative_error(own, wanted)


class AttentionLoss:
    """Error of what the attention modules return, ``|student - teacher|^2 / |teacher|^2``, mean over modules.

    Modules are paired by name; those that only one of the models has are left out.
    """

    needs = frozenset({ATTENTION})

    def __call__(self, student: Seen, teacher: Seen, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        names = [name for name in student.attention if name in teacher.attention]
        if not names:
            raise PreconditionError(
                "Student and teacher have no attention module of the same name.", "Leave the loss 'attention' out."
            )
        losses = []
        for name in names:
            own, wanted = _same_shape(student.attention[name].float(), teacher.attention[name].float(), "attention")
            losses.append(relative_error(_real(own, teacher.mask), _real(wanted, teacher.mask)))
        return torch.stack(losses).mean()


class EmbeddingLoss:
    """1 - cosine of the mean-pooled embeddings, what sentence encoders are used for."""

    needs: frozenset[str] = frozenset()

    def __call__(self, student: Seen, teacher: Seen, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own, wanted = (_output(seen, "last_hidden_state").float() for seen in (student, teacher))
        own, wanted = _same_shape(own, wanted, "embedding")
        own, wanted = pooled_mean(own, teacher.mask), pooled_mean(wanted, teacher.mask)
        return 1 - functional.cosine_similarity(own, wanted, dim=-1).mean()


class LabelsLoss:
    """Cross-entropy to the data itself: its ``labels`` for classifiers, the next token for causal language models."""

    needs: frozenset[str] = frozenset()

    def __call__(self, student: Seen, teacher: Seen, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = _output(student, "logits").float()
        labels = batch.get("labels")
        if labels is None:
            if logits.ndim != 3 or "input_ids" not in batch:
                raise PreconditionError("The data has no labels.", "Leave the loss 'labels' out, or label the data.")
            labels = batch["input_ids"]
            if student.mask is not None:
                labels = labels.masked_fill(~student.mask, -100)
            logits, labels = logits[:, :-1], labels[:, 1:]
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


_BUILT_IN: dict[str, Callable[[float], Loss]] = {
    "logits": LogitsLoss,
    "hidden": lambda _: HiddenLoss(),
    "hidden-cosine": lambda _: HiddenLoss(cosine=True),
    "attention": lambda _: AttentionLoss(),
    "embedding": lambda _: EmbeddingLoss(),
    "labels": lambda _: LabelsLoss(),
}


def relative_error(own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``|own - wanted|^2 / |wanted|^2`` over all elements, so that layers of different size weigh alike."""
    return (own - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


def pooled_mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of ``[batch, length, width]`` over real tokens."""
    if mask is None:
        return hidden.flatten(1, -2).mean(dim=1)
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def _output(seen: Seen, name: str) -> torch.Tensor:
    value = seen.outputs.get(name)
    if value is None:
        raise PreconditionError(
            f"The model has no output '{name}'; it has {', '.join(seen.outputs) or 'none'}.",
            "Choose losses that suit its task, for example hidden.",
        )
    return value


def _same_shape(own: torch.Tensor, wanted: torch.Tensor, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    if own.shape != wanted.shape:
        raise PreconditionError(
            f"The loss '{loss}' compares {tuple(own.shape)} of the student with {tuple(wanted.shape)} of the teacher.",
            "Student and teacher need the same width (for logits: vocabulary or classes); choose another loss.",
        )
    return own, wanted


def _real(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Vectors of real tokens, ``[tokens, width]``."""
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask]
    return values.flatten(0, -2)


def _layer_pairs(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer of the student with the teacher's at the same relative depth; embeddings left out."""
    own, wanted = len(student) - 1, len(teacher) - 1
    if own < 1 or wanted < 1:
        raise PreconditionError("The model does not return hidden states.", "Choose losses that need none.")
    return [(student[i], teacher[max(1, round(i * wanted / own))]) for i in range(1, own + 1)]
