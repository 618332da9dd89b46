"""Find the name a user probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy sentence: the nearest known name, or the list of all of them."""
    names = sorted(known)
    match = nearest(name, names)
    return f"Did you mean '{match}'?" if match else f"Known: {', '.join(names)}."
