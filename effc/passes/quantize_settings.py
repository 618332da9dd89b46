"""What can be asked of quantization: the ``quantization`` section of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from effc.suggest import did_you_mean

MODES = ("none", "int8", "int8-weights", "int4-weights", "fp8", "fp16", "bf16")
"""What a layer can be quantized to; ``none`` leaves it in fp32."""
SEARCHED = ("int8", "int8-weights", "int4-weights", "fp8")
"""Modes that ``auto`` can choose layers for; the others lose next to nothing."""
AUTO = "auto"
_AUTO_FORM = "auto:DROP or auto:DROP:MODE, for example auto:0.01 or auto:0.01:int4-weights"


class CalibrationSection(BaseModel):
    """Which data quantization ranges come from.

    The whole range is the default because the outliers of normalized activations sit in a few channels of every token
    and carry meaning. MiniLM on reviews, cosine to fp32: whole range 0.994, 99.999 % 0.995, 99.99 % 0.942, 99.9 %
    0.913, entropy 0.970.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(
        None,
        description="text, .jsonl or .csv file, or a datasets name; without it activations are quantized dynamically",
    )
    samples: int = Field(64, ge=1, description="samples read from the data")
    max_length: int = Field(512, ge=1, description="tokens per sample")
    packed: bool = Field(False, description="join texts and cut them to samples of exactly max_length tokens")
    seed: int = Field(0, description="chooses the samples")
    method: Literal["minmax", "percentile", "entropy", "mse"] = Field("minmax", description="how ranges are chosen")
    percentile: float = Field(99.999, gt=50, le=100, description="share of values inside the range, for percentile")


class WeightSection(BaseModel):
    """How weights alone are quantized, for ``int8-weights`` and ``int4-weights``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["rtn", "awq", "gptq"] = Field(
        "rtn", description="round to nearest; awq and gptq need calibration data; gptq is for fp8 too"
    )
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        None, description="inputs that share a scale; 32 for int4 and 128 for int8 when empty"
    )
    symmetric: bool = Field(False, description="no zero points")


class QuantizationSection(BaseModel):
    """How weights and activations are quantized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: str = Field("none", description=f"{', '.join(MODES)}, or {_AUTO_FORM}")
    layers: dict[str, str] = Field(
        default_factory=dict, description="glob to mode, for layers of their own; the first that matches counts"
    )
    exclude: tuple[str, ...] = Field((), description="globs of graph nodes or modules that stay in fp32")
    embeddings: bool = Field(True, description="quantize embedding tables too")
    reduce_range: bool = Field(
        False, description="7-bit weights, for CPUs without VNNI (their 8-bit products saturate)"
    )
    activations: Literal["tensor", "token"] = Field(
        "tensor", description="INT8 inputs with one scale per tensor, or one per token: for outliers in few tokens"
    )
    smoothing: float | Literal["none", "auto"] = Field(
        "none", description="SmoothQuant's alpha, 0 to 1, or auto to search it per layer; needs calibration data"
    )
    bias_correction: bool = Field(
        False, description="add what INT8 changes in the mean of each output; needs calibration data"
    )
    kv_cache: Literal["fp32", "fp16", "int8"] = Field(
        "fp32", description="what generate() keeps keys and values in; int8 with a scale per position and head"
    )
    attention: Literal["none", "int8", "fp8"] = Field(
        "none", description="what queries, keys and values are rounded to in front of attention, with a scale each"
    )
    weights: WeightSection = WeightSection()
    calibration: CalibrationSection = CalibrationSection()

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value.split(":")[0] == AUTO:
            _auto(value)
        elif value not in MODES:
            raise ValueError(f"'{value}' is not a mode. {did_you_mean(value, (*MODES, AUTO))}")
        return value

    @field_validator("layers")
    @classmethod
    def _known_layer_modes(cls, value: dict[str, str]) -> dict[str, str]:
        for glob, mode in value.items():
            if mode not in MODES:
                raise ValueError(f"'{mode}' (for '{glob}') is not a mode. {did_you_mean(mode, MODES)}")
        return value

    @field_validator("smoothing", mode="after")
    @classmethod
    def _alpha(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError("an alpha lies between 0 and 1")
        return value

    @model_validator(mode="after")
    def _options_have_a_mode(self) -> QuantizationSection:
        if self.active:
            for option, modes in self._asked():
                if not self.modes & modes:
                    heard = " and ".join(sorted(modes))
                    raise ValueError(f"{option} is for {heard}, and no layer gets that. Leave it out")
        return self

    def _asked(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Options that were set to something, and the modes that listen to them."""
        in_blocks, int8 = frozenset({"int8-weights", "int4-weights"}), frozenset({"int8"})
        for name in sorted(self.weights.model_fields_set):
            value = getattr(self.weights, name)
            if value != type(self.weights).model_fields[name].default:
                yield f"weights.{name} {value}", in_blocks | {"fp8"} if value == "gptq" else in_blocks
        if self.activations != "tensor":
            yield f"activations {self.activations}", int8
        if self.smoothing != "none":
            yield f"smoothing {self.smoothing}", int8
        for name in ("bias_correction", "reduce_range"):
            if getattr(self, name):
                yield name, int8

    @property
    def active(self) -> bool:
        """Whether anything is to be quantized."""
        return bool(self.modes) or self.attention != "none"

    @property
    def budget(self) -> float | None:
        """The quality that ``auto`` may lose, or None."""
        return _auto(self.mode)[0] if self.mode.startswith(AUTO) else None

    @property
    def base_mode(self) -> str:
        """The mode of layers that nothing else is said of."""
        return _auto(self.mode)[1] if self.mode.startswith(AUTO) else self.mode

    @property
    def formats(self) -> frozenset[str]:
        """The modes, and what attention's inputs are rounded to."""
        return self.modes | ({self.attention} - {"none"})

    @property
    def modes(self) -> frozenset[str]:
        """Every mode that some layer may get."""
        return frozenset({self.base_mode, *self.layers.values()} - {"none"})


def _auto(text: str) -> tuple[float, str]:
    """Budget and mode of ``auto:DROP[:MODE]``."""
    parts = text.split(":")
    mode = parts[2] if len(parts) > 2 else "int8"
    try:
        budget = float(parts[1])
    except (IndexError, ValueError):
        raise ValueError(f"'{text}' does not say how much quality may be lost. Write {_AUTO_FORM}") from None
    if len(parts) > 3 or not 0 <= budget < float("inf"):
        raise ValueError(f"'{text}' is not {_AUTO_FORM}")
    if mode not in SEARCHED:
        raise ValueError(f"auto does not choose layers for '{mode}'. {did_you_mean(mode, SEARCHED)}")
    return budget, mode
