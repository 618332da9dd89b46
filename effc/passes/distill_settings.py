"""What can be asked of distillation: the settings of a training run, and the ``recover`` section of the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from effc.suggest import did_you_mean

LOSSES = ("logits", "hidden", "hidden-cosine", "attention", "embedding", "labels")
"""Names of the losses that a text can ask for; see :mod:`effc.compiler.distill_losses`."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "trackio")
DEFAULT_MINUTES = 20.0
_BUDGET = re.compile(r"^(\d+(?:\.\d+)?)\s*(m|min|minutes|h|hours|steps)?$")


class DistillSettings(BaseModel):
    """How a student is trained to do what its teacher does.

    A run ends with its budget: ``steps`` or ``minutes``, whichever comes first where both are given, and twenty minutes
    where neither is. Only runs with a budget of steps can be repeated bit by bit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(None, ge=1, description="optimizer steps, both stages together")
    minutes: float | None = Field(
        None, gt=0, description=f"wall time; {DEFAULT_MINUTES:g} if no steps are given either"
    )
    losses: tuple[str, ...] = Field(
        (), description=f"of {', '.join(LOSSES)}, each NAME or NAME:WEIGHT; by task if empty"
    )
    temperature: float = Field(2.0, gt=0, description="softens both distributions of the logits loss")
    learning_rate: float | None = Field(
        None, gt=0, description="at its highest, behind the warm-up; 2e-4 where forms need training, 5e-5 elsewhere"
    )
    warmup: int = Field(20, ge=0, description="steps until the learning rate is at its highest; then it falls to zero")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    gradient_norm: float = Field(1.0, gt=0, description="gradients longer than this are shortened")
    batch: int = Field(8, ge=1, description="texts per device and forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    length: int = Field(512, ge=1, description="tokens per text; longer ones are cut")
    transfer: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the budget for a first stage, in which attention alone imitates the source's, layer by "
        "layer; a quarter where forms need training, none elsewhere",
    )
    transfer_learning_rate: float = Field(1e-3, gt=0, description="of that stage, for parameters of forms")
    lora: int = Field(0, ge=0, description="rank of low-rank updates that are trained instead of the weights; 0: all")
    train: tuple[str, ...] = Field((), description="globs of the parameters to train; all when empty")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the forward and backward pass; auto is bf16 on GPUs that have it, fp32 elsewhere"
    )
    activations: Literal["keep", "recompute", "offload"] = Field(
        "keep", description="what the backward pass needs: kept, computed again, or kept in the host's memory"
    )
    fake_quant: bool = Field(False, description="train with the rounding of the INT8 that the export will use")
    held_out: int = Field(
        32, ge=1, description="texts that are not trained on and that the best checkpoint is chosen by"
    )
    evaluate_every: int = Field(
        25, ge=1, description="steps between evaluations, each of which also saves a checkpoint"
    )
    patience: int | None = Field(None, ge=1, description="evaluations without improvement until training stops early")
    seed: int = Field(0, ge=0, description="of data order and initial low-rank updates")
    device: Literal["auto", "cpu"] = Field("auto", description="auto is whatever accelerate finds")
    trackers: tuple[str, ...] = Field((), description=f"where curves go, too: {', '.join(TRACKERS)}")

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            split_loss(text)
        return value

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in TRACKERS:
                raise ValueError(f"'{name}' is no tracker. {did_you_mean(name, TRACKERS)}")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> DistillSettings:
        if self.lora and self.fake_quant:
            raise ValueError(
                "lora and fake_quant exclude each other: low-rank updates are merged into the weights only behind the "
                "training, so what would be rounded is not what is exported"
            )
        return self

    @property
    def time_budget(self) -> float | None:
        """Minutes, or None where steps alone bound the run."""
        return DEFAULT_MINUTES if self.minutes is None and self.steps is None else self.minutes


class RecoverSection(DistillSettings):
    """Whether and how the rewritten model is trained before it is exported.

    ``recover: 20m`` and ``recover: 500 steps`` stand for a section with that budget, as ``budget: 20m`` does within a
    section; one that says anything switches recovery on.
    """

    enabled: bool = Field(False, description="train the rewritten model; true as soon as anything else is given")
    data: str | None = Field(None, description="texts to train on; never those that quality is verified on")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, values: Any) -> Any:
        if isinstance(values, bool):
            return {"enabled": values}
        if isinstance(values, (str, int, float)):
            values = {"budget": str(values)}
        if not isinstance(values, Mapping) or not values:
            return values
        result = {"enabled": True, **values}
        if (budget := result.pop("budget", None)) is not None:
            result = {key: value for key, value in result.items() if key not in ("steps", "minutes")}
            result |= parse_budget(str(budget))
        return result


def parse_budget(text: str) -> dict[str, Any]:
    """``20m``, ``1.5h`` or ``500`` (steps) as settings.

    Raises:
        ValueError: if it is none of these.
    """
    found = _BUDGET.match(text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"'{text}' is no budget. Write, for example, 20m, 1.5h or 500 (steps)")
    number, unit = float(found[1]), found[2] or "steps"
    if unit == "steps":
        if number != int(number):
            raise ValueError(f"'{text}' is no whole number of steps")
        return {"steps": int(number)}
    return {"minutes": number * (60 if unit.startswith("h") else 1)}


def split_loss(text: str) -> tuple[str, float]:
    """Name and weight of ``hidden`` or ``hidden:0.5``.

    Raises:
        ValueError: if there is no such loss, or the weight is no positive number.
    """
    name, colon, weight = text.partition(":")
    if name not in LOSSES:
        raise ValueError(f"'{name}' is no loss. {did_you_mean(name, LOSSES)}")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"'{text}' does not give a positive weight. Write {name}:1")
    return name, value
