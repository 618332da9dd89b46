"""transformers' Trainer, and accelerate below it, for lessons: budgets, checkpoints that survive a kill, progress."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from effc.compiler.distill_budget import Budget
from effc.compiler.distill_checkpoint import COMPLETE, WEIGHTS, last_checkpoint, put_back, write_whole
from effc.compiler.distill_data import Examples, Material
from effc.compiler.distill_lesson import Lesson
from effc.errors import PassFailedError
from effc.passes.distill_settings import DistillSettings

# More steps than any budget of minutes will see.
_ENDLESS = 10_000_000


class LessonTrainer(Trainer):
    """Trains the parameters of a lesson that require gradients.

    Checkpoints hold these parameters alone, besides what a bit-identical continuation takes: optimizer, schedule, the
    state of all random generators and the place in the data.
    """

    def __init__(self, lesson: Lesson, budget: Budget, after_step: Callable[[], None] | None = None, **arguments: Any):
        super().__init__(model=lesson, **arguments)
        self.lesson, self.budget, self._after_step = lesson, budget, after_step
        # The loss is a mean already, whatever a batch is called.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; transformers calls this."""
        loss = model(**inputs)["loss"]
        if not torch.isfinite(loss):
            raise PassFailedError(
                f"The training loss is {float(loss)} at step {self.state.global_step}.",
                "Lower learning_rate, or train in precision fp32.",
            )
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The held-out loss of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """The held-out loss, with its parts."""
        self.lesson.pop_terms()
        metrics: dict[str, float] = super().evaluate(*arguments, **named)
        parts = {f"eval_{name}": value for name, value in self.lesson.pop_terms().items()}
        if parts and self.state.log_history:
            self.state.log_history[-1] |= parts
        return metrics | parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what is logged."""
        if "loss" in logs:
            logs = logs | self.lesson.pop_terms()
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; pruned weights go back to zero after each step."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self._after_step is not None:
            after = self._after_step
            optimizer.register_step_post_hook(lambda *_: after())
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A linear warm-up over steps, then a cosine down to zero at the end of the budget."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                rising = min(1.0, (step + 1) / (warmup + 1))
                return float(rising * 0.5 * (1 + math.cos(math.pi * self.budget.share(step))))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self._optimizer(), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, by name within the lesson."""
        return {name: value for name, value in self.lesson.named_parameters() if value.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.trained().items()}
        save_file(tensors, directory / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Asked for before the branch: with several processes it is a collective operation.
        elapsed = self.budget.elapsed
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            write_whole(directory / COMPLETE, {"elapsed": elapsed, "step": self.state.global_step})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    def _load_weights(self, checkpoint: Path) -> None:
        put_back(self.trained(), load_file(checkpoint / WEIGHTS))


class Steering(TrainerCallback):
    """Ends the run with its budget, tells of progress, and hands every record of the log on."""

    def __init__(self, budget: Budget, progress: Callable[[str, float], None]):
        self._budget, self._progress = budget, progress
        self._loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Remember the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, with a last evaluation and checkpoint, once the budget is used up."""
        share = self._budget.share(state.global_step)
        if share >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        elapsed = self._budget.elapsed
        left = elapsed * (1 - share) / share if share else math.inf
        loss = "" if self._loss is None else f"loss {self._loss:.4f}, "
        if state.is_world_process_zero:
            self._progress(f"step {state.global_step}, {loss}{_duration(left)} left", share)


def train(
    lesson: Lesson,
    material: Material,
    settings: DistillSettings,
    directory: Path,
    *,
    budget: Budget,
    learning_rate: float,
    callbacks: Sequence[TrainerCallback],
    progress: Callable[[str, float], None],
    after_step: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a lesson, going on from the last whole checkpoint in ``directory`` if there is one.

    The parameters that require gradients end at their best by held-out loss, which may be those that they had before.

    Returns:
        transformers' log: ``loss`` and ``eval_loss`` by ``step``; the entry of step 0 is from before the training.
    """
    checkpoint = last_checkpoint(directory)
    arguments = _arguments(settings, directory, budget, learning_rate)
    extra = [EarlyStoppingCallback(settings.patience)] if settings.patience is not None else []
    trainer = LessonTrainer(
        lesson,
        budget,
        after_step,
        args=arguments,
        train_dataset=Examples(material.train),
        eval_dataset=Examples(material.held_out),
        data_collator=material.collate,
        callbacks=[Steering(budget, progress), *extra, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    lesson.bring_teacher(arguments.device)
    start = directory / "start.safetensors"
    if checkpoint is None:
        progress("measuring held-out loss", 0.0)
        before = trainer.evaluate()["eval_loss"]
        if arguments.should_save:
            trainer._save(str(directory))
            os.replace(directory / WEIGHTS, start)
            write_whole(directory / "start.json", {"eval_loss": before})
        budget.start(0.0)
    else:
        budget.start(json.loads((checkpoint / COMPLETE).read_text())["elapsed"])
    trainer.accelerator.wait_for_everyone()
    before = json.loads((directory / "start.json").read_text())["eval_loss"]
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best = trainer.state.best_metric
    if best is None or best >= before:
        put_back(trainer.trained(), load_file(start))
    history = [entry for entry in trainer.state.log_history if entry.get("step") or "eval_loss" not in entry]
    return [{"step": 0, "eval_loss": before}, *history]


def _arguments(settings: DistillSettings, directory: Path, budget: Budget, learning_rate: float) -> TrainingArguments:
    precision = _precision(settings)
    warmup = settings.warmup if budget.steps is None else min(settings.warmup, budget.steps // 5)
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=budget.steps or _ENDLESS,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_norm,
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        logging_steps=max(1, min(10, settings.evaluate_every)),
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        report_to=list(settings.trackers) or "none",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device != "cpu" and torch.cuda.is_available(),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )


def _precision(settings: DistillSettings) -> str:
    wanted: str = settings.precision
    if wanted == "auto":
        on_gpu = settings.device != "cpu" and torch.cuda.is_available()
        wanted = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    return wanted


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
