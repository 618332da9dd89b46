"""Find the files of the model to compile: a directory, a GGUF file or a hub name. Imports no transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from effc.compiler.checkpoint import CONFIG_FILE, check_whole, read_json, weight_files
from effc.compiler.hub import download, is_hub_name
from effc.compiler.recipe import ModelSection
from effc.errors import SourceModelError, UsageError

Kind = Literal["directory", "gguf", "hub"]


@dataclass(frozen=True)
class Found:
    """The files of a model.

    Attributes:
        kind: where it comes from.
        path: the directory, or the GGUF file.
        revision: the commit of a hub model.
        facts: the raw config.json; empty for a GGUF file.
        files: what holds the weights.
    """

    kind: Kind
    path: Path
    revision: str | None
    facts: dict[str, Any]
    files: tuple[Path, ...]


def find(spec: ModelSection) -> Found:
    """Find the model's files and check what can be checked without transformers, whose import takes seconds.

    Raises:
        UsageError: if no model is named, or a revision is given for a local one.
        SourceModelError: if there is no such model, files are missing, or it is of a kind that effc does not read.
    """
    if not spec.path:
        raise UsageError("No model is named.", "Give a local directory, a GGUF file or a hub name.")
    kind, path, revision = _find(spec)
    if spec.revision and kind != "hub":
        raise UsageError(f"'{spec.path}' is local and has no revisions.", "Leave --revision out.")
    if kind == "gguf":
        return Found(kind, path, None, {}, (path,))
    facts = _checked_config(path)
    files = weight_files(path)
    check_whole(files)
    return Found(kind, path, revision, facts, files)


def _find(spec: ModelSection) -> tuple[Kind, Path, str | None]:
    """Where the model is: kind, path and, for the hub, the commit."""
    assert spec.path
    path = Path(spec.path).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise SourceModelError(
            f"'{spec.path}' cannot be read: {error}.", "Check the path and its permissions."
        ) from None
    if not exists:
        if is_hub_name(spec.path):
            directory, commit = download(spec.path, spec.revision)
            if not (directory / CONFIG_FILE).is_file():
                raise SourceModelError(
                    f"The hub model '{spec.path}' has no config.json, so it is no transformers checkpoint.",
                    "If it holds GGUF files, download one and give its path.",
                )
            return "hub", directory, commit
        raise SourceModelError(
            f"There is no file or directory '{spec.path}'.",
            "Give the path of a model directory or a GGUF file, or a hub name such as owner/name.",
        )
    path = path.resolve()
    if path.is_file():
        if _is_gguf(path):
            return "gguf", path, None
        raise SourceModelError(
            f"'{spec.path}' is a file, but not a GGUF file.",
            "Give the directory that holds the model's config.json, or a .gguf file.",
        )
    if not (path / CONFIG_FILE).is_file():
        return "gguf", _only_gguf(path), None
    return "directory", path, None


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise SourceModelError(f"'{path}' cannot be read: {error}.", "Check its permissions.") from None


def _only_gguf(directory: Path) -> Path:
    """The one GGUF file of a directory without a config."""
    try:
        found = sorted(directory.glob("*.gguf"))
    except OSError as error:
        raise SourceModelError(f"'{directory}' cannot be read: {error}.", "Check its permissions.") from None
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise SourceModelError(f"'{directory}' holds several GGUF files: {names}.", "Give the path of one of them.")
    nested = sorted(child.parent.name for child in directory.glob(f"*/{CONFIG_FILE}"))[:3]
    hint = (
        f"Its subdirectory '{nested[0]}' has one; did you mean that?"
        if nested
        else ("Give the directory that save_pretrained wrote or the hub snapshot, or a .gguf file.")
    )
    raise SourceModelError(f"'{directory}' is not a model directory: it has no config.json.", hint)


def _checked_config(directory: Path) -> dict[str, Any]:
    """The raw config.json, checked for what transformers reports badly or not at all."""
    raw = read_json(directory / CONFIG_FILE)
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise SourceModelError(
            f"The checkpoint '{directory}' is already quantized (method '{method}'), and effc quantizes models itself.",
            "Compile the full-precision checkpoint it was made from.",
        )
    if "model_type" not in raw and "auto_map" not in raw:
        raise SourceModelError(
            f"'{directory / CONFIG_FILE}' has no model_type, so it does not describe a transformers model.",
            "Give the directory of a transformers checkpoint.",
        )
    return raw
