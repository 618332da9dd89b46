"""How a union of position terms is cut into parts that are cheap to compute; static, numbers only.

* One *gathered* part: every block of queries gathers one list of keys (a window, the first keys, random blocks, marked
  tokens) and takes one softmax over it.
* A *class* part for every ``strided`` and for every wide ``dilated`` term: positions that are equal modulo the stride
  form a sequence of their own, in which the term is dense or a window.
* Rows of global queries, which see every key.

Parts see disjoint pairs and are merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from effc.errors import PreconditionError
from effc.plugins.forms.terms import (
    RANDOM_BLOCK,
    Block,
    Dilated,
    Global,
    GlobalTokens,
    Local,
    Random,
    Sinks,
    Strided,
    Term,
)
from effc.plugins.pattern import Pattern

# Queries per block: measured best for windows up to 512; wider ones waste less with more.
_BLOCK, _WIDE_BLOCK, _WIDE = 64, 128, 512
# What a part of its own costs besides its keys (its gather, statistics and merging), in keys per query block.
_PART_OVERHEAD = 128


@dataclass(frozen=True)
class ClassPart:
    """Attention among the positions that are equal modulo ``modulus``.

    Attributes:
        reach: ``(left, right)`` in steps of ``modulus``, or None where the whole class is visible.
    """

    term: Strided | Dilated
    modulus: int
    reach: tuple[int, int] | None


@dataclass(frozen=True)
class GatheredPart:
    """Blocks of queries, each with one list of keys.

    Attributes:
        block: queries per block; blocks start at multiples of it.
        left, right: the window reaches from ``left`` before the block's first query to ``right`` behind its last.
        window: its width in keys, 0 if there is none.
        terms: what is visible inside the window by positions alone.
        shift_invariant: whether ``terms`` look alike in every block.
        whole_blocks: the term if the window is exactly its blocks, so that it starts at a multiple of their size.
        first_keys: keys at the start that every query sees.
        randoms: random terms.
        marked: whether marked tokens are seen by every query.
        excluded: terms whose pairs class parts have computed already.
    """

    block: int
    left: int
    right: int
    window: int
    terms: tuple[Local | Block | Dilated, ...]
    shift_invariant: bool
    whole_blocks: Block | None
    first_keys: int
    randoms: tuple[Random, ...]
    marked: bool
    excluded: tuple[Strided | Dilated, ...]

    @property
    def keys(self) -> int:
        """Keys per block of queries, marked tokens not counted."""
        return self.window + self.first_keys + RANDOM_BLOCK * sum(random.count for random in self.randoms)


@dataclass(frozen=True)
class Plan:
    """The parts of one pattern.

    Attributes:
        global_queries: queries at the start that see every key; 0 in causal attention, where they see no more than
            ``first_keys`` lets them.
        marked: whether there are marked tokens.
        sees_itself: whether every query sees some key where nothing is padded.
    """

    terms: tuple[Term, ...]
    causal: bool
    classes: tuple[ClassPart, ...]
    gathered: GatheredPart | None
    global_queries: int
    marked: bool
    sees_itself: bool

    @property
    def bounded(self) -> tuple[int, int] | None:
        """``(left, first)`` if a query sees nothing but the ``left`` keys before it, those behind it, and the first."""
        if self.classes or self.gathered is None or self.marked or self.gathered.randoms or self.global_queries:
            return None
        widest = [term.block - 1 for term in self.terms if isinstance(term, Block)]
        return self.gathered.left + max(widest, default=0), self.gathered.first_keys


def plan(pattern: Pattern, causal: bool, given: frozenset[str]) -> Plan:
    """Cut ``pattern`` into parts.

    Raises:
        PreconditionError: if the pattern names tokens and the node has no input that says where they stand.
    """
    terms = pattern.terms
    marked = any(isinstance(term, GlobalTokens) for term in terms)
    if marked and "marks" not in given:
        raise PreconditionError(
            f"'{pattern}' names tokens, but the operator has no 'marks' input.", "Give it where the tokens stand."
        )
    near = [term for term in terms if isinstance(term, (Local, Block))]
    folded = [term for term in terms if isinstance(term, Dilated) and _fold(term, near, causal)]
    classes = tuple(
        _class_part(term, causal) for term in terms if isinstance(term, (Strided, Dilated)) and term not in folded
    )
    first_keys = max((term.count for term in terms if isinstance(term, (Global, Sinks))), default=0)
    randoms = tuple(term for term in terms if isinstance(term, Random) and term.count)
    gathered = None
    if near or folded or first_keys or randoms or marked:
        gathered = _gathered(
            (*near, *folded), causal, first_keys, randoms, marked, tuple(part.term for part in classes)
        )
    return Plan(
        terms,
        causal,
        classes,
        gathered,
        0 if causal else max((term.count for term in terms if isinstance(term, Global)), default=0),
        marked,
        not all(isinstance(term, (Random, GlobalTokens)) for term in terms),
    )


def _gathered(
    terms: tuple[Local | Block | Dilated, ...],
    causal: bool,
    first_keys: int,
    randoms: tuple[Random, ...],
    marked: bool,
    excluded: tuple[Strided | Dilated, ...],
) -> GatheredPart:
    blocks = [term for term in terms if isinstance(term, Block)]
    block = RANDOM_BLOCK if randoms else _block_size(terms, causal, math.lcm(*(term.block for term in blocks)))
    reaches = [_reach(term, causal, block) for term in terms]
    left, right = (max((reach[side] for reach in reaches), default=0) for side in (0, 1))
    # In causal attention the block itself is always in the window, so that all other keys lie before every query.
    window = left + block + right if terms or causal else 0
    whole = blocks[0] if len(terms) == 1 and blocks and blocks[0].block % block == 0 else None
    if whole is not None:
        window = whole.block * (whole.neighbours + 1 + (0 if causal else whole.neighbours))
    return GatheredPart(
        block,
        left,
        right,
        window,
        terms,
        all(block % term.block == 0 for term in blocks),
        whole,
        first_keys,
        randoms,
        marked,
        excluded,
    )


def _reach(term: Local | Block | Dilated, causal: bool, block: int) -> tuple[int, int]:
    """How far a block of queries sees before its first and behind its last one, at most."""
    if isinstance(term, Block):
        ragged = 0 if block % term.block == 0 else term.block - math.gcd(block, term.block)
        return term.neighbours * term.block + ragged, 0 if causal else term.neighbours * term.block + ragged
    step = term.dilation if isinstance(term, Dilated) else 1
    left, right = term.reach(causal)
    return left * step, right * step


def _block_size(terms: Sequence[Local | Block | Dilated], causal: bool, alignment: int) -> int:
    """Few enough queries to waste little of the window, enough to feed the matrix kernels, aligned with ``block``."""
    reach = max((sum(_reach(term, causal, alignment)) for term in terms), default=0)
    size = _BLOCK if reach <= _WIDE else _WIDE_BLOCK
    if alignment <= size:
        return size // alignment * alignment
    divisors = [divisor for divisor in range(size // 2, size + 1) if alignment % divisor == 0]
    return max(divisors, default=size)


def _fold(term: Dilated, near: Sequence[Local | Block], causal: bool) -> bool:
    """Whether a dilated window is cheaper as a window with gaps than as a part of its own."""
    own = sum(term.reach(causal)) + _BLOCK
    inside = max((sum(_reach(other, causal, _BLOCK)) for other in near), default=0) + _BLOCK
    widened = max(sum(_reach(term, causal, _BLOCK)) + _BLOCK, inside)
    return widened <= inside + own + _PART_OVERHEAD if near else term.dilation == 1


def _class_part(term: Strided | Dilated, causal: bool) -> ClassPart:
    if isinstance(term, Strided):
        return ClassPart(term, term.stride, None)
    return ClassPart(term, term.dilation, term.reach(causal))
