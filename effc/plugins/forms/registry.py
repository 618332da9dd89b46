"""Every attention form by the name the user writes, and how its text is read."""

from __future__ import annotations

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.chunked import CHUNKED_FORMS
from effc.plugins.forms.content import CONTENT_FORMS
from effc.plugins.forms.dense_chunked import DENSE_CHUNKED_FORMS
from effc.plugins.forms.entry import FormEntry
from effc.plugins.forms.heads import HeadForms, parse_ranges
from effc.plugins.forms.hierarchical import HIERARCHICAL_FORMS
from effc.plugins.forms.linear import LINEAR_FORMS
from effc.plugins.forms.low_rank import LOW_RANK_FORMS
from effc.plugins.forms.position_entries import POSITION_FORMS
from effc.plugins.forms.terms import Term
from effc.plugins.pattern import Pattern, union
from effc.suggest import did_you_mean

FORMS: dict[str, FormEntry] = {
    **POSITION_FORMS,
    **LINEAR_FORMS,
    **LOW_RANK_FORMS,
    **HIERARCHICAL_FORMS,
    **CHUNKED_FORMS,
    **DENSE_CHUNKED_FORMS,
    **CONTENT_FORMS,
}


def parse_form(text: str) -> AttentionForm:
    """Read an attention form, for example ``local:256|sinks:4``, ``linear:elu`` or ``dense@0-2;local:256@3-8``.

    Raises:
        UsageError: on an unknown form (naming the nearest known one), a parameter out of range, or a union of forms
            that cannot be joined.
    """
    if "@" in text:
        parts = []
        for part in text.split(";"):
            form, at, heads = part.rpartition("@")
            if not at:
                raise UsageError(f"'{part}' does not say which heads.", "Write, for example, dense@0-2;local:256@3-8.")
            parts.append((parse_form(form), tuple(sorted(parse_ranges(heads, "heads")))))
        return HeadForms(tuple(parts))
    terms: list[Term] = []
    pieces = [piece.strip() for piece in text.split("|")]
    for piece in pieces:
        name, *arguments = piece.split(":")
        entry = FORMS.get(name)
        if entry is None:
            raise UsageError(f"'{name}' is not an attention pattern.", did_you_mean(name, FORMS))
        parsed = entry.parse(piece, arguments, entry.syntax)
        if isinstance(parsed, AttentionForm):
            if len(pieces) > 1:
                raise UsageError(
                    f"'{name}' cannot be joined with other patterns by '|'.",
                    "Use it alone; only position-based patterns (local, global, sinks, ...) can be joined.",
                )
            return parsed
        terms.extend(parsed)
    return union(tuple(terms))


def parse_pattern(text: str) -> Pattern:
    """Read a position-based pattern; see :func:`parse_form`.

    Raises:
        UsageError: also if the text is another form.
    """
    form = parse_form(text)
    if not isinstance(form, Pattern):
        raise UsageError(f"'{text}' is not a position-based pattern.", "Write, for example, local:256|sinks:4.")
    return form
