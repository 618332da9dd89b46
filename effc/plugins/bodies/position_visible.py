"""Which pairs the terms of a pattern leave visible, as ONNX statements over positions."""

from __future__ import annotations

from collections.abc import Sequence

from effc.plugins.bodies.position_statements import Statements, Value
from effc.plugins.forms.terms import (
    HASH_PRIME,
    RANDOM_BLOCK,
    Block,
    Dense,
    Dilated,
    Global,
    GlobalTokens,
    Local,
    Random,
    Sinks,
    Strided,
    Term,
)

UNBOUNDED = 3e38
"""Visibility is held as an upper limit of scores, this where a key is visible and its negative where it is not, so
that *and* and *or* are Min and Max, which are fast."""


def limit_of(s: Statements, flags: Value, to: str = "limit") -> Value:
    """A visibility as limits, from booleans."""
    return s("Where", flags, UNBOUNDED, -UNBOUNDED, to=to)


def near_visible(
    s: Statements, terms: Sequence[Local | Block | Dilated | Strided], query: Value, key: Value, causal: bool
) -> Value | None:
    """True where ``key`` is visible from ``query`` by one of ``terms``, before causality; None without terms.

    Positions of keys that :class:`Block` is asked about must not be negative: ONNX division rounds towards zero.
    """
    distance = s("Sub", key, query, to="distance") if terms else ""
    return s.any_of(*(_near(s, term, query, key, distance, causal) for term in terms))


def _near(
    s: Statements, term: Local | Block | Dilated | Strided, query: Value, key: Value, distance: Value, causal: bool
) -> Value:
    if isinstance(term, Block):
        apart = s("Sub", s("Div", key, term.block), s("Div", query, term.block))
        return s("LessOrEqual", s("Abs", apart), term.neighbours, to="in_blocks")
    if isinstance(term, Strided):
        return s("Equal", s("Mod", distance, term.stride), 0, to="on_stride")
    left, right = term.reach(causal)
    step = term.dilation if isinstance(term, Dilated) else 1
    band = s(
        "And",
        s("GreaterOrEqual", distance, -left * step),
        s("LessOrEqual", distance, right * step),
        to="in_window",
    )
    return band if step == 1 else s("And", band, s("Equal", s("Mod", distance, step), 0), to="in_dilated_window")


def all_visible(
    s: Statements, terms: Sequence[Term], query: Value, key: Value, length: Value, causal: bool, marked: Value | None
) -> Value | None:
    """True where ``key`` is visible from ``query`` by any of all ``terms``, and by causality; None if always.

    Args:
        query: positions ``[queries, 1]``.
        key: positions ``[1, keys]``.
        length: number of keys, a scalar.
        marked: ``[queries, keys]`` or broadcastable, True for pairs with a marked token.
    """
    behind = s("LessOrEqual", key, query, to="not_behind") if causal else None
    if any(isinstance(term, Dense) for term in terms):
        return behind
    near = [term for term in terms if isinstance(term, (Local, Block, Dilated, Strided))]
    flags: list[Value | None] = [near_visible(s, near, query, key, causal)]
    for term in terms:
        if isinstance(term, (Global, Sinks)):
            flags.append(s("Less", key, term.count, to="among_first"))
        if isinstance(term, Global) and not causal:
            flags.append(s("Less", query, term.count, to="global_query"))
        if isinstance(term, Random):
            key_block = s("Div", key, RANDOM_BLOCK)
            for number in range(term.count):
                drawn = draw(s, term, number, s("Div", query, RANDOM_BLOCK), length, causal)
                flags.append(s("Equal", key_block, drawn, to="drawn"))
        if isinstance(term, GlobalTokens):
            flags.append(marked)
    seen = s.any_of(*flags)
    if seen is None:
        # Only a random term that draws nothing is left.
        seen = s("Less", s("Add", query, key), 0, to="nothing")
    return s.all_of(seen, behind)


def draw(s: Statements, term: Random, number: int, query_block: Value, length: Value, causal: bool) -> Value:
    """The ``number``-th key block of each query block: :meth:`Random.draw` in the graph, int64 throughout."""
    first = term.seed % HASH_PRIME * 7919 + number * 1299709 + 1
    state = s("Mod", s("Add", s("Mul", query_block, 104729), first), HASH_PRIME)
    for _ in range(3):
        state = s("Mod", s("Add", s("Mul", state, state), 48271), HASH_PRIME)
    blocks = s("Add", query_block, 1) if causal else s("Div", s("Add", length, RANDOM_BLOCK - 1), RANDOM_BLOCK)
    return s("Mod", state, blocks, to="drawn_block")
