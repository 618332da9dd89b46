"""The recipe: everything a compile is asked to do, as one validated, serializable value.

Flags and the Python API build one; ``recipe.yaml`` holds one. Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from effc.compiler.tasks import TASK_NAMES
from effc.errors import UsageError
from effc.passes.attention_settings import AttentionSection
from effc.passes.distill_settings import RecoverSection
from effc.passes.engine_settings import ENGINE_TARGETS, TORCH_TARGET, EngineSection
from effc.passes.low_rank_settings import LowRankSection, parse_low_rank
from effc.passes.positions_settings import PositionsSection
from effc.passes.prune_settings import PruneSection
from effc.passes.quantize_settings import CalibrationSection as CalibrationSection
from effc.passes.quantize_settings import QuantizationSection
from effc.suggest import did_you_mean

TARGETS = ("onnxruntime", *ENGINE_TARGETS, TORCH_TARGET)


class Section(BaseModel):
    """A part of the recipe. Frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which model."""

    path: str | None = Field(None, description="local directory, GGUF file or hub name")
    revision: str | None = Field(None, description="hub branch, tag or commit")
    task: str | None = Field(None, description="detected from the config when empty")
    trust_remote_code: bool = Field(False, description="run model code that the checkpoint brings along")

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        if value is not None and value not in TASK_NAMES:
            raise ValueError(f"'{value}' is not a task. {did_you_mean(value, TASK_NAMES)}")
        return value


class VerifySection(Section):
    """How quality is measured after the compile."""

    data: str | None = Field(None, description="text, .jsonl or .csv file; random tokens without it")
    samples: int = Field(16, ge=1, description="samples to compare")
    max_length: int = Field(512, ge=1, description="tokens per sample")


class BenchSection(Section):
    """How speed is measured after the compile."""

    enabled: bool = Field(True, description="measure against the dense twin on every compile")
    lengths: tuple[int, ...] = Field((), description="tokens per sequence; chosen from the model's maximum when empty")
    batch: int = Field(1, ge=1, description="sequences per run")
    rounds: int = Field(3, ge=1, description="A B rounds per length")
    decode: bool = Field(True, description="also measure what a token costs, of models that write text")

    @field_validator("lengths")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(length < 1 for length in value):
            raise ValueError("lengths must be at least 1")
        return value


class GenerationSection(Section):
    """Whether a causal language model also learns to write text."""

    enabled: bool = Field(True, description="make the graph that effc.load(...).generate() runs")


class CheckpointSection(Section):
    """Whether the model is also written as transformers reads it."""

    enabled: bool = Field(False, description="write OUT/checkpoint, to train or use without ONNX")


class RequirementSection(Section):
    """What the result must reach, or the exit code is 1."""

    min_speedup: float | None = Field(None, gt=0, description="at the longest measured length")
    min_decode_speedup: float | None = Field(
        None, gt=0, description="per token written, at the longest measured length"
    )
    max_quality_drop: float | None = Field(None, ge=0, description="see the quality metric of verify")


def _shorthand(key: str) -> Any:
    """Let ``attention: local:256`` stand for ``attention: {pattern: local:256}``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Recipe(Section):
    """A whole recipe; ``Recipe()`` has every default."""

    version: Literal[1] = 1
    model: Annotated[ModelSection, _shorthand("path")] = ModelSection()
    attention: Annotated[AttentionSection, _shorthand("pattern")] = AttentionSection()
    positions: PositionsSection = PositionsSection()
    prune: PruneSection = ()
    low_rank: Annotated[LowRankSection | None, BeforeValidator(parse_low_rank)] = None
    recover: RecoverSection = RecoverSection()
    quantization: Annotated[QuantizationSection, _shorthand("mode")] = QuantizationSection()
    target: str = Field("onnxruntime", description="what the artifact runs on")
    engine: EngineSection = EngineSection()
    generation: GenerationSection = GenerationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    verify: VerifySection = VerifySection()
    bench: BenchSection = BenchSection()
    require: RequirementSection = RequirementSection()

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str) -> str:
        if value not in TARGETS:
            raise ValueError(f"'{value}' is not a target. {did_you_mean(value, TARGETS)}")
        return value

    def to_yaml(self) -> str:
        """The recipe with every default spelled out; reading it back gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def build_recipe(values: Mapping[str, Any], *, origin: str = "the recipe") -> Recipe:
    """Validate plain values (from YAML, flags or keyword arguments).

    Raises:
        UsageError: naming the key, what is wrong with it and, for an unknown key, the nearest known one.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(*_explain(error, origin)) from None


def default_output(recipe: Recipe) -> Path:
    """``<model name>.effc`` in the working directory."""
    return Path(f"{Path(recipe.model.path or 'model').resolve().name}.effc")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe file into plain values, for :func:`build_recipe` or :func:`merge`.

    Raises:
        UsageError: if the file is missing, is not YAML or is not a mapping.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no recipe at '{path}'.", "`effc recipe show` prints one to start from.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe '{path}' cannot be read: {error}.", "Check the path.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe '{path}' is not valid YAML: {error}.", "Correct the line it names.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"The recipe '{path}' is not a mapping.", "`effc recipe show` prints the expected shape.")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` on top, section by section; shorthands on either side are understood."""
    shorthand = {"model": "path", "attention": "pattern", "quantization": "mode", "recover": "budget"}
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if key in shorthand:
            value = {shorthand[key]: value} if isinstance(value, str) else value
            below = {shorthand[key]: below} if isinstance(below, str) else below
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _explain(error: ValidationError, origin: str) -> tuple[str, str]:
    problems, remedy = [], "`effc recipe show` prints every key with its default."
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            problems.append(f"'{where}' is not a recipe key.")
            remedy = did_you_mean(str(detail["loc"][-1]), _keys_beside(detail["loc"]))
        else:
            text = detail["msg"].removeprefix("Value error, ").rstrip(".")
            problems.append(f"'{where}' is not valid: {text}." if where else f"{text}.")
    return f"In {origin}: {' '.join(problems)}", remedy


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        section = next(_sections(section.model_fields[part].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type speaks of, itself or inside: ``Section | None``, ``tuple[Section, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
