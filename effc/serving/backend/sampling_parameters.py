"""How a client asks for text: the parameters of vLLM's server, as far as effc can do what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effc.compiler.sampling import SamplingSettings
from effc.errors import UsageError
from effc.suggest import did_you_mean

_DEFAULT_TOKENS = 16  # vLLM's own default
_NUMBERS = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "seed": int,
}
_KNOWN = (*_NUMBERS, "stop", "ignore_eos")


@dataclass(frozen=True)
class Wanted:
    """What one request asks for.

    Attributes:
        stop: texts that end the answer and are not part of it.
        ignore_eos: go on behind the model's own end.
    """

    max_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


def read_wanted(values: Mapping[str, Any]) -> Wanted:
    """Read ``max_tokens``, ``temperature`` (0: the most likely token), ``top_k`` (-1 or 0: all), ``top_p``,
    ``repetition_penalty``, ``seed``, ``stop`` and ``ignore_eos``; numbers may be text.

    Raises:
        UsageError: if one is unknown or out of range.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _KNOWN:
            raise UsageError(f"There is no sampling parameter '{name}'.", did_you_mean(name, _KNOWN))
        if value is not None:
            given[name] = _number(name, value) if name in _NUMBERS else value
    stop = given.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
        raise UsageError("stop must be a text or a list of texts that are not empty.", "Correct it.")
    if not isinstance(given.get("ignore_eos", False), bool):
        raise UsageError("ignore_eos must be true or false.", "Correct it.")
    tokens = given.get("max_tokens", _DEFAULT_TOKENS)
    if tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, not {tokens}.", "Correct it.")
    return Wanted(tokens, _sampling(given), stop, given.get("ignore_eos", False))


def _sampling(given: Mapping[str, Any]) -> SamplingSettings:
    """Temperature 0 means the most likely token, as in vLLM; so does none of the three, as in ``effc.load``."""
    penalty, seed = given.get("repetition_penalty", 1.0), given.get("seed")
    if seed is not None and seed < 0:
        raise UsageError(f"seed must not be negative, not {seed}.", "Correct it.")
    narrowed = {name: given[name] for name in ("temperature", "top_k", "top_p") if name in given}
    if narrowed.get("top_k") in (-1, 0):
        del narrowed["top_k"]
    if narrowed.get("temperature") == 0 or not (narrowed or "top_k" in given):
        return SamplingSettings(repetition_penalty=penalty, seed=seed)
    return SamplingSettings(do_sample=True, repetition_penalty=penalty, seed=seed, **narrowed)


def _number(name: str, value: Any) -> Any:
    kind = _NUMBERS[name]
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if kind is int and float(value) != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} must be a number, not {value!r}.", "Correct it.") from None
    return number
