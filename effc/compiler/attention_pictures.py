"""What an attention form looks like and costs, before any model is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effc.errors import UsageError
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.registry import FORMS, parse_form
from effc.plugins.pattern import DENSE, Pattern

# A picture holds length x length shares.
_LONGEST_PICTURE = 8192
# Counting the pairs of a pattern takes length x length steps.
_FURTHER_LENGTHS = (512, 2048, 8192)
# From an empty cell to a full one.
_SHADES = " ·░▒▓█"
_HALF = 0.5


@dataclass(frozen=True)
class FormCost:
    """What one head costs at one length.

    Attributes:
        length: tokens.
        pairs: visible (query, key) pairs, exactly; None where the form is no set of pairs.
        density: ``pairs`` as a share of those of dense attention of the same causality.
        flops: floating-point operations.
        dense_flops: those of dense attention.
    """

    length: int
    pairs: int | None
    density: float | None
    flops: int
    dense_flops: int

    @property
    def share(self) -> float:
        """Operations as a share of dense attention's."""
        return self.flops / self.dense_flops


@dataclass(frozen=True)
class AttentionPicture:
    """A form drawn at one length.

    Attributes:
        form: its canonical text.
        length: tokens.
        causal: whether keys behind the query are hidden.
        head_dim: numbers per head and token that ``costs`` are counted for.
        weights: ``[length, length]``, rows are queries: 0 unseen, 1 exact, between them what is seen in summary. None
            where the content of a text decides.
        costs: at ``length`` and at longer ones.
    """

    form: str
    length: int
    causal: bool
    head_dim: int
    weights: NDArray[np.float64] | None
    costs: tuple[FormCost, ...]

    def as_text(self, width: int = 80) -> str:
        """The picture in block characters, at most ``width`` columns wide; two rows of cells a line."""
        if self.weights is None:
            return "What is seen depends on the text, so there is nothing to draw."
        cells = _scaled(self.weights, width)
        if len(cells) % 2:
            cells = np.vstack([cells, np.zeros((1, cells.shape[1]))])
        pairs = zip(cells[::2], cells[1::2], strict=True)
        return "\n".join("".join(_character(a, b) for a, b in zip(*rows, strict=True)).rstrip() for rows in pairs)

    def save(self, path: str | Path) -> None:
        """Write the picture with its density and cost as an image; the suffix (.png, .svg, .pdf) says which kind.

        Raises:
            UsageError: if there is nothing to draw, or the format is unknown.
        """
        if self.weights is None:
            raise UsageError(f"What '{self.form}' sees depends on the text.", "Leave --save out.")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 7), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(self.weights, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("key position")
        axes.set_ylabel("query position")
        direction = "causal" if self.causal else "bidirectional"
        lines = [f"{cost.length} tokens: {describe_cost(cost)}" for cost in self.costs]
        figure.suptitle(f"{self.form}, {direction}", x=0.02, ha="left", fontweight="bold")
        axes.set_title("\n".join(lines), loc="left", fontsize="small")
        save_figure(figure, path)

    def as_json(self) -> dict[str, Any]:
        """Everything but the picture itself, as plain values."""
        costs = [
            {
                "length": cost.length,
                "pairs": cost.pairs,
                "density": cost.density,
                "flops": cost.flops,
                "dense_flops": cost.dense_flops,
                "share": cost.share,
            }
            for cost in self.costs
        ]
        return {
            "form": self.form,
            "length": self.length,
            "causal": self.causal,
            "head_dim": self.head_dim,
            "drawn": self.weights is not None,
            "costs": costs,
        }


def attention_picture(
    form: str, length: int = 64, *, causal: bool = False, head_dim: int = 64, lengths: Sequence[int] = ()
) -> AttentionPicture:
    """Draw an attention form and count what it costs.

    Args:
        form: its text, for example ``local:256|sinks:4``.
        length: tokens to draw.
        causal: hide keys behind the query.
        head_dim: numbers per head and token, for the cost.
        lengths: longer lengths to count the cost at; some usual ones when empty.

    Raises:
        UsageError: if the form is unknown, or the length below 1 or too long to draw.
    """
    parsed = parse_form(form)
    if not 1 <= length <= _LONGEST_PICTURE:
        raise UsageError(
            f"A picture of {length} tokens cannot be drawn.", f"Give a length from 1 to {_LONGEST_PICTURE}."
        )
    if head_dim < 1:
        raise UsageError(f"A head of {head_dim} numbers is none.", "Give at least 1, usually 64.")
    if causal and not getattr(parsed, "supports_causal", True):
        raise UsageError(f"'{parsed}' has no causal form.", "Leave --causal out.")
    further = lengths or [n for n in _FURTHER_LENGTHS if n > length]
    costs = tuple(_cost(parsed, n, causal, head_dim) for n in (length, *further))
    return AttentionPicture(str(parsed), length, causal, head_dim, parsed.picture(length, causal), costs)


def draw(subject: str, **options: Any) -> AttentionPicture:
    """:func:`attention_picture` of what the user wrote, which may be a model by mistake.

    Raises:
        UsageError: naming what is missing if ``subject`` is a model.
    """
    try:
        parse_form(subject)
    except UsageError as error:
        if Path(subject).expanduser().exists():
            raise UsageError(
                f"'{subject}' is no pattern but a path; a model's attention is measured on texts.",
                "Give some with --text FILE.",
            ) from None
        if "/" in subject or subject.endswith(".gguf"):
            raise UsageError(
                f"There is no file or directory '{subject}', and it is no pattern.",
                "For a hub model give --text FILE, too; for a pattern write, for example, local:256.",
            ) from None
        raise error from None
    return attention_picture(subject, **options)


def attention_forms() -> list[dict[str, str]]:
    """Every form that can be written: name, syntax, what it computes, the group it belongs to and its source."""
    return [
        {
            "name": name,
            "syntax": entry.syntax,
            "summary": entry.summary,
            "group": entry.group,
            "source": entry.source,
        }
        for name, entry in FORMS.items()
    ]


def describe_cost(cost: FormCost) -> str:
    """One line of plain words."""
    pairs = "" if cost.pairs is None else f"{cost.pairs:,} pairs, {cost.density:.2%} density, "
    return f"{pairs}{cost.flops / 1e6:,.2f} MFLOP a head, {cost.share:.3f} of dense"


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure.

    Raises:
        UsageError: if the suffix names no image format.
    """
    known = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise UsageError(f"'{path}' has no suffix of an image format.", "Write, for example, picture.png.")
    figure.savefig(path, dpi=150)


def _cost(form: AttentionForm, length: int, causal: bool, head_dim: int) -> FormCost:
    dense = DENSE.visible_pairs(length, causal)
    pairs = form.visible_pairs(length, causal) if isinstance(form, Pattern) else None
    return FormCost(
        length,
        pairs,
        None if pairs is None else pairs / dense,
        form.cost(length, causal, head_dim).flops,
        DENSE.cost(length, causal, head_dim).flops,
    )


def _scaled(weights: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Means over square cells, few enough for ``width`` columns."""
    length = len(weights)
    step = -(-length // max(1, width))
    starts = np.arange(0, length, step)
    sizes = np.diff(np.append(starts, length))
    sums = np.add.reduceat(np.add.reduceat(weights, starts, axis=0), starts, axis=1)
    return np.asarray(sums / np.outer(sizes, sizes))


def _character(upper: float, lower: float) -> str:
    """One character for two cells: half blocks where one is full and one empty, else a shade of their mean."""
    if upper >= _HALF and lower == 0:
        return "▀"
    if lower >= _HALF and upper == 0:
        return "▄"
    shade = (upper + lower) / 2
    return _SHADES[0] if shade == 0 else _SHADES[1 + min(4, int(shade * 4 + 0.5))]
