"""What can be asked of quantization: the ``quantization`` section of the recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CalibrationSection(BaseModel):
    """Which data quantization ranges come from.

    The whole range is the default because the outliers of normalized activations sit in a few channels of every token
    and carry meaning. MiniLM on reviews, cosine to fp32: whole range 0.994, 99.999 % 0.995, 99.99 % 0.942, 99.9 %
    0.913, entropy 0.970.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(
        None, description="text, .jsonl or .csv file; without it activations are quantized dynamically"
    )
    samples: int = Field(64, ge=1, description="samples read from the data")
    max_length: int = Field(512, ge=1, description="tokens per sample")
    method: Literal["minmax", "percentile", "entropy"] = Field("minmax", description="how ranges are chosen")
    percentile: float = Field(99.999, gt=50, le=100, description="share of values inside the range, for percentile")


class QuantizationSection(BaseModel):
    """How weights and activations are quantized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["none", "int8"] = Field("none", description="none or int8")
    exclude: tuple[str, ...] = Field((), description="globs of graph nodes or modules that stay in fp32")
    embeddings: bool = Field(True, description="quantize embedding tables too")
    reduce_range: bool = Field(
        False, description="7-bit weights, for CPUs without VNNI (their 8-bit products saturate)"
    )
    calibration: CalibrationSection = CalibrationSection()
