"""Writing text with a prefill and a decode engine. The caches pass from one run to the next as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from effc.compiler.generation import Prompt
from effc.compiler.sampling import Sampler, SamplingSettings
from effc.errors import UsageError

_NEW_TOKENS = 256
_MASK, _PAST, _PRESENT = "attention_mask", "past_", "present_"


class Runner(Protocol):
    """Runs the engine of a graph; values may be numpy arrays or live on a device."""

    def run(self, graph: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; inputs that the graph does not have are left out."""

    def numpy(self, value: Any) -> NDArray[Any]:
        """A value as a numpy array."""


def write_on(
    runner: Runner,
    prompt: Prompt,
    *,
    max_length: int | None,
    ends: Sequence[int],
    padding: int,
    max_new_tokens: int | None = None,
    sampling: SamplingSettings | None = None,
) -> Iterator[NDArray[np.int64]]:
    """Yield the next token of every sequence, ``[batch]``, until all have ended.

    Args:
        max_length: positions of the model and of the engines.
        ends: tokens that end a text.
        padding: what follows the end of a text while others go on.
        max_new_tokens: at most so many; up to 256 within ``max_length`` when None.

    Raises:
        UsageError: if there is no room for the new tokens.
    """
    tokens, mask = prompt.tokens, prompt.mask
    room = _NEW_TOKENS if max_length is None else max_length - tokens.shape[1]
    if room < 1 or (max_new_tokens or 1) > (room if max_length is not None else max_new_tokens or 1):
        raise UsageError(
            f"{tokens.shape[1]} tokens of prompt and {max_new_tokens or 1} new ones are more than the engines take.",
            f"They take {max_length} in all; shorten the prompt, or compile with larger --shapes.",
        )
    count = max_new_tokens or min(_NEW_TOKENS, room)
    sampler = Sampler(sampling or SamplingSettings())
    outputs = runner.run("prefill", _feeds(tokens, mask, tokens.shape[1]))
    ended = np.zeros(len(tokens), dtype=bool)
    for number in range(count):
        logits = np.asarray(runner.numpy(outputs["logits"])[:, -1], dtype=np.float32)
        chosen = np.where(ended, padding, sampler.choose(logits, tokens, mask))
        ended |= np.isin(chosen, ends)
        yield chosen
        if ended.all() or number + 1 == count:
            return
        tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones((len(mask), 1), dtype=bool)], axis=1)
        past = {
            _PAST + name.removeprefix(_PRESENT): value for name, value in outputs.items() if name.startswith(_PRESENT)
        }
        outputs = runner.run("decode", _feeds(tokens, mask, 1) | past)


def _feeds(tokens: NDArray[np.int64], mask: NDArray[np.bool_], last: int) -> dict[str, Any]:
    positions = np.maximum(mask.cumsum(axis=1, dtype=np.int64) - 1, 0)
    return {"input_ids": tokens[:, -last:], _MASK: mask.astype(np.int64), "position_ids": positions[:, -last:]}
