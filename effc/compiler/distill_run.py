"""A distillation from beginning to end: the stages, what each trains, and where a killed run goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from effc.compiler.distill_budget import Budget
from effc.compiler.distill_checkpoint import put_back
from effc.compiler.distill_data import Material
from effc.compiler.distill_lesson import AttentionTransfer, Imitation, Lesson, Vocabulary, without_dropout
from effc.compiler.distill_losses import ATTENTION, Term
from effc.compiler.distill_models import (
    attention_modules,
    chosen_parameters,
    form_parameters,
    keep_zeros,
    low_rank_updates,
    training,
    untrained_layers,
    zero_again,
)
from effc.compiler.distill_record import Run, Stage
from effc.compiler.distill_trainer import train
from effc.compiler.progress import Progress
from effc.compiler.source_errors import quiet
from effc.errors import PreconditionError
from effc.passes.distill_settings import DistillSettings
from effc.passes.fake_quant import fake_quantized
from effc.passes.quantize_settings import QuantizationSection

# The share of the budget that forms get which compute nothing useful yet.
_TRANSFER = 0.25
# A model that is nearly right is thrown off by larger steps; one whose attention starts from nothing needs them.
_CAREFUL, _BOLD = 5e-5, 2e-4
_TRANSFER_STAGE, _WHOLE_STAGE = "attention-transfer", "distillation"


def run_distillation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    material: Material,
    settings: DistillSettings,
    terms: Sequence[Term],
    directory: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    quantization: QuantizationSection | None = None,
    kept_tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train ``student`` in place; both models end where they were, in evaluation mode.

    Args:
        directory: where checkpoints go. A run that was killed goes on there if called again with equal arguments.
        quantization: what the export will do, for ``fake_quant``.
        kept_tokens: the teacher's ids of the student's tokens where the vocabulary was pruned.

    Raises:
        PreconditionError: if models, losses and settings do not fit together.
        PassFailedError: if the loss is no longer finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    home = next(student.parameters()).device
    started, cpu = time.monotonic(), time.process_time()
    student.eval()
    teacher.eval()
    layers = untrained_layers(student)
    vocabulary = Vocabulary(kept_tokens)
    share, notes = _transfer_share(settings, layers)
    attention: tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]] = ({}, {})
    if share or any(ATTENTION in term.needs for term in terms):
        example = _inputs(material)
        attention = (attention_modules(student, example), attention_modules(teacher, vocabulary.inputs(example)))
        if share and attention[0].keys() != attention[1].keys():
            share = 0.0
            notes.append("layers were removed, so attention was not transferred by itself")
    after_step = (lambda: zero_again(student)) if keep_zeros(student) else None
    course = _Course(material, settings, directory, callbacks, progress, after_step)
    learning_rate = settings.learning_rate or (_BOLD if layers else _CAREFUL)
    imitation = Imitation(student, teacher, terms, attention, settings.activations == "offload", vocabulary)
    stages: list[Stage] = []
    with ExitStack() as stack:
        stack.callback(_bring_home, student, teacher, home)
        stack.enter_context(quiet())
        stack.enter_context(without_dropout(student))
        _recompute(student, settings, stack)
        if settings.fake_quant:
            stack.enter_context(fake_quantized(student, quantization or QuantizationSection(mode="int8")))
        before = _once(directory / "before.json", lambda: _held_out_loss(imitation, material, settings))
        if share:
            lesson = AttentionTransfer(layers, teacher, attention[1], vocabulary)
            parameters, of_forms = form_parameters(layers)
            with training(student, parameters):
                rate = settings.transfer_learning_rate if of_forms else learning_rate
                stages.append(course.stage(_TRANSFER_STAGE, lesson, share, rate))
        if share < 1:
            with ExitStack() as inner:
                if settings.lora:
                    parameters = inner.enter_context(low_rank_updates(student, settings))
                else:
                    parameters = chosen_parameters(student, settings)
                with training(student, parameters):
                    stages.append(course.stage(_WHOLE_STAGE, imitation, 1 - share, learning_rate))
        after = stages[-1].after if share < 1 else _held_out_loss(imitation, material, settings)
    _end_up(student, teacher)
    return Run(
        stages=stages,
        before=before,
        after=after,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu,
        trained_on=len(material.train),
        held_out=len(material.held_out),
        data=material.name,
        notes=notes,
    )


def _transfer_share(settings: DistillSettings, layers: Mapping[str, nn.Module]) -> tuple[float, list[str]]:
    """The share of the budget for transferring attention by itself, and why it is not what was asked for."""
    if settings.transfer and not layers:
        return 0.0, ["no layer has a form that needs training, so attention was not transferred by itself"]
    return settings.transfer if settings.transfer is not None else (_TRANSFER if layers else 0.0), []


@dataclass(frozen=True)
class _Course:
    """What all stages of one run share."""

    material: Material
    settings: DistillSettings
    directory: Path
    callbacks: Sequence[TrainerCallback]
    progress: Progress | None
    after_step: Callable[[], None] | None

    def stage(self, name: str, lesson: Lesson, share: float, learning_rate: float) -> Stage:
        """Train one stage, or take over what it came to before the run was killed.

        Args:
            share: of the budget.
        """
        done, record = self.directory / f"{name}.safetensors", self.directory / f"{name}.json"
        parameters = {key: value for key, value in lesson.named_parameters() if value.requires_grad}
        if record.is_file():
            put_back(parameters, load_file(done))
            return Stage(**json.loads(record.read_text()))
        settings = self.settings
        steps = None if settings.steps is None else max(1, round(settings.steps * share))
        seconds = None if settings.time_budget is None else settings.time_budget * 60 * share

        def told(what: str, part: float) -> None:
            if self.progress:
                self.progress(f"{name}: {what}", round(1000 * part), 1000)

        history = train(
            lesson,
            self.material,
            settings,
            self.directory / name,
            budget=Budget(steps, seconds),
            learning_rate=learning_rate,
            callbacks=self.callbacks,
            progress=told,
            after_step=self.after_step,
        )
        stage = _came_to(name, history, sum(value.numel() for value in parameters.values()))
        if is_first_process():
            staging = done.with_suffix(".part")
            save_file({key: value.detach().cpu().contiguous() for key, value in parameters.items()}, staging)
            os.replace(staging, done)
            staging.write_text(json.dumps(vars(stage)))
            os.replace(staging, record)
        return stage


def _came_to(name: str, history: Sequence[Mapping[str, Any]], parameters: int) -> Stage:
    """What a stage came to, from the entries of its trainer's log."""
    held_out = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    return Stage(
        name=name,
        steps=max((int(entry["step"]) for entry in history), default=0),
        parameters=parameters,
        before=held_out[0][1],
        after=min(value for _, value in held_out),
        curve=[[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        held_out=held_out,
    )


def _held_out_loss(lesson: Lesson, material: Material, settings: DistillSettings) -> float:
    """Mean loss over the examples held out, without a trainer."""
    from accelerate import Accelerator

    device = torch.device("cpu") if settings.device == "cpu" else Accelerator().device
    lesson.to(device).train(False)
    lesson.bring_teacher(device)
    total = 0.0
    for start in range(0, len(material.held_out), settings.batch):
        items = list(material.held_out[start : start + settings.batch])
        batch = {name: value.to(device) for name, value in material.collate(items).items()}
        with torch.no_grad():
            total += float(lesson(**batch)["loss"]) * len(items)
    lesson.pop_terms()
    return total / len(material.held_out)


def _once(path: Path, measure: Callable[[], float]) -> float:
    if not path.is_file():
        value = measure()
        path.write_text(json.dumps(value))
        return value
    return float(json.loads(path.read_text()))


def _inputs(material: Material) -> dict[str, torch.Tensor]:
    batch = material.collate(list(material.held_out[:2]))
    return {name: value for name, value in batch.items() if name != "labels"}


def _recompute(student: PreTrainedModel, settings: DistillSettings, stack: ExitStack) -> None:
    if settings.activations != "recompute":
        return
    if not student.supports_gradient_checkpointing:
        raise PreconditionError(
            f"{type(student).__name__} cannot recompute its activations.",
            "Use activations: offload, or a smaller batch.",
        )
    student.activation_checkpointing_enable({"use_reentrant": False})
    stack.callback(student.activation_checkpointing_disable)


def _bring_home(student: nn.Module, teacher: nn.Module, home: torch.device) -> None:
    student.to(home)
    teacher.to(home)


def _end_up(student: nn.Module, teacher: nn.Module) -> None:
    student.train(False)
    teacher.train(False)


def is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
