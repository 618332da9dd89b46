"""From a model's outputs to what a client asked for: embeddings, labels of texts, labels of tokens. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pooling = Literal["mean", "cls", "max", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "max", "last")

Floats = NDArray[np.float32]


def embed(hidden: Floats, mask: NDArray[Any], pooling: Pooling, normalize: bool) -> Floats:
    """One vector per text, as sentence-transformers' modules Pooling and Normalize make it.

    Args:
        hidden: ``[batch, length, width]``.
        mask: ``[batch, length]``, 0 for padding, which stands behind the text.
        normalize: to length 1.

    Returns:
        ``[batch, width]``.
    """
    real = mask.astype(bool)[..., None]
    if pooling == "mean":
        pooled = np.where(real, hidden, 0).sum(axis=1) / np.maximum(real.sum(axis=1), 1)
    elif pooling == "max":
        pooled = np.where(real, hidden, -np.inf).max(axis=1)
    elif pooling == "cls":
        pooled = hidden[:, 0]
    else:
        pooled = np.take_along_axis(hidden, real.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
    if normalize:
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    return np.asarray(pooled, dtype=np.float32)


def classify(logits: Floats, labels: Sequence[str], several: bool) -> tuple[Floats, NDArray[np.object_]]:
    """Scores ``[batch, labels]`` and the best label ``[batch, 1]`` as UTF-8 bytes.

    Args:
        logits: ``[batch, labels]``.
        several: labels do not exclude each other, so each has a probability of its own.
    """
    logits = np.asarray(logits, dtype=np.float32)
    scores = 1 / (1 + np.exp(-logits)) if several else _softmax(logits)
    best = [[labels[index].encode()] for index in scores.argmax(axis=-1)]
    return np.asarray(scores, np.float32), np.array(best, dtype=np.object_)


def tag(logits: Floats, labels: Sequence[str]) -> tuple[Floats, NDArray[np.object_]]:
    """Probability of each token's best label, ``[batch, length]``, and that label as UTF-8 bytes.

    Args:
        logits: ``[batch, length, labels]``.
    """
    scores = _softmax(np.asarray(logits, dtype=np.float32))
    names = np.array([label.encode() for label in labels], dtype=np.object_)
    return np.asarray(scores.max(axis=-1), np.float32), names[scores.argmax(axis=-1)]


def labels_of(config: Mapping[str, Any], count: int) -> list[str]:
    """The names of a model's labels, from ``id2label`` of its config."""
    names = config.get("id2label") or {}
    return [str(names.get(str(index), f"LABEL_{index}")) for index in range(count)]


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
