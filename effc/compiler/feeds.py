"""Turn what a tokenizer gives into what a graph takes, and make up inputs for measuring.

Imports only numpy and effc's errors, because the benchmark's worker uses it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.suggest import did_you_mean

if TYPE_CHECKING:
    from effc.compiler.manifest import TensorRecord

# What tokenizers return beside a model's own inputs; dropped where the graph does not take it.
TOKENIZER_EXTRAS = frozenset(
    {
        "token_type_ids",
        "special_tokens_mask",
        "offset_mapping",
        "overflow_to_sample_mapping",
        "overflowing_tokens",
        "num_truncated_tokens",
        "length",
    }
)
# Masks may only be dropped if they hide nothing.
MASKS = frozenset({"attention_mask", "pixel_mask"})


@dataclass(frozen=True)
class TensorSpec:
    """One input of a graph.

    Attributes:
        dtype: numpy's name for the element type.
        shape: symbolic dimensions are text.
        maximum: largest value of an integer input, where bounded.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    maximum: int | None = None

    @classmethod
    def of_record(cls, record: TensorRecord) -> TensorSpec:
        """From what ``effc.json`` says, whose symbolic dimensions have the same name in every input they belong to."""
        return cls(record.name, record.dtype, tuple(record.shape), record.maximum)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_json`."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @property
    def is_tokens(self) -> bool:
        """True for integer or boolean inputs ``[batch, length]``, whose second dimension counts tokens."""
        return len(self.shape) == 2 and np.dtype(self.dtype).kind in "iub"

    def concrete(self, batch: int, length: int) -> tuple[int, ...]:
        """The shape with the batch for a symbolic first dimension and the length for every other symbolic one."""
        return tuple(
            size if isinstance(size, int) else batch if axis == 0 else length for axis, size in enumerate(self.shape)
        )


def prepare_inputs(
    given: Mapping[str, Any], specs: Sequence[TensorSpec], max_length: int | None
) -> dict[str, NDArray[Any]]:
    """Check, cast and complete ``given`` so that it is exactly what the graph takes.

    Raises:
        UsageError: naming the input, what was expected and what was given.
    """
    by_name = {spec.name: spec for spec in specs}
    for name, value in given.items():
        if name in by_name or name in TOKENIZER_EXTRAS:
            continue
        if name not in MASKS:
            raise UsageError(f"The model has no input '{name}'.", did_you_mean(name, by_name))
        if not np.all(value):
            raise UsageError(
                f"'{name}' hides positions, but this model was compiled without a mask input.",
                "Give sequences of one length without padding, one batch per length.",
            )
    feeds: dict[str, NDArray[Any]] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        if spec.name in given:
            feeds[spec.name] = _fit(given[spec.name], spec, sizes, max_length)
    for spec in specs:
        if spec.name not in feeds:
            feeds[spec.name] = _fill(spec, sizes)
    return feeds


def random_inputs(specs: Sequence[TensorSpec], *, batch: int, length: int, seed: int) -> dict[str, NDArray[Any]]:
    """Inputs for measuring: random tokens or normal noise, nothing masked; equal for equal arguments."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in specs:
        shape = spec.concrete(batch, length)
        kind = np.dtype(spec.dtype).kind
        array: NDArray[Any]
        if spec.name in _DEFAULTS:
            array = _DEFAULTS[spec.name](shape)
        elif kind == "f":
            array = generator.standard_normal(shape, dtype=np.float32)
        elif kind == "b":
            array = np.ones(shape)
        else:
            # Where no bound is known 1 is the largest value that every vocabulary and every flag has.
            array = generator.integers(0, (1 if spec.maximum is None else spec.maximum) + 1, shape)
        feeds[spec.name] = array.astype(spec.dtype)
    return feeds


def _ones(shape: tuple[int, ...]) -> NDArray[Any]:
    return np.ones(shape)


def _zeros(shape: tuple[int, ...]) -> NDArray[Any]:
    return np.zeros(shape)


def _positions(shape: tuple[int, ...]) -> NDArray[Any]:
    return np.broadcast_to(np.arange(shape[-1]), shape)


# What a model assumes when a caller leaves these out.
_DEFAULTS = {
    "attention_mask": _ones,
    "decoder_attention_mask": _ones,
    "pixel_mask": _ones,
    "token_type_ids": _zeros,
    "position_ids": _positions,
}


def _fit(value: Any, spec: TensorSpec, sizes: dict[str, tuple[int, str]], max_length: int | None) -> NDArray[Any]:
    expected = f"expected {spec.dtype} {_shape_text(spec.shape)}"
    try:
        array = np.asarray(value)
    except ValueError:
        raise UsageError(
            f"'{spec.name}' is a list of rows of different lengths; {expected}.",
            "Let the tokenizer pad: tokenizer(texts, padding=True).",
        ) from None
    actual = f"got {array.dtype} {list(array.shape)}"
    if array.ndim != len(spec.shape):
        hint = "Give a batch: one more pair of brackets, or tokenizer(..., return_tensors='np')."
        raise UsageError(
            f"'{spec.name}' has {array.ndim} dimensions instead of {len(spec.shape)}: {expected}, {actual}.",
            hint if array.ndim == len(spec.shape) - 1 else "Give an array of that shape.",
        )
    if array.size == 0:
        raise UsageError(f"'{spec.name}' is empty: {expected}, {actual}.", "Give at least one sequence and one token.")
    if spec.is_tokens and max_length is not None and array.shape[1] > max_length:
        raise UsageError(
            f"'{spec.name}' is too long: {actual}, but the model takes at most {max_length} tokens.",
            f"Truncate: tokenizer(texts, truncation=True, max_length={max_length}).",
        )
    for size, dimension in zip(array.shape, spec.shape, strict=True):
        if isinstance(dimension, int):
            if size != dimension:
                raise UsageError(f"'{spec.name}' has the wrong shape: {expected}, {actual}.", "Give that shape.")
            continue
        known, owner = sizes.setdefault(dimension, (size, spec.name))
        if size != known:
            raise UsageError(
                f"'{spec.name}' does not fit '{owner}': {expected}, {actual}, but {dimension} is {known} there.",
                "Give inputs that belong together.",
            )
    return _cast(array, spec, expected, actual)


def _cast(array: NDArray[Any], spec: TensorSpec, expected: str, actual: str) -> NDArray[Any]:
    wanted = np.dtype(spec.dtype)
    # Integers and booleans stand for each other, floats for floats; a float token id is a mistake.
    families = {"i": "iub", "u": "iub", "b": "iub", "f": "f"}
    if array.dtype.kind not in families.get(wanted.kind, wanted.kind):
        raise UsageError(f"'{spec.name}' has the wrong type: {expected}, {actual}.", f"Convert it to {wanted}.")
    if wanted.kind in "iu" and array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        limit = np.iinfo(wanted).max if spec.maximum is None else spec.maximum
        floor = np.iinfo(wanted).min if spec.maximum is None else 0
        if low < floor or high > limit:
            raise UsageError(
                f"'{spec.name}' has the value {low if low < floor else high}; this model takes {floor} to {limit}.",
                "Use the tokenizer that lies in the artifact directory.",
            )
    return np.ascontiguousarray(array, dtype=wanted)


def _fill(spec: TensorSpec, sizes: Mapping[str, tuple[int, str]]) -> NDArray[Any]:
    shape = tuple(size if isinstance(size, int) else sizes.get(size, (0, ""))[0] for size in spec.shape)
    if spec.name not in _DEFAULTS or 0 in shape:
        raise UsageError(
            f"The input '{spec.name}' is missing: expected {spec.dtype} {_shape_text(spec.shape)}.",
            "Pass all that the tokenizer gives: model(**tokenizer(texts, return_tensors='np')).",
        )
    return _DEFAULTS[spec.name](shape).astype(spec.dtype)


def _shape_text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
