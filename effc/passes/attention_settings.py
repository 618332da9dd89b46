"""What can be asked of the attention rewrite: the ``attention`` section of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from effc.plugins.forms.registry import parse_form


class AttentionSection(BaseModel):
    """How attention is rewritten."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = Field("dense", description="pattern of every layer, e.g. local:256")
    exclude: tuple[str, ...] = Field((), description="globs of attention modules that stay as they are")
    allow_partial: bool = Field(False, description="exit code 0 even if some layers could not be rewritten")

    @field_validator("pattern")
    @classmethod
    def _canonical_form(cls, value: str) -> str:
        return str(parse_form(value))
