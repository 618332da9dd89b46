"""``distill``: train one model to do what another does."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel, TrainerCallback

from effc.compiler.cache import cache_key
from effc.compiler.distill_data import Collate, Data, material_of, text_collate
from effc.compiler.distill_losses import LossChoice, Term, terms_of
from effc.compiler.distill_record import Run, describe
from effc.compiler.distill_run import is_first_process, run_distillation
from effc.compiler.inputs import input_names
from effc.compiler.progress import Progress
from effc.compiler.recipe import ModelSection
from effc.compiler.source import SourceModel, load, locate
from effc.compiler.tasks import resolve_task
from effc.compiler.toolchain import toolchain
from effc.compiler.weights import weights_digest
from effc.errors import EffcError, OutputError, UsageError
from effc.passes.distill_settings import DistillSettings
from effc.suggest import did_you_mean

DISTILL_VERSION = 1
RECORD = "distill.json"


@dataclass(frozen=True)
class Distilled:
    """A finished distillation.

    Attributes:
        model: the student, trained in place, in evaluation mode.
        run: stages, loss curves, held-out loss before and after.
        output: the checkpoint directory, or None where none was asked for.
    """

    model: PreTrainedModel
    run: Run
    output: Path | None


def distill(
    student: str | Path | PreTrainedModel,
    teacher: str | Path | PreTrainedModel,
    data: Data,
    *,
    output: str | Path | None = None,
    losses: Sequence[LossChoice] = (),
    callbacks: Sequence[TrainerCallback] = (),
    tokenizer: Any | None = None,
    task: str | None = None,
    checkpoints: str | Path | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Distilled:
    """Train ``student`` to do what ``teacher`` does, on the data given.

    Args:
        student: a checkpoint, or a model in memory, which is trained in place, whatever passes it has been through.
        teacher: the same; it is not changed.
        data: a file of texts, or an iterable of texts, of :class:`effc.compiler.data.Sample`, or of examples (mappings
            from the names of the model's inputs to tensors without a batch axis).
        output: a directory to write the trained checkpoint to, and ``distill.json`` with what happened.
        losses: names (``"logits"``, ``"hidden:0.5"``), functions ``(student, teacher, batch) -> tensor`` or pairs of
            function and weight; see :mod:`effc.compiler.distill_losses`. Those that suit the task when empty.
        callbacks: transformers' callbacks.
        tokenizer: for texts; the student's own when it is a checkpoint.
        task: detected from the student's config when None.
        checkpoints: where a killed run can go on, if called again with the same arguments; ``<output>.run`` when None.
            It is removed at the end.
        restart: begin anew where there is such a run, instead of going on.
        trust_remote_code: run model code that checkpoints bring along.
        progress: called as ``progress(what, thousandths done, 1000)``.
        settings: of :class:`effc.passes.distill_settings.DistillSettings`, such as ``minutes=5`` or ``lora=16``.

    Raises:
        UsageError, SourceModelError, DataError, PreconditionError, OutputError, MissingDependencyError,
            PassFailedError: see each.
    """
    chosen = _settings(settings)
    output = None if output is None else Path(output)
    if output is not None:
        _check_output(output)
    taught, processor, task = _model(student, task, trust_remote_code, tokenizer)
    example = teacher if isinstance(teacher, PreTrainedModel) else _load(teacher, task, trust_remote_code).model
    if example is taught.model:
        raise UsageError("Student and teacher are the same model object.", "Load or copy one of them anew.")
    terms = terms_of(tuple(losses) or chosen.losses, task, chosen.temperature)
    material = material_of(
        data,
        held_out=chosen.held_out,
        seed=chosen.seed,
        collate_texts=_collate(taught, example, processor, chosen),
    )
    identity = cache_key(
        version=DISTILL_VERSION,
        settings=chosen.model_dump(mode="json"),
        losses=[[term.name, term.weight] for term in terms],
        data=material.digest,
        student=weights_digest(taught.model),
        teacher=weights_digest(example),
        toolchain=toolchain(),
    )
    with ExitStack() as stack:
        folder = _run_directory(output, checkpoints, identity, restart, stack)
        implementations = [(model, model.config._attn_implementation) for model in (taught.model, example)]
        try:
            run = run_distillation(
                taught.model, example, material, chosen, terms, folder, callbacks=callbacks, progress=progress
            )
        finally:
            for model, implementation in implementations:
                if model.config._attn_implementation != implementation:
                    model.set_attn_implementation(implementation)
        if output is not None and is_first_process():
            _write(taught.model, processor, run, chosen, terms, output)
        if is_first_process():
            shutil.rmtree(folder, ignore_errors=True)
    return Distilled(taught.model, run, output)


@dataclass(frozen=True)
class _Student:
    model: PreTrainedModel
    source: SourceModel | None


def _settings(values: Mapping[str, Any]) -> DistillSettings:
    try:
        return DistillSettings.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            raise UsageError(
                f"'{name}' is no setting of a distillation.", did_you_mean(name, list(DistillSettings.model_fields))
            ) from None
        text = detail["msg"].removeprefix("Value error, ").rstrip(".")
        raise UsageError(f"{f'{name}: ' if name else ''}{text}.", "See docs/distillation.md.") from None


def _model(
    student: str | Path | PreTrainedModel, task: str | None, trust: bool, tokenizer: Any | None
) -> tuple[_Student, Any | None, str | None]:
    if isinstance(student, PreTrainedModel):
        if task is None:
            try:
                task = resolve_task(student.config, None).name
            except EffcError:
                task = None
        return _Student(student, None), tokenizer, task
    source = _load(student, task, trust)
    return _Student(source.model, source), tokenizer or source.processor, source.task.name


def _load(path: str | Path, task: str | None, trust: bool) -> SourceModel:
    return load(locate(ModelSection(path=str(path), task=task, trust_remote_code=trust)))


def _collate(student: _Student, teacher: PreTrainedModel, processor: Any | None, settings: DistillSettings) -> Collate:
    model = student.model
    if student.source is not None:
        names = input_names(student.source)
    else:
        taken = inspect.signature(model.forward).parameters
        names = tuple(name for name in getattr(processor, "model_input_names", ()) if name in taken)
    limits = [settings.length, *(_positions(each) for each in (model, teacher))]
    labels = getattr(model.config, "id2label", None) if "Classification" in type(model).__name__ else None
    return text_collate(processor, min(limits), names, labels)


def _positions(model: PreTrainedModel) -> int:
    from effc.compiler.source import usable_positions

    return usable_positions(model) or 1 << 30


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"'{output}' is there already and not empty.", "Choose another directory, or remove it.")


def _run_directory(
    output: Path | None, checkpoints: str | Path | None, identity: str, restart: bool, stack: ExitStack
) -> Path:
    """Where checkpoints go; a run of other arguments is not gone on with."""
    if checkpoints is None and output is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-distill-")))
    folder = Path(checkpoints) if checkpoints is not None else output.with_name(output.name + ".run")  # type: ignore[union-attr]
    mark = folder / "identity.json"
    if folder.exists() and any(folder.iterdir()):
        known = json.loads(mark.read_text())["identity"] if mark.is_file() else None
        if known is None:
            raise OutputError(f"'{folder}' is there already and holds no run.", "Choose another directory.")
        if restart:
            if is_first_process():
                shutil.rmtree(folder)
        elif known != identity:
            raise UsageError(
                f"'{folder}' holds an unfinished run with another model, data or settings.",
                "Repeat that run's arguments to go on with it, or give --restart (restart=True) to begin anew.",
            )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"identity": identity}))
    return folder


def _write(
    model: PreTrainedModel,
    processor: Any | None,
    run: Run,
    settings: DistillSettings,
    terms: Sequence[Term],
    output: Path,
) -> None:
    """The checkpoint appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as staging:
        whole = Path(staging) / "checkpoint"
        model.save_pretrained(whole)
        if processor is not None and hasattr(processor, "save_pretrained"):
            processor.save_pretrained(whole)
        losses = [f"{term.name}:{term.weight:g}" for term in terms]
        record = {"settings": settings.model_dump(mode="json") | {"losses": losses}, "run": describe(run)}
        (whole / RECORD).write_text(json.dumps(record, indent=2, default=str))
        if output.is_dir():
            output.rmdir()
        whole.rename(output)
