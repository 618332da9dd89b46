"""What can be asked of the attention rewrite: the ``attention`` section of the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm, whole_number
from effc.plugins.forms.registry import parse_form

LAYER_RANGE = re.compile(r"^(\d+)(?:-(\d+|\*))?$")
"""Layer numbers as in ``0-3``, ``5`` or ``4-*``; every other key is a glob of module names."""
DUO_SHARE, DUO_WINDOW, DUO_SINKS = 0.5, 256, 4
_AUTO, _DUO = "auto:BUDGET, for example auto:0.02", "duo[:SHARE[:WINDOW[:SINKS]]], for example duo:0.5"


@dataclass(frozen=True)
class Auto:
    """``auto:BUDGET``: the cheapest form for every layer whose measured quality drop together is within ``budget``."""

    budget: float

    def __str__(self) -> str:
        return f"auto:{self.budget:g}"


@dataclass(frozen=True)
class Duo:
    """``duo:SHARE:WINDOW:SINKS``: the heads that matter most stay dense, the others stream (DuoAttention, Xiao et al.,
    2024). ``share`` is the part of all key/value heads that stays dense.
    """

    share: float = DUO_SHARE
    window: int = DUO_WINDOW
    sinks: int = DUO_SINKS

    def __str__(self) -> str:
        return f"duo:{self.share:g}:{self.window}:{self.sinks}"

    @property
    def streaming(self) -> AttentionForm:
        """What a head that matters less computes."""
        return parse_form(f"local:{self.window}" + (f"|sinks:{self.sinks}" if self.sinks else ""))


Request = AttentionForm | Auto | Duo


class AttentionSection(BaseModel):
    """How attention is rewritten.

    ``pattern`` may also be written as a whole assignment, ``local:256,0-3=dense``: the entries behind ``=`` become
    ``layers``, later ones win, and what stands alone is the pattern of all other layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = Field("dense", description="form of every layer: local:256, auto:0.02, duo:0.5, ...")
    layers: dict[str, str] = Field(
        default_factory=dict, description='other forms for some: {"0-3": dense, "*.layer.5.*": "local:64"}; last wins'
    )
    exclude: tuple[str, ...] = Field((), description="globs of attention modules that stay as they are")
    cross_attention: bool = Field(False, description="rewrite attention from one text to another, too")
    allow_partial: bool = Field(False, description="exit code 0 even if some layers could not be rewritten")
    force: bool = Field(False, description="accept forms that need training to recover quality, untrained")
    candidates: tuple[str, ...] = Field((), description="forms that auto chooses from; a set of windows when empty")
    data: str | None = Field(None, description="text that auto and duo measure on; calibration or verify data if empty")
    samples: int = Field(8, ge=1, description="texts to measure on")
    max_length: int = Field(512, ge=1, description="tokens per text to measure on")

    @model_validator(mode="before")
    @classmethod
    def _whole_assignment(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("pattern"), str):
            return values
        default, layers = split_assignment(values["pattern"])
        if not layers:
            return values
        # What the text says of a layer comes behind what a recipe below it says.
        given = {key: form for key, form in dict(values.get("layers") or {}).items() if key not in layers}
        return {**values, "pattern": default or "dense", "layers": given | layers}

    @field_validator("pattern")
    @classmethod
    def _canonical_request(cls, value: str) -> str:
        return str(parse_request(value))

    @field_validator("layers")
    @classmethod
    def _canonical_layers(cls, value: dict[str, str]) -> dict[str, str]:
        for key, form in value.items():
            if form.split(":")[0] in ("auto", "duo"):
                raise ValueError(f"'{form}' chooses for the whole model and cannot stand for layers {key} alone")
        return {key: str(parse_form(form)) for key, form in value.items()}

    @field_validator("candidates")
    @classmethod
    def _canonical_candidates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(parse_form(form)) for form in value))

    @property
    def request(self) -> Request:
        """What ``pattern`` asks for."""
        return parse_request(self.pattern)

    @property
    def text(self) -> str:
        """Pattern and layers as ``--attn`` takes them."""
        return ",".join([self.pattern, *(f"{key}={form}" for key, form in self.layers.items())])

    @property
    def wants_rewrite(self) -> bool:
        """Whether any layer is asked to be other than dense."""
        forms = [self.request, *(parse_form(form) for form in self.layers.values())]
        return any(not isinstance(form, AttentionForm) or not form.is_dense for form in forms)


def split_assignment(text: str) -> tuple[str | None, dict[str, str]]:
    """Take ``local:256,0-3=dense`` apart: the form of all layers, if there is one, and those of some.

    Raises:
        UsageError: if it has an empty entry, or more than one form for all layers.
    """
    default: str | None = None
    layers: dict[str, str] = {}
    for entry in text.split(","):
        key, equals, form = (part.strip() for part in entry.rpartition("="))
        if not form or (equals and not key):
            raise UsageError(
                f"'{text}' has an empty entry.", "Write, for example, 0-3=dense,4-*=local:256|sinks:4 without spaces."
            )
        if equals:
            # Entered anew, so that the last of equal keys also stands last.
            layers.pop(key, None)
            layers[key] = form
        elif default is not None:
            raise UsageError(
                f"'{text}' gives two forms for all layers, '{default}' and '{form}'.",
                "Say which layers each is for, for example 0-3=dense,4-*=local:256; terms are joined by '|'.",
            )
        else:
            default = form
    return default, layers


def parse_request(text: str) -> Request:
    """Read a form, ``auto:BUDGET`` or ``duo:SHARE``.

    Raises:
        UsageError: if it is none of these.
    """
    name, *arguments = text.split(":")
    if name == "auto":
        if len(arguments) != 1:
            raise UsageError(f"'{text}' does not say which quality drop is allowed.", f"Write {_AUTO}.")
        return Auto(_number(text, arguments[0], _AUTO, 0.0, None))
    if name == "duo":
        if len(arguments) > 3:
            raise UsageError(f"'{text}' has too many parameters.", f"Write {_DUO}.")
        share = _number(text, arguments[0], _DUO, 0.0, 1.0) if arguments else DUO_SHARE
        whole = [whole_number(text, value, _DUO, low) for value, low in zip(arguments[1:], (1, 0), strict=False)]
        return Duo(share, *whole)
    return parse_form(text)


def _number(text: str, value: str, syntax: str, low: float, high: float | None) -> float:
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"'{value}' in '{text}' is not a number.", f"Write {syntax}.") from None
    if not low <= number <= (float("inf") if high is None else high):
        bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UsageError(f"'{value}' in '{text}' must be {bounds}.", f"Write {syntax}.")
    return number
