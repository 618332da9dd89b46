"""One batch of training: both models run on it, and what the student is judged by comes out.

The models are modules of transformers in evaluation mode throughout: dropout would only add noise to what the student
has to match, and the teacher has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from effc.compiler.distill_losses import ATTENTION, HIDDEN, Seen, Term, relative_error

Modules = Mapping[str, nn.Module]
# Probabilities of dropout that layers hold as plain numbers.
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "resid_dropout")


class Vocabulary:
    """How a teacher's tokens relate to those of a student whose vocabulary was pruned.

    Args:
        kept: the teacher's ids of the student's tokens, in the order of the student's ids; None where they are equal.
    """

    def __init__(self, kept: Sequence[int] | None = None):
        self._kept = None if kept is None else torch.tensor(list(kept))

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The student's inputs in the teacher's ids; labels left out."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        if self._kept is None:
            return given
        kept = self._kept = self._kept.to(next(iter(given.values())).device)
        return {name: kept[value] if name.endswith("input_ids") else value for name, value in given.items()}

    def outputs(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's outputs, with logits of the student's tokens alone."""
        result = dict(outputs)
        logits = result.get("logits")
        if self._kept is not None and logits is not None and logits.shape[-1] > int(self._kept.max()):
            result["logits"] = logits[..., self._kept]
        return result


class Lesson(nn.Module):
    """Base of what a trainer trains: ``forward(**batch)`` returns ``{"loss": ...}``; only the student is a submodule.

    Attributes:
        student: the model, or those parts of it that this lesson trains.
        terms: sums of the unweighted losses since :meth:`pop_terms`, by name.
    """

    student: nn.Module

    def __init__(self, teacher: PreTrainedModel, vocabulary: Vocabulary | None = None):
        super().__init__()
        self.vocabulary = vocabulary or Vocabulary()
        # Not registered: the teacher is neither trained nor saved.
        self._teacher = (teacher,)
        self._terms: dict[str, tuple[torch.Tensor, int]] = {}

    @property
    def teacher(self) -> PreTrainedModel:
        """The model that is imitated."""
        return self._teacher[0]

    def bring_teacher(self, device: torch.device) -> None:
        """Move the teacher to where the student is."""
        nn.Module.to(self.teacher, device)

    def train(self, mode: bool = True) -> Lesson:
        """Evaluation mode whatever is asked for; but layers that recompute activations look at their own mode."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = mode
        return self

    def note(self, name: str, value: torch.Tensor) -> None:
        """Keep an unweighted loss for the log."""
        total, count = self._terms.get(name, (torch.zeros((), device=value.device), 0))
        self._terms[name] = (total + value.detach().float(), count + 1)

    def pop_terms(self) -> dict[str, float]:
        """Means of the unweighted losses since the last call."""
        means = {name: float(total) / count for name, (total, count) in self._terms.items()}
        self._terms.clear()
        return means


class Imitation(Lesson):
    """The student as a whole imitates the teacher.

    Args:
        student, teacher: models that take the same inputs.
        terms: the losses.
        attention: the attention modules of both, by name; only where a loss needs them.
        offload: keep activations in the host's memory between forward and backward pass.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        terms: Sequence[Term],
        attention: tuple[Modules, Modules] = ({}, {}),
        offload: bool = False,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__(teacher, vocabulary)
        self.student = student
        self._losses = tuple(terms)
        self._attention = attention
        self._needs = frozenset[str]().union(*(term.needs for term in terms))
        self._offload = offload

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            wanted = self._see(self.teacher, self._attention[1], self.vocabulary.inputs(batch))
            wanted = replace(wanted, outputs=self.vocabulary.outputs(wanted.outputs))
        saved: AbstractContextManager[Any] = nullcontext()
        if self._offload and torch.is_grad_enabled():
            saved = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        with saved:
            own = self._see(self.student, self._attention[0], batch)
        total = None
        for term in self._losses:
            value = term.loss(own, wanted, batch)
            self.note(term.name, value)
            total = term.weight * value if total is None else total + term.weight * value
        assert total is not None
        return {"loss": total}

    def _see(self, model: nn.Module, attention: Modules, batch: Mapping[str, torch.Tensor]) -> Seen:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        arguments: dict[str, Any] = {"return_dict": True, "output_hidden_states": HIDDEN in self._needs}
        if "use_cache" in inspect.signature(model.forward).parameters:
            arguments["use_cache"] = False
        with _outputs_of(attention if ATTENTION in self._needs else {}) as returned:
            outputs = model(**inputs, **arguments)
        hidden = outputs.get("hidden_states") or outputs.get("decoder_hidden_states") or ()
        named = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        mask = batch.get("attention_mask")
        return Seen(named, hidden, dict(returned), None if mask is None else mask.bool())


class AttentionTransfer(Lesson):
    """Each attention module of the student alone imitates that of the teacher on the teacher's own inputs.

    The first stage of LoLCATs (Zhang et al., 2024) and Hedgehog (2024): layers do not wait for each other, nothing
    flows back through more than one of them, and no activations of other layers are kept.

    Args:
        layers: the student's modules by name.
        teacher: runs through the same hook, so that its modules are called with what the student's take.
        sources: the teacher's modules of the same names.
    """

    def __init__(
        self, layers: Modules, teacher: PreTrainedModel, sources: Modules, vocabulary: Vocabulary | None = None
    ):
        super().__init__(teacher, vocabulary)
        self.layers = tuple(layers.values())
        self.student = nn.ModuleList(self.layers)
        self._names = tuple(layers)
        self._sources = {name: sources[name] for name in layers}

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = batch.get("attention_mask")
        arguments: dict[str, Any] = {"return_dict": True}
        if "use_cache" in inspect.signature(self.teacher.forward).parameters:
            arguments["use_cache"] = False
        with torch.no_grad(), _calls_of(self._sources) as calls:
            self.teacher(**self.vocabulary.inputs(batch), **arguments)
        losses = []
        for name, module in zip(self._names, self.layers, strict=True):
            for given, named, wanted in calls[name]:
                own = _first(module(*given, **named))
                if mask is not None and own.shape[:2] == mask.shape:
                    own, wanted = own[mask.bool()], wanted[mask.bool()]
                losses.append(relative_error(own.float(), wanted.float()))
        total = torch.stack(losses).mean()
        self.note("attention transfer", total)
        return {"loss": total}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block no layer drops anything, in whatever mode it is."""
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else _DROPOUTS
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, float) and value:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


@contextmanager
def _outputs_of(modules: Modules) -> Iterator[dict[str, torch.Tensor]]:
    """What modules return in a run, by name; the last call where one runs several times."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = _first(output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


Call = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]


@contextmanager
def _calls_of(modules: Modules) -> Iterator[dict[str, list[Call]]]:
    """The calls of modules in a run, by name: arguments, named arguments and the output."""
    found: dict[str, list[Call]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            found[name].append((arguments, dict(named), _first(output)))

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> torch.Tensor:
    result: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return result
