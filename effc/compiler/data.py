"""Texts from a user's file, as batches that a model takes: for verification and for calibration."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from effc.compiler.data_files import FORMATS as FORMATS
from effc.compiler.data_files import read_rows
from effc.compiler.inputs import ragged_inputs
from effc.errors import DataError

if TYPE_CHECKING:
    from effc.compiler.source import SourceModel

Label = int | str | tuple[int | str, ...]

# Column names in the order of preference; the first that a row has is taken.
TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "premise", "question")
PAIR_COLUMNS = ("text_pair", "sentence2", "hypothesis", "context")
LABEL_COLUMNS = ("label", "labels", "ner_tags", "tags")
WORD_COLUMNS = ("tokens", "words")


@dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
        text: the text; of a sample given as words, the words joined by spaces.
        label: a class for the text, or one for each word; a class is its number or its name.
        pair: the second text, for models that compare two.
        words: the words, where the file gives them apart.
    """

    text: str
    label: Label | None = None
    pair: str | None = None
    words: tuple[str, ...] | None = None


def read_samples(path: str | Path, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Read texts, and labels where there are any, from a file.

    Formats: ``.txt`` (one text a line), ``.jsonl`` (an object a line), ``.json`` (a list of objects), ``.csv`` and
    ``.tsv`` (with a header), a directory written by ``datasets``' ``save_to_disk``, or ``hf:NAME``, a data set of the
    hub (``hf:NAME@CONFIG:SPLIT``). The columns are found by name, see ``TEXT_COLUMNS`` and its neighbours. Rows with an
    empty text are left out. Rows are read one by one, so that a file may be larger than memory where there is a limit.

    Args:
        limit: how many to take at most: a random choice, in file order, because files are often sorted by label.
        seed: the same seed takes the same samples.

    Raises:
        DataError: if the file is missing, empty, not readable or without texts.
    """
    samples = (
        sample for number, row in enumerate(read_rows(path, seed), 1) if _has_text(sample := _sample(row, path, number))
    )
    chosen = list(samples) if limit is None else _drawn(samples, limit, seed)
    if not chosen:
        raise DataError(f"The data file '{path}' holds no texts.", "Give a file with at least one text.")
    return chosen


def samples_of(items: Iterable[Any], limit: int | None = None) -> list[Sample]:
    """The first ``limit`` texts of any iterable of texts, :class:`Sample` objects or rows such as ``{"text": "..."}``.

    Raises:
        DataError: if there is none, or an item is none of these.
    """
    rows = (
        item if isinstance(item, Sample) else _sample(item, "the iterable", number)
        for number, item in enumerate(items, 1)
    )
    chosen = list(islice((sample for sample in rows if _has_text(sample)), limit))
    if not chosen:
        raise DataError("The iterable holds no texts.", "Give at least one text.")
    return chosen


def _has_text(sample: Sample) -> bool:
    return bool(sample.text.strip())


def _drawn(samples: Iterable[Sample], count: int, seed: int) -> list[Sample]:
    """A random choice in order, of which no more than ``count`` are in memory (Vitter's algorithm R)."""
    generator, kept = random.Random(seed), []
    for place, sample in enumerate(samples):
        if place < count:
            kept.append((place, sample))
        elif (other := generator.randrange(place + 1)) < count:
            kept[other] = (place, sample)
    return [sample for _, sample in sorted(kept, key=lambda item: item[0])]


def tokenize(
    samples: Sequence[Sample],
    processor: Any | None,
    max_length: int | None,
    batch_size: int = 8,
    return_tensors: Literal["np", "pt"] = "np",
    input_names: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Batches in the order of ``samples``, truncated to ``max_length`` and padded on the right to the batch's longest.

    Padding is on the right whatever the tokenizer says, so that positions count from the first real token.

    Args:
        processor: the model's tokenizer.
        max_length: tokens per sample at most; None for no limit.
        return_tensors: ``np`` for numpy arrays, ``pt`` for torch tensors; int64 ``[batch, length]``.
        input_names: the inputs to return; those that the tokenizer names if None. Segments that the tokenizer does
            not produce are zero.

    Raises:
        DataError: if there is no tokenizer, or it is none for text.
    """
    tokenizer = padding_tokenizer(processor)
    for start in range(0, len(samples), batch_size):
        encoding = encode(samples[start : start + batch_size], tokenizer, max_length)
        batch = {name: np.asarray(value, dtype=np.int64) for name, value in encoding.items()}
        names = tuple(input_names) if input_names is not None else tuple(batch)
        if "token_type_ids" in names:
            batch.setdefault("token_type_ids", np.zeros_like(batch["input_ids"]))
        missing = [name for name in names if name not in batch]
        if missing:
            raise DataError(
                f"The model needs the input '{missing[0]}', which its tokenizer does not produce from text.",
                "Leave the data out to use random inputs.",
            )
        batch = {name: batch[name] for name in names}
        yield batch if return_tensors == "np" else _as_torch(batch)


def random_batches(
    source: SourceModel, count: int, length: int, batch_size: int = 8, seed: int = 0
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """``count`` random samples in batches, for where there is no data. Each batch holds texts of different lengths.

    Images and audio have one size, so ``length`` has no effect on them.
    """
    generator = random.Random(seed)
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        lengths = [length, *(generator.randint(max(1, length // 2), length) for _ in range(size - 1))]
        inputs = ragged_inputs(source, lengths, seed=seed + start)
        yield {name: value.numpy() for name, value in inputs.items()}


def padding_tokenizer(processor: Any | None) -> Any:
    """A tokenizer that can pad. Many causal LMs define no padding token; the mask hides whatever is used instead.

    Raises:
        DataError: if there is no tokenizer.
    """
    if processor is None or not hasattr(processor, "pad"):
        raise DataError(
            "The model has no tokenizer, so texts cannot be turned into its inputs.",
            "Put the tokenizer's files beside the model, or leave the data out to use random inputs.",
        )
    if not hasattr(processor, "pad_token"):
        raise DataError(
            "Data files hold text, and this model reads images or audio.", "Leave the data out to use random inputs."
        )
    if processor.pad_token is not None:
        return processor
    tokenizer = copy.deepcopy(processor)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def encode(samples: Sequence[Sample], tokenizer: Any, max_length: int | None) -> Any:
    """One padded batch as the tokenizer returns it; ``word_ids(i)`` of it tells which word a token belongs to."""
    words = samples[0].words is not None
    texts = [list(sample.words or ()) if words else sample.text for sample in samples]
    pairs = [sample.pair or "" for sample in samples] if any(sample.pair is not None for sample in samples) else None
    return tokenizer(
        texts,
        pairs,
        padding=True,
        padding_side="right",
        truncation=max_length is not None,
        max_length=max_length,
        is_split_into_words=words,
        return_tensors="np",
    )


def class_ids(samples: Sequence[Sample], id2label: Mapping[int, str]) -> list[int]:
    """The label of each sample as the model numbers it.

    Raises:
        DataError: if a sample has no label, or one that the model does not know.
    """
    known = _label_numbers(id2label)
    return [_class_id(sample.label, known, id2label) for sample in samples]


def word_class_ids(samples: Sequence[Sample], id2label: Mapping[int, str]) -> list[list[int]]:
    """The labels of each sample's words as the model numbers them.

    Raises:
        DataError: if a sample has no words, not one label for each, or a label that the model does not know.
    """
    known = _label_numbers(id2label)
    result = []
    for number, sample in enumerate(samples, 1):
        labels = sample.label if isinstance(sample.label, tuple) else ()
        if sample.words is None or len(labels) != len(sample.words):
            raise DataError(
                f"Sample {number} has {len(sample.words or ())} words and {len(labels)} labels.",
                f"Give each word one label, in columns such as '{WORD_COLUMNS[0]}' and '{LABEL_COLUMNS[1]}'.",
            )
        result.append([_class_id(label, known, id2label) for label in labels])
    return result


def _label_numbers(id2label: Mapping[int, str]) -> dict[str, int]:
    return {str(name).casefold(): int(number) for number, name in id2label.items()}


def _class_id(label: Label | None, known: Mapping[str, int], id2label: Mapping[int, str]) -> int:
    if isinstance(label, str):
        number = known.get(label.casefold())
        if number is None and label.lstrip("-").isdigit():
            number = int(label)
    else:
        number = label if isinstance(label, int) else None
    if label is None:
        raise DataError("Some samples have a label and others have none.", "Label all of them, or none.")
    if number is None or number not in id2label:
        names = ", ".join(f"{number} ({name})" for number, name in list(id2label.items())[:10])
        raise DataError(
            f"The label '{label}' in the data is none that the model knows.",
            f"Use the model's labels ({names}), or remove the labels.",
        )
    return number


def _sample(row: Any, path: str | Path, number: int) -> Sample:
    if isinstance(row, str):
        return Sample(row)
    if not isinstance(row, dict):
        raise DataError(f"Row {number} of '{path}' is no object but {type(row).__name__}.", 'Write {"text": "..."}.')
    label = _label(_first(row, LABEL_COLUMNS))
    words = _first(row, WORD_COLUMNS)
    if isinstance(words, list):
        return Sample(" ".join(map(str, words)), label, words=tuple(map(str, words)))
    if not any(name in row for name in TEXT_COLUMNS):
        raise DataError(
            f"Row {number} of '{path}' has no text: its columns are {', '.join(map(repr, row)) or 'none'}.",
            f"Name the column with the text one of {', '.join(TEXT_COLUMNS)}.",
        )
    text, pair = _first(row, TEXT_COLUMNS), _first(row, PAIR_COLUMNS)
    for value in (text, pair):
        if not isinstance(value, str | None):
            raise DataError(
                f"The text in row {number} of '{path}' is {type(value).__name__}, not text.", "Put it in quotes."
            )
    return Sample(text or "", label, pair)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _label(value: Any) -> Label | None:
    if isinstance(value, list):
        return tuple(item if isinstance(item, int) else str(item) for item in value)
    if value is None or isinstance(value, int):
        return value
    return str(value) if value != "" else None


def _as_torch(batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in batch.items()}
