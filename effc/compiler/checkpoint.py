"""The files of a checkpoint directory: which hold the weights, whether they are whole, and what they hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from effc.errors import SourceModelError

CONFIG_FILE = "config.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
STRUCTURE_FILE = "effc_structure.json"
"""What the config of a pruned checkpoint cannot say; see ``effc.compiler.structure``."""
_FOREIGN_WEIGHTS = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "consolidated.safetensors": "Mistral's own",
    "consolidated.00.pth": "Llama's own",
    "adapter_model.safetensors": "adapter (LoRA)",
    "model.onnx": "ONNX",
}


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that transformers will read the weights from: one file, or an index and its shards.

    Raises:
        SourceModelError: if there are none, if a shard is missing, or if the index cannot be read.
    """
    for name in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            return (path, *_shards(path)) if name.endswith(".index.json") else (path,)
    foreign = [f"{name} ({form} format)" for name, form in _FOREIGN_WEIGHTS.items() if (directory / name).is_file()]
    found = f" It holds {', '.join(foreign)}, which effc does not read." if foreign else ""
    raise SourceModelError(
        f"There are no weights in '{directory}': none of {', '.join(WEIGHT_FILES)}.{found}",
        "Download the checkpoint in full, or save it with save_pretrained.",
    )


def has_structure(directory: Path) -> bool:
    """Whether a checkpoint is one that effc pruned to shapes which transformers cannot build alone."""
    return (directory / STRUCTURE_FILE).is_file()


def check_whole(files: Iterable[Path]) -> None:
    """Read the headers of the safetensors among ``files``, which tell whether a file is truncated or damaged.

    Raises:
        SourceModelError: naming the file that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    for path in files:
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> SourceModelError:
    """The error for a weights file that cannot be read."""
    size = path.stat().st_size if path.exists() else 0
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return SourceModelError(
        f"The weights file '{path}' ({size:,} bytes) is damaged or incomplete: {reason}.",
        "Download or copy it again; an interrupted download is the usual cause.",
    )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping a JSON file of a checkpoint holds.

    Raises:
        SourceModelError: if it is not readable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceModelError(f"'{path}' is not readable JSON: {error}.", "Download or copy it again.") from None
    if not isinstance(value, dict):
        raise SourceModelError(f"'{path}' does not hold a JSON object.", "Download or copy it again.")
    return value


def fingerprint(files: Iterable[Path], facts: Mapping[str, Any]) -> str:
    """SHA-256 over the contents of ``files`` and over ``facts`` (JSON values), in hex.

    Always hashes the files themselves, about 1 GB/s: remembering hashes by size and time stamp saves little and can be
    wrong.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in files:
        try:
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise SourceModelError(f"'{path}' cannot be read: {error}.", "Check its permissions.") from None
    return digest.hexdigest()


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceModelError(f"The weights index '{index}' names no files.", "Download or copy it again.")
    shards = [index.parent / str(name) for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise SourceModelError(
            f"The weights in '{index.parent}' are incomplete: {', '.join(missing)} of {len(shards)} files missing.",
            "Download the checkpoint in full.",
        )
    return shards
