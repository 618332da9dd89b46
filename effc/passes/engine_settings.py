"""What can be asked of TensorRT engines: the ``engine`` section of the recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ENGINE_TARGETS = ("tensorrt", "tensorrt_rtx")
"""Targets whose artifacts hold engines."""
TORCH_TARGET = "torch_tensorrt"
"""Target whose artifacts hold a program for torch, with engines in it."""
_ARCHITECTURE = re.compile(r"sm_(\d{2,3})")
_SHAPE = re.compile(r"(\d+)(?:x(\d+))?")


class EngineSection(BaseModel):
    """How engines are built; for ONNX Runtime there is nothing to build and this has to stay as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="what is not quantized computes in this")
    arch: tuple[str, ...] = Field(
        (), description="GPU architectures, sm_89 and so on; that of this machine's GPU when empty"
    )
    shapes: tuple[str, ...] = Field(
        (), description="BATCHxLENGTH of each optimization profile: its largest shape, and the one it is tuned for"
    )
    plugin: bool = Field(True, description="sparse attention by effc's plugin; standard operators without it")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that compute every layer together, an engine for each")
    embed_plugin: bool = Field(False, description="put the plugin library into the plan")
    version_compatible: bool = Field(False, description="let other releases of TensorRT load the plan")
    refit: bool = Field(False, description="let weights be replaced in the plan")
    weight_streaming: bool = Field(False, description="let weights stay in host memory while the plan runs")
    optimization_level: int | None = Field(None, ge=0, le=5, description="time spent on the search for kernels")
    workspace_mib: int | None = Field(None, ge=1, description="device memory that kernels may use while they run")

    @field_validator("arch", mode="before")
    @classmethod
    def _split_arch(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("shapes", mode="before")
    @classmethod
    def _split_shapes(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("arch")
    @classmethod
    def _known_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for arch in value:
            if not _ARCHITECTURE.fullmatch(arch):
                raise ValueError(f"'{arch}' is not an architecture such as sm_89")
        if len(set(value)) < len(value):
            raise ValueError("an architecture is named twice")
        return value

    @field_validator("shapes")
    @classmethod
    def _known_shapes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for shape in value:
            parse_shape(shape)
        if len(set(value)) < len(value):
            raise ValueError("a shape is named twice")
        return value

    @property
    def capabilities(self) -> tuple[int, ...]:
        """The architectures as numbers, 89 for ``sm_89``."""
        return tuple(int(arch.removeprefix("sm_")) for arch in self.arch)


def parse_shape(text: str) -> tuple[int, int | None]:
    """Batch and length of ``8x512``; ``8`` alone is for models without a length.

    Raises:
        ValueError: if it is neither.
    """
    found = _SHAPE.fullmatch(text)
    if found is None or 0 in (sizes := [int(size) for size in found.groups() if size is not None]):
        raise ValueError(f"'{text}' is not BATCHxLENGTH, for example 8x512")
    return sizes[0], sizes[1] if len(sizes) > 1 else None


def default_shapes(max_length: int | None) -> Sequence[str]:
    """One short text, and a batch of the longest that engines are commonly built for."""
    longest = min(max_length or 512, 4096)
    return list(dict.fromkeys([f"1x{min(128, longest)}", f"8x{longest}"]))
