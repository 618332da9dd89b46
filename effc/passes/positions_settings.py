"""What can be asked of positions: the ``positions`` section of the recipe."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["auto", "interpolate", "tile", "rope-linear", "rope-dynamic", "rope-yarn", "rope-unscaled"]
METHODS: tuple[str, ...] = get_args(Method)


class PositionsSection(BaseModel):
    """How far positions reach, and how many rows of a position table are kept.

    ``interpolate`` and ``tile`` are for tables of absolute positions, the others for rotary embeddings; ``auto`` takes
    ``tile`` for tables, and for rotary embeddings ``rope-unscaled`` where no token sees further than the model was
    trained for, else ``rope-yarn``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: int | None = Field(None, ge=2, description="tokens to extend the model to, e.g. 4096")
    method: Method = Field("auto", description=f"how: {', '.join(METHODS)}")
    sparse: bool = Field(False, description="keep only the rows of the position table that the pattern needs")

    @model_validator(mode="after")
    def _method_needs_a_length(self) -> PositionsSection:
        if self.method != "auto" and self.max_length is None:
            raise ValueError(f"'{self.method}' says how to extend positions, but max_length does not say how far")
        return self
