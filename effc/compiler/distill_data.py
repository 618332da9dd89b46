"""What a student is trained on: texts or ready examples, split into those to train on and those held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from effc.compiler.data import Sample, class_ids, read_samples, tokenize
from effc.errors import DataError

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]
Data = str | Path | Iterable[Any]


@dataclass(frozen=True)
class Material:
    """Examples to train on and to hold out.

    Attributes:
        train, held_out: examples, indexable.
        collate: joins examples to a batch of tensors.
        digest: a hash of all examples in their order.
        name: the file they come from, or what else they are.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    collate: Collate
    digest: str
    name: str


class Examples(Dataset[Any]):
    """A sequence as torch's loaders take it."""

    def __init__(self, items: Sequence[Any]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def material_of(
    data: Data,
    *,
    held_out: int,
    seed: int,
    collate_texts: Collate,
    never: frozenset[Sample] = frozenset(),
) -> Material:
    """Read the data and split it.

    Args:
        data: a file (see :func:`effc.compiler.data.read_samples`), or any iterable of texts, :class:`Sample` objects
            or examples, mappings from an input's name to a tensor without a batch axis.
        held_out: examples not to train on; of few examples a tenth, at least one.
        seed: chooses them.
        collate_texts: joins :class:`Sample` objects.
        never: samples that are left out.

    Raises:
        DataError: if there are fewer than two examples, or they are of different kinds.
    """
    if isinstance(data, (str, Path)):
        items: list[Any] = list(read_samples(data))
        name = str(data)
    else:
        items = [Sample(item) if isinstance(item, str) else item for item in data]
        name = f"{len(items)} examples"
    texts = bool(items) and isinstance(items[0], Sample)
    if any(isinstance(item, Sample) != texts or not isinstance(item, (Sample, Mapping)) for item in items):
        raise DataError(
            "The data holds neither texts alone nor examples alone.",
            "Give texts, or mappings from the names of the model's inputs to tensors.",
        )
    if texts:
        # The same text twice could be trained on and held out.
        items = [item for item in dict.fromkeys(items) if item.text.strip() and item not in never]
    if len(items) < 2:
        raise DataError(
            f"{name} leaves {len(items)} examples to train on, and some have to be held out.", "Give more of them."
        )
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    count = min(held_out, max(1, len(items) // 10))
    chosen = sorted(order[:count])
    kept = set(chosen)
    return Material(
        train=[item for index, item in enumerate(items) if index not in kept],
        held_out=[items[index] for index in chosen],
        collate=collate_texts if texts else default_collate,
        digest=_digest(items),
        name=name,
    )


def text_collate(
    processor: Any | None, length: int | None, input_names: Sequence[str], id2label: Mapping[int, str] | None
) -> Collate:
    """Joins samples to the inputs of a model, with ``labels`` where classes are known and the samples have them."""

    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = next(tokenize(samples, processor, length, len(samples), "pt", input_names))
        if id2label is not None and all(isinstance(sample.label, (int, str)) for sample in samples):
            batch["labels"] = torch.tensor(class_ids(samples, id2label))
        return batch

    return collate


def _digest(items: Sequence[Any]) -> str:
    content = hashlib.sha256()
    for item in items:
        if isinstance(item, Sample):
            content.update(repr(item).encode())
            continue
        for key in sorted(item):
            value = torch.as_tensor(item[key])
            content.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            content.update(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
