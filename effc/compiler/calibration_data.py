"""Batches that activations are calibrated on: from the recipe's data, or from what a caller of the API hands over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.data import Sample, padding_tokenizer, read_samples, samples_of, tokenize
from effc.compiler.inputs import graph_inputs, input_names
from effc.compiler.recipe import Recipe
from effc.compiler.source import SourceModel
from effc.errors import DataError

Batch = dict[str, NDArray[Any]]


class CalibrationData:
    """Texts or finished inputs, read once and early, so that a mistake in them shows early.

    Args:
        recipe: names a file or data set, how much of it is taken, and whether it is packed.
        given: texts, rows or mappings from input names to arrays, in place of the recipe's data.

    Raises:
        DataError: if nothing can be read.
    """

    def __init__(self, recipe: Recipe, given: Iterable[Any] | None = None):
        self._settings = recipe.quantization.calibration
        self._samples: list[Sample] = []
        self._inputs: list[Mapping[str, Any]] = []
        # Packing joins texts, so that more of them are needed than there will be samples.
        count = self._settings.samples * (8 if self._settings.packed else 1)
        if given is not None:
            items = list(islice(given, count))
            if items and all(_is_inputs(item) for item in items):
                self._inputs = items
            else:
                self._samples = samples_of(items)
        elif self._settings.data is not None:
            self._samples = read_samples(self._settings.data, count, self._settings.seed)

    def batches(self, source: SourceModel) -> list[Batch] | None:
        """Inputs of the model, int64 ``[batch, length]`` for texts; None where there is no data.

        Raises:
            DataError: if the data does not fit the model; says which input and how.
        """
        if not self._samples and not self._inputs:
            return None
        length = min(self._settings.max_length, source.max_length or self._settings.max_length)
        if self._inputs:
            found = [{name: np.asarray(value) for name, value in batch.items()} for batch in self._inputs]
        elif self._settings.packed:
            found = list(islice(packed(self._samples, source, length), self._settings.samples))
        else:
            found = list(tokenize(self._samples, source.processor, length, input_names=input_names(source)))
        for number, batch in enumerate(found, 1):
            _check(batch, number, source)
        return found


def packed(samples: Sequence[Sample], source: SourceModel, length: int) -> Iterator[Batch]:
    """Samples ``[1, length]`` without padding, cut from the texts joined by the token that ends a text.

    Raises:
        DataError: if there is no tokenizer, or the texts together are shorter than one sample.
    """
    tokenizer = padding_tokenizer(source.processor)
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
    names, waiting, made = input_names(source), list[int](), 0
    for sample in samples:
        waiting += [*tokenizer(sample.text, add_special_tokens=False)["input_ids"], *ends[:1]]
        while len(waiting) >= length:
            made += 1
            ids = np.array([waiting[:length]], np.int64)
            waiting = waiting[length:]
            fixed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            if missing := [name for name in names if name not in fixed]:
                raise DataError(
                    f"Packed texts do not give the model its input '{missing[0]}'.", "Leave calibration.packed out."
                )
            yield {name: fixed[name] for name in names}
    if not made:
        raise DataError(
            f"The calibration texts hold {len(waiting)} tokens together, less than one packed sample of {length}.",
            "Give more text, or a smaller calibration.max_length.",
        )


def _is_inputs(item: Any) -> bool:
    """Whether an item maps names to arrays, not to texts and labels."""
    return isinstance(item, Mapping) and all(hasattr(value, "shape") for value in item.values()) and bool(item)


def _check(batch: Mapping[str, NDArray[Any]], number: int, source: SourceModel) -> None:
    """Check one batch against the inputs of the model.

    Raises:
        DataError: naming the batch, the input and what is wrong with it.
    """
    wanted = {record.name: record for record in graph_inputs(source)}
    if missing := [name for name in wanted if name not in batch]:
        raise DataError(
            f"Calibration batch {number} lacks the model input '{missing[0]}'; it has {', '.join(map(repr, batch))}.",
            f"Give every batch all of: {', '.join(wanted)}.",
        )
    for name, record in wanted.items():
        array = batch[name]
        if array.ndim != len(record.shape) or array.dtype != np.dtype(record.dtype):
            raise DataError(
                f"'{name}' of calibration batch {number} is {array.dtype} {list(array.shape)}, and the model takes "
                f"{record.dtype} {record.shape}.",
                "Convert it; texts are tokenized for you.",
            )
        fixed = [(size, want) for size, want in zip(array.shape, record.shape, strict=True) if isinstance(want, int)]
        if any(size != want for size, want in fixed):
            raise DataError(
                f"'{name}' of calibration batch {number} is {list(array.shape)}, and the model takes {record.shape}.",
                "Give inputs as the model's processor makes them.",
            )
        if record.maximum is not None and array.size and not 0 <= array.min() <= array.max() <= record.maximum:
            raise DataError(
                f"'{name}' of calibration batch {number} holds values up to {array.max()}, and the model knows 0 to "
                f"{record.maximum}.",
                "Use the tokenizer of this very model.",
            )
        limit = source.max_length
        if limit is not None and "sequence" in record.shape and array.shape[1] > limit:
            raise DataError(
                f"'{name}' of calibration batch {number} has {array.shape[1]} tokens, and the model takes {limit}.",
                "Cut it to that length.",
            )
