"""A distillation from beginning to end: the stages, what each trains, and where a killed run goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

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
from effc.compiler.distill_trainer import Progress, train
from effc.compiler.source import quiet
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
    example = _inputs(material)
    layers = untrained_layers(student)
    needs_attention = any(ATTENTION in term.needs for term in terms)
    share = settings.transfer if settings.transfer is not None else (_TRANSFER if layers else 0.0)
    learning_rate = settings.learning_rate or (_BOLD if layers else _CAREFUL)
    notes = []
    if settings.transfer and not layers:
        share = 0.0
        notes.append("no layer has a form that needs training, so attention was not transferred by itself")
    vocabulary = Vocabulary(kept_tokens)
    attention: tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]] = ({}, {})
    if needs_attention or share:
        attention = (
            attention_modules(student, example),
            attention_modules(teacher, vocabulary.inputs(example)),
        )
        if share and attention[0].keys() != attention[1].keys():
            share = 0.0
            notes.append("layers were removed, so attention was not transferred by itself")
    pruned = keep_zeros(student)
    after_step = (lambda: zero_again(student)) if pruned else None
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
                stages.append(
                    _stage(
                        _TRANSFER_STAGE,
                        lesson,
                        material,
                        settings,
                        directory,
                        share,
                        settings.transfer_learning_rate if of_forms else learning_rate,
                        callbacks,
                        progress,
                        after_step,
                    )
                )
        if share < 1:
            with ExitStack() as inner:
                if settings.lora:
                    parameters = inner.enter_context(low_rank_updates(student, settings))
                else:
                    parameters = chosen_parameters(student, settings)
                with training(student, parameters):
                    stages.append(
                        _stage(
                            _WHOLE_STAGE,
                            imitation,
                            material,
                            settings,
                            directory,
                            1 - share,
                            learning_rate,
                            callbacks,
                            progress,
                            after_step,
                        )
                    )
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


def _stage(
    name: str,
    lesson: Lesson,
    material: Material,
    settings: DistillSettings,
    directory: Path,
    share: float,
    learning_rate: float,
    callbacks: Sequence[TrainerCallback],
    progress: Progress | None,
    after_step: Callable[[], None] | None,
) -> Stage:
    """Train one stage, or take over what it came to before the run was killed."""
    done, record = directory / f"{name}.safetensors", directory / f"{name}.json"
    parameters = {key: value for key, value in lesson.named_parameters() if value.requires_grad}
    if record.is_file():
        put_back(parameters, load_file(done))
        return Stage(**json.loads(record.read_text()))
    steps = None if settings.steps is None else max(1, round(settings.steps * share))
    seconds = None if settings.time_budget is None else settings.time_budget * 60 * share

    def told(what: str, part: float) -> None:
        if progress:
            progress(f"{name}: {what}", round(1000 * part), 1000)

    history = train(
        lesson,
        material,
        settings,
        directory / name,
        budget=Budget(steps, seconds),
        learning_rate=learning_rate,
        callbacks=callbacks,
        progress=told,
        after_step=after_step,
    )
    held_out = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    stage = Stage(
        name=name,
        steps=max((int(entry["step"]) for entry in history), default=0),
        parameters=sum(value.numel() for value in parameters.values()),
        before=held_out[0][1],
        after=min(value for _, value in held_out),
        curve=[[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        held_out=held_out,
    )
    if is_first_process():
        staging = done.with_suffix(".part")
        save_file({key: value.detach().cpu().contiguous() for key, value in parameters.items()}, staging)
        os.replace(staging, done)
        staging.write_text(json.dumps(vars(stage)))
        os.replace(staging, record)
    return stage


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
