"""What can be asked of pruning: the ``prune`` list of the recipe, and the short text that stands for one entry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from effc.suggest import did_you_mean

Method = Literal["vocab", "layers", "heads", "ffn", "unstructured", "2:4"]
Criterion = Literal["auto", "magnitude", "activation", "taylor", "wanda", "sparsegpt", "similarity", "output"]
METHODS: tuple[str, ...] = get_args(Method)
"""In the order in which they run; low-rank factorization comes between ``ffn`` and ``unstructured``."""
CRITERIA: dict[str, tuple[str, ...]] = {
    "vocab": ("auto",),
    "layers": ("auto", "similarity", "output"),
    "heads": ("auto", "magnitude", "activation", "taylor"),
    "ffn": ("auto", "magnitude", "activation", "taylor"),
    "unstructured": ("auto", "magnitude", "wanda", "sparsegpt"),
    "2:4": ("auto", "magnitude", "wanda", "sparsegpt"),
}
MASKING: tuple[str, ...] = ("unstructured", "2:4")
"""Methods that set weights to zero and leave shapes as they are."""
_SHORT = ("magnitude", "wanda", "sparsegpt")
_FORMS = "2:4, magnitude:0.5, wanda:0.5, sparsegpt:0.5, heads:0.25, ffn:0.25, layers:0.25 or vocab:corpus.txt"
# What YAML 1.1 makes of an unquoted 2:4, a number to the base of 60.
_SEXAGESIMAL = 124


class PruneStep(BaseModel):
    """One kind of pruning.

    ``auto`` is, with calibration data, ``sparsegpt`` for masks and ``taylor`` for heads and FFN neurons, without it
    ``magnitude``; for layers it is ``similarity``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field(description="2:4, unstructured, heads, ffn, layers or vocab")
    share: float | None = Field(None, gt=0, lt=1, description="how much goes; 2:4 and vocab decide that themselves")
    criterion: Criterion = Field("auto", description="how what goes is chosen")
    corpus: str | None = Field(None, description="vocab: file with texts, whose tokens stay")
    include: tuple[str, ...] = Field((), description="globs of modules; all that fit when empty")
    exclude: tuple[str, ...] = Field((), description="globs of modules that stay as they are")
    uniform: bool = Field(True, description="heads, ffn: the same share of every layer, so that the config can say it")
    reconstruct: bool = Field(True, description="heads, ffn: fit what stays to the outputs, where there is data")
    data: str | None = Field(None, description="calibration texts; those of quantization or verify when empty")
    samples: int = Field(32, ge=1, description="calibration texts that are read")
    max_length: int = Field(256, ge=1, description="tokens per calibration text")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """``magnitude``, ``wanda`` and ``sparsegpt`` as a method mean the unstructured form with that criterion."""
        if not isinstance(value, dict):
            return value
        method = value.get("method")
        if method == _SEXAGESIMAL:
            return value | {"method": "2:4"}
        if method in _SHORT:
            return {"criterion": method} | value | {"method": "unstructured"}
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"'{method}' is no way of pruning. {did_you_mean(method, (*METHODS, *_SHORT))}")
        return value

    @model_validator(mode="after")
    def _complete(self) -> PruneStep:
        if self.criterion not in CRITERIA[self.method]:
            known = CRITERIA[self.method]
            raise ValueError(f"'{self.criterion}' is no criterion of {self.method}. Known: {', '.join(known)}.")
        if self.method in ("2:4", "vocab") and self.share is not None:
            reason = "removes half of the weights" if self.method == "2:4" else "removes what the corpus never uses"
            raise ValueError(f"{self.method} {reason}, so it takes no share")
        if self.method not in ("2:4", "vocab") and self.share is None:
            raise ValueError(f"{self.method} needs a share, for example {self.method}:0.25")
        if (self.method == "vocab") != (self.corpus is not None):
            problem = "vocab needs a corpus" if self.method == "vocab" else f"{self.method} takes no corpus"
            raise ValueError(f"{problem}; write vocab:corpus.txt")
        return self

    @property
    def text(self) -> str:
        """The short form, as it is written on the command line."""
        if self.method == "vocab":
            return f"vocab:{self.corpus}"
        criterion = "" if self.criterion == "auto" else self.criterion
        if self.method == "unstructured":
            return f"{criterion or 'unstructured'}:{self.share:g}"
        head = self.method if self.share is None else f"{self.method}:{self.share:g}"
        return f"{head}:{criterion}" if criterion else head


def parse_step(value: Any) -> Any:
    """One entry from its text: ``METHOD:SHARE[:CRITERION]``, ``2:4[:CRITERION]`` or ``vocab:FILE``.

    Raises:
        ValueError: if the text has another form.
    """
    if value == _SEXAGESIMAL:
        return {"method": "2:4"}
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"2:4(?::(.+))?", value):
        return {"method": "2:4"} | ({"criterion": match[1]} if match[1] else {})
    method, _, rest = value.partition(":")
    if method == "vocab":
        return {"method": method, "corpus": rest or None}
    if method not in (*METHODS, *_SHORT):
        match_text = did_you_mean(method, (*METHODS, *_SHORT))
        raise ValueError(f"'{value}' is no way of pruning. {match_text} Write {_FORMS}.")
    share, _, criterion = rest.partition(":")
    try:
        number = float(share) if share else None
    except ValueError:
        raise ValueError(
            f"'{share}' in '{value}' is no share. Write a number between 0 and 1, as in {_FORMS}."
        ) from None
    if number is not None and not 0 < number < 1:
        raise ValueError(f"the share in '{value}' must lie between 0 and 1: 0.25 removes a quarter")
    return {"method": method, "share": number} | ({"criterion": criterion} if criterion else {})


def _as_list(value: Any) -> Any:
    if value is None:
        return ()
    return [value] if isinstance(value, (str, int, dict, PruneStep)) else value


def _fit_together(steps: Sequence[PruneStep]) -> tuple[PruneStep, ...]:
    """Steps that contradict each other are refused; the others come out in the order in which they run."""
    for method in METHODS:
        same = [step for step in steps if step.method == method]
        if len(same) > 1 and (method in ("vocab", "layers") or any(not step.include for step in same)):
            hint = "Give one." if method in ("vocab", "layers") else "Say which modules each is for, with include."
            raise ValueError(f"{method} is asked for {len(same)} times: {', '.join(s.text for s in same)}. {hint}")
    masking = [step for step in steps if step.method in MASKING]
    if len({step.method for step in masking}) > 1 and any(not step.include for step in masking):
        raise ValueError("2:4 and unstructured zeros in the same weights spoil each other's form; ask for one of them")
    return tuple(sorted(steps, key=lambda step: METHODS.index(step.method)))


_Step = Annotated[PruneStep, BeforeValidator(parse_step)]
PruneSection = Annotated[
    tuple[Annotated[PruneStep, BeforeValidator(parse_step)], ...],
    BeforeValidator(_as_list),
    AfterValidator(_fit_together),
]
"""The ``prune`` list of a recipe: maps or short texts; one alone needs no list."""
