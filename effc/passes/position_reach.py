"""How far a form looks: what decides which positions a model has to tell apart."""

from __future__ import annotations

from dataclasses import dataclass

from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.forms.terms import Block, Dilated, Global, Local, Sinks
from effc.plugins.pattern import Pattern


@dataclass(frozen=True)
class Reach:
    """A bounded view.

    Attributes:
        left: positions seen before a token.
        right: positions seen after it.
        first: tokens at the start of the text that are seen, or see, from any distance.
    """

    left: int
    right: int
    first: int

    @property
    def distance(self) -> int | None:
        """The furthest distance at which a pair is visible, None if it grows with the text."""
        return None if self.first else max(self.left, self.right)


def reach_of(form: AttentionForm, causal: bool) -> Reach | None:
    """The view of a form, or None if it is not bounded: if pairs of any distance may be visible anywhere in a text."""
    if isinstance(form, HeadForms):
        return _widest([reach_of(part, causal) for part, _ in form.parts])
    if not isinstance(form, Pattern):
        return None
    return _widest([_term_reach(term, causal) for term in form.terms])


def _term_reach(term: object, causal: bool) -> Reach | None:
    if isinstance(term, Local):
        return Reach(*term.reach(causal), 0)
    if isinstance(term, Dilated):
        left, right = term.reach(causal)
        return Reach(left * term.dilation, right * term.dilation, 0)
    if isinstance(term, Block):
        span = term.block * (term.neighbours + 1) - 1
        return Reach(span, 0 if causal else span, 0)
    if isinstance(term, (Global, Sinks)):
        return Reach(0, 0, term.count)
    return None


def _widest(reaches: list[Reach | None]) -> Reach | None:
    known = [reach for reach in reaches if reach is not None]
    if len(known) != len(reaches):
        return None
    return Reach(
        max(reach.left for reach in known), max(reach.right for reach in known), max(reach.first for reach in known)
    )
