"""A form as the user meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.terms import Term

Parse = Callable[[str, list[str], str], tuple[Term, ...] | AttentionForm]
"""Called as ``parse(text, arguments, syntax)``; gives terms that ``|`` can join, or a whole form."""


@dataclass(frozen=True)
class FormEntry:
    """One line of ``effc attention --list``.

    Attributes:
        syntax: how it is written, parameters in capitals, optional ones in brackets.
        summary: what it computes, defaults in parentheses.
        group: heading it is listed under.
        parse: reads its text.
        source: the paper it comes from.
    """

    syntax: str
    summary: str
    group: str
    parse: Parse
    source: str = ""
