"""What can be asked of low-rank factorization: the ``low_rank`` section of the recipe."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LowRankSection(BaseModel):
    """How linear layers become two thinner ones. Exactly one of ``parameters``, ``rank`` and ``energy`` is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: float | None = Field(None, gt=0, lt=1, description="share of the layers' weights that may stay")
    rank: int | None = Field(None, ge=1, description="rank of every layer")
    energy: float | None = Field(None, gt=0, lt=1, description="share of the squared output that every layer keeps")
    criterion: Literal["auto", "plain", "whitened"] = Field(
        "auto",
        description="plain: of weights; whitened: of outputs on calibration data; auto: by whether there is data",
    )
    include: tuple[str, ...] = Field((), description="globs of linear layers; all in transformer layers when empty")
    exclude: tuple[str, ...] = Field((), description="globs of linear layers that stay whole")
    data: str | None = Field(None, description="calibration texts; those of quantization or verify when empty")
    samples: int = Field(32, ge=1, description="calibration texts that are read")
    max_length: int = Field(256, ge=1, description="tokens per calibration text")

    @model_validator(mode="after")
    def _one_budget(self) -> LowRankSection:
        given = [name for name in ("parameters", "rank", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} are given" if given else "no budget is given"
            raise ValueError(f"{problem}; write one of 0.5 (parameters), rank:64 and energy:0.95")
        return self

    @property
    def text(self) -> str:
        """The short form, as it is written on the command line."""
        if self.parameters is not None:
            return f"{self.parameters:g}"
        return f"rank:{self.rank}" if self.rank is not None else f"energy:{self.energy:g}"


def parse_low_rank(value: Any) -> Any:
    """A section from its text: ``0.5``, ``parameters:0.5``, ``rank:64``, ``energy:0.95``.

    Raises:
        ValueError: if the text has another form.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return value
    match = re.fullmatch(r"(?:(parameters|rank|energy):)?([0-9.eE+-]+)", str(value).strip())
    try:
        number = float(match[2]) if match else None
    except ValueError:
        number = None
    if match is None or number is None:
        raise ValueError(f"'{value}' is no low-rank budget. Write 0.5 (share of parameters), rank:64 or energy:0.95.")
    kind = match[1] or "parameters"
    if kind == "rank":
        if number != int(number) or number < 1:
            raise ValueError(f"'{value}': a rank is a whole number of at least 1, as in rank:64")
        return {"rank": int(number)}
    if not 0 < number < 1:
        raise ValueError(f"'{value}' must lie between 0 and 1: 0.5 keeps half. A rank is written rank:64.")
    return {kind: number}
