"""The files by which sentence-transformers describes what becomes of a model's hidden states.

They lie beside a checkpoint: ``modules.json`` lists the modules in order (transformer, pooling, normalization), each
with a folder of its own. An artifact keeps them, so that a server can give the embeddings that the model was made for.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from effc.errors import OutputError

MODULES_NAME = "modules.json"
_LENGTH_NAME = "sentence_bert_config.json"
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class SentenceModules:
    """What the files say.

    Attributes:
        pooling: ``mean``, ``cls``, ``max``, ``last``, or None if it is another or there are more modules than effc
            knows.
        normalize: vectors get length 1.
        max_length: tokens that the model was made for; None if that is not said.
    """

    pooling: str | None
    normalize: bool
    max_length: int | None


def copy_modules(source: Path, artifact: Path) -> None:
    """Copy the descriptions from a checkpoint's directory to an artifact, where there are any."""
    if not (source / MODULES_NAME).is_file():
        return
    names = [MODULES_NAME, _LENGTH_NAME]
    names += [f"{module}/config.json" for module in _folders(source) if module]
    for name in names:
        if (source / name).is_file():
            (artifact / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, artifact / name)


def read_modules(artifact: Path) -> SentenceModules | None:
    """What the descriptions in an artifact say, None if there are none.

    Raises:
        OutputError: if a file of them is damaged.
    """
    if not (artifact / MODULES_NAME).is_file():
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in _read(artifact / MODULES_NAME)]
    known = set(kinds) <= {"Transformer", "Pooling", "Normalize"}
    length = None
    if (artifact / _LENGTH_NAME).is_file():
        length = _read(artifact / _LENGTH_NAME).get("max_seq_length")
    pooling = None
    for kind, folder in zip(kinds, _folders(artifact), strict=True):
        if kind == "Pooling":
            pooling = _pooling(_read(artifact / folder / "config.json"))
    return SentenceModules(pooling if known else None, "Normalize" in kinds, length)


def _pooling(config: dict[str, Any]) -> str | None:
    chosen = [_POOLINGS.get(key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if not chosen and isinstance(config.get("pooling_mode"), str):
        chosen = [{"lasttoken": "last"}.get(config["pooling_mode"], config["pooling_mode"])]
    return chosen[0] if len(chosen) == 1 and chosen[0] in _POOLINGS.values() else None


def _folders(directory: Path) -> list[str]:
    """The modules' folders in order; one whose name leads elsewhere is taken for none."""
    folders = [str(module.get("path", "")) for module in _read(directory / MODULES_NAME)]
    return ["" if len(PurePosixPath(folder).parts) != 1 or folder in ("..", "/") else folder for folder in folders]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"'{path}' cannot be read: {error}.", "Compile the model again.") from None
