"""The figures of the report.

Line and bar figures are SVG whose colours are CSS variables, so that one file reads in a light and in a dark page.
Their size is that of a phone screen: a laptop scales them up, and text is legible on both.
"""

from __future__ import annotations

import io
import math
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from effc.compiler.manifest import (
    AttentionSearch,
    BenchRecord,
    OutputDeviation,
    PassRecord,
    QuantizationSearch,
    SpeedRecord,
    Timing,
)
from effc.plugins.forms.base import AttentionForm
from effc.plugins.forms.heads import HeadForms
from effc.plugins.pattern import Pattern

# Colours that stand for CSS variables of the page; the SVG text is searched for them, so they must be unlikely ones.
INK = {
    "#010a01": "var(--fg)",
    "#010a02": "var(--muted)",
    "#010a03": "var(--line)",
    "#010a04": "var(--dense)",
    "#010a05": "var(--compiled)",
    "#010a06": "var(--loss)",
    "#010a07": "var(--warn)",
    "#010a08": "var(--series-3)",
    "#010a09": "var(--series-4)",
    "#010a0a": "var(--card)",
}
FG, MUTED, LINE, DENSE, COMPILED, LOSS, WARN, THIRD, FOURTH, CARD = INK
SERIES = (COMPILED, WARN, THIRD, FOURTH)
MARKERS = ("o", "s", "^", "D")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": FG,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
WIDTH, HEIGHT = 4.6, 2.95
ERROR_FLOOR = 1e-8  # fp32 resolves nothing below; a logarithmic axis needs some smallest value
CELLS = 64
PICTURE_LENGTH_LIMIT = 4096  # exact cell shares take length**2 steps
WHOLE_PICTURE_LIMIT = 512  # forms that are no pattern draw themselves as length x length weights
NUMBERED_COLUMNS = 10  # more do not leave room for figures in the cells
FAINTEST = 1e-3  # of the largest value, drawn without colour


def latency(
    bench: SpeedRecord, salt: str = "latency", along: str = "tokens per sequence", up: str = "CPU time per run, ms"
) -> Markup | None:
    """CPU milliseconds per run over the length, both axes logarithmic; None with fewer than two measured lengths.

    Args:
        salt: tells the figures of one page apart.
        along, up: what the axes say.
    """
    lengths = measured_lengths(bench)
    if len(lengths) < 2:
        return None
    figure, axes = canvas(salt)
    for timings, colour, marker in ((bench.dense, DENSE, "s"), (bench.compiled, COMPILED, "o")):
        points = [timings[str(length)] for length in lengths]
        axes.plot(lengths, [p.cpu_ms_min for p in points], marker, color=colour, alpha=0.4, markersize=4, linestyle="")
        axes.plot(lengths, [p.cpu_ms for p in points], marker=marker, color=colour, linewidth=2, markersize=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.14)
    _length_ticks(axes, lengths)
    _plain_log_ticks(axes)
    axes.set_xlabel(along)
    axes.set_ylabel(up)
    axes.grid(True, axis="y")
    if bench.break_even_length is not None and lengths[0] <= bench.break_even_length <= lengths[-1]:
        _mark_break_even(axes, bench.break_even_length, lengths)
    return as_svg(figure, f"{up} over {along}, dense against compiled")


def speedup(bench: BenchRecord, required: float | None) -> Markup:
    """One bar per length: dense CPU time over compiled CPU time. Bars below 1 are drawn in the colour of a loss."""
    lengths = measured_lengths(bench)
    values = [bench.speedup[str(length)] for length in lengths]
    figure, axes = canvas("speedup")
    bars = axes.bar(range(len(lengths)), values, 0.62, color=[LOSS if v < 1 else COMPILED for v in values])
    for label in axes.bar_label(bars, [f"{v:.2f}×" for v in values], padding=3, color=FG, fontsize=_fit(lengths)):
        label.set(fontweight="bold", bbox={"facecolor": CARD, "edgecolor": "none", "pad": 0.6})
    axes.axhline(1, color=FG, linewidth=1)
    top = max([*values, 1.0, required or 0.0]) * 1.2
    if required is not None:
        axes.axhline(required, color=WARN, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_ylim(0, top)
    _length_categories(axes, lengths)
    axes.set_ylabel("speed-up, dense ÷ compiled")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(True, axis="y")
    return as_svg(figure, "Speed-up per sequence length; below 1 is slower than dense")


def memory(bench: BenchRecord) -> Markup:
    """Peak resident memory of each process per length, MiB, dense beside compiled."""
    lengths = measured_lengths(bench)
    figure, axes = canvas("memory")
    for offset, timings, colour in ((-0.2, bench.dense, DENSE), (0.2, bench.compiled, COMPILED)):
        values = [timings[str(length)].peak_rss_mib for length in lengths]
        bars = axes.bar([i + offset for i in range(len(lengths))], values, 0.37, color=colour)
        if len(lengths) <= 8:
            axes.bar_label(bars, [f"{v:,.0f}" for v in values], padding=2, color=FG, fontsize=_fit(lengths) - 1)
    axes.margins(y=0.14)
    _length_categories(axes, lengths)
    axes.set_ylabel("peak memory, MiB")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(True, axis="y")
    return as_svg(figure, "Peak resident memory per sequence length, dense against compiled")


def probe_series(passes: Sequence[PassRecord]) -> list[tuple[str, list[OutputDeviation | None]]]:
    """What the probe figure shows: every output, or, where they are many, the worst and the middle one.

    Returns one ``(label, deviation after each probed pass)`` per series.
    """
    probes = [p.probe for p in passes if p.probe]
    names = list(dict.fromkeys(name for probe in probes for name in probe))
    if len(names) <= len(SERIES):
        return [(name, [probe.get(name) for probe in probes]) for name in names]

    def summary(error: list[float], cosine: list[float], worst: bool) -> OutputDeviation:
        return OutputDeviation(
            relative_error=max(error) if worst else median(error), cosine=min(cosine) if worst else median(cosine)
        )

    columns = [([d.relative_error for d in p.values()], [d.cosine for d in p.values()]) for p in probes]
    return [
        (f"worst of {len(names)} outputs", [summary(e, c, worst=True) for e, c in columns]),
        (f"median of {len(names)} outputs", [summary(e, c, worst=False) for e, c in columns]),
    ]


def probe(passes: Sequence[PassRecord]) -> Markup | None:
    """Relative error and 1 - cosine after each pass, logarithmic; None where no pass was probed."""
    probed = [p for p in passes if p.probe]
    if not probed:
        return None
    rows = range(len(probed))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "probe"}):
        figure = Figure(figsize=(WIDTH, 1.05 + 0.3 * len(probed)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, label in zip(panels, ("relative error", "1 − cosine"), strict=True):
            for colour, marker, (_, deviations) in zip(SERIES, MARKERS, probe_series(passes), strict=False):
                points = [(_distance(d, label), row) for row, d in zip(rows, deviations, strict=True) if d is not None]
                drawn = [(x, row) for x, row in points if math.isfinite(x)]
                axes.plot(
                    *zip(*drawn, strict=True), marker=marker, color=colour, markersize=5, linewidth=1.2
                ) if drawn else None
            axes.set_xscale("log")
            low, high = axes.get_xlim()  # whole decades, because only they are labelled
            axes.set_xlim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
            axes.set_ylim(len(probed) - 0.5, -0.5)
            axes.xaxis.set_major_locator(LogLocator(numticks=4))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
            axes.tick_params(axis="x", labelsize=8.5)
            axes.set_xlabel(label)
            axes.grid(True)
        panels[0].set_yticks(rows, [_shorten(p.name) for p in probed])
        return as_svg(figure, "Deviation from the untouched model after each pass")


def quantization(search: QuantizationSearch) -> Markup | None:
    """A bar for each layer: the change of the output when it alone is quantized, in other colours for those that stay
    in fp32. None where nothing was measured."""
    measured = [(number, layer) for number, layer in enumerate(search.layers) if layer.error]
    if not measured:
        return None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "quantization"}):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        for quantized, colour, label in ((True, COMPILED, "quantized"), (False, LOSS, "kept in fp32")):
            bars = [(number, layer.error) for number, layer in measured if layer.quantized == quantized]
            if bars:
                places, errors = zip(*bars, strict=True)
                axes.bar(places, errors, color=colour, width=0.8, linewidth=0, label=label)
        axes.set_yscale("log")
        axes.set_xlabel("layers, from input to output")
        axes.set_ylabel("error alone")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, axis="y")
        axes.legend(frameon=False, fontsize=8.5)
        return as_svg(figure, "Change of the output when one layer alone is quantized")


def sensitivity(search: AttentionSearch, numbers: dict[str, int]) -> Markup:
    """One cell for each layer and choice: how much that choice alone changes, logarithmic; what was taken is framed.

    Args:
        numbers: the number of each layer in the model.
    """
    rows, columns = len(search.layers), len(search.columns)
    largest = max((value for row in search.layers for value in row.values if value), default=1.0)
    by_head = search.columns == [str(number) for number in range(columns)]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "sensitivity"}):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * rows + (0 if by_head else 0.5)), layout="constrained")
        axes = figure.subplots()
        for number, row in enumerate(search.layers):
            for column, value in enumerate(row.values):
                if value is None:
                    continue
                strength = 1 - math.log(largest / max(value, FAINTEST * largest)) / math.log(1 / FAINTEST)
                cell = (column - 0.48, number - 0.46), 0.96, 0.92
                axes.add_patch(Rectangle(*cell, facecolor=COMPILED, alpha=0.75 * strength + 0.03, linewidth=0))
                if column in row.kept:
                    axes.add_patch(Rectangle(*cell, facecolor="none", edgecolor=FG, linewidth=1.4))
                if columns <= NUMBERED_COLUMNS:
                    axes.text(column, number, f"{value:.2g}", ha="center", va="center", color=FG, fontsize=7.5)
        axes.set_xlim(-0.6, columns - 0.4)
        axes.set_ylim(rows - 0.4, -0.6)
        labels = search.columns if by_head else [_shorten(text, 26) for text in search.columns]
        turned: dict[str, Any] = {} if by_head else {"rotation": 18, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(columns), labels, fontsize=8 if columns <= 24 else 5, **turned)
        ticks = [str(numbers.get(row.layer, number)) for number, row in enumerate(search.layers)]
        axes.set_yticks(range(rows), ticks, fontsize=8 if rows <= 40 else 6)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("layer")
        if by_head:
            axes.set_xlabel("key/value head")
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        return as_svg(figure, "Sensitivity of every layer to every choice, chosen ones framed")


def visibility(form: AttentionForm, causal: bool, length: int) -> tuple[str, int, int] | None:
    """A picture of what each query sees of each key, with exact shares; None where content decides.

    Returns ``(data URI of a PNG of cells, tokens it covers, tokens per cell)``. The opacity of a cell is the share of
    its query-key pairs that are visible, so that a narrow window does not vanish and needs no rescaling.
    """
    parts = form.parts if isinstance(form, HeadForms) else ((form, (0,)),)
    patterns = all(isinstance(part, Pattern) for part, _ in parts)
    length = min(length, PICTURE_LENGTH_LIMIT if patterns else WHOLE_PICTURE_LIMIT)
    step = max(1, length // CELLS)
    cells = min(CELLS, length)
    share = np.zeros((cells, cells))
    for part, heads in parts:
        seen = _cell_shares(part, causal, step, cells)
        if seen is None:
            return None
        share += seen * len(heads) / sum(len(others) for _, others in parts)
    image = np.empty((cells, cells, 4), dtype=np.uint8)
    image[..., :3] = (47, 128, 237)
    image[..., 3] = np.round(np.clip(share, 0, 1) * 255)
    file = io.BytesIO()
    imsave(file, image, format="png")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}", step * cells, step


def _cell_shares(form: AttentionForm, causal: bool, step: int, cells: int) -> NDArray[np.float64] | None:
    """``[cells, cells]``: the mean over the pairs of each cell."""
    covered = step * cells
    if not isinstance(form, Pattern):
        weights = form.picture(covered, causal)
        return None if weights is None else weights.reshape(cells, step, cells, step).mean(axis=(1, 3))
    keys = np.arange(covered)[None, :]
    share = np.empty((cells, cells))
    for row in range(cells):  # by rows of cells, because the whole mask at 4096 tokens is 16 million pairs
        queries = np.arange(row * step, (row + 1) * step)[:, None]
        visible = form.visible(queries, keys, causal, covered)
        share[row] = visible.reshape(step, cells, step).mean(axis=(0, 2))
    return share


def measured_lengths(bench: SpeedRecord) -> list[int]:
    """The lengths, ascending, at which both models were timed and compared."""
    complete = bench.dense.keys() & bench.compiled.keys() & bench.speedup.keys()
    return [length for length in sorted(bench.lengths) if str(length) in complete]


def timing_pairs(bench: SpeedRecord) -> list[tuple[int, Timing, Timing]]:
    """``(length, dense, compiled)`` of every measured length, ascending."""
    return [(length, bench.dense[str(length)], bench.compiled[str(length)]) for length in measured_lengths(bench)]


def canvas(salt: str, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure in the page's style, inches wide and high."""
    # Element ids are hashes of their content and this salt: equal content in two figures of one page must not clash.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def as_svg(figure: Figure, label: str) -> Markup:
    """The figure as an ``<svg>`` element without XML header, metadata, namespaces or a fixed size."""
    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        # Without "None" matplotlib embeds a date and addresses of metadata vocabularies.
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    view_box = re.search(r'viewBox="[-\d. ]+"', head)
    assert view_box, "matplotlib writes a viewBox"
    # Groups are numbered from 1 in every figure and nothing refers to them; two figures must not repeat an id.
    body = re.sub(r'<g id="[^"]*"', "<g", body.replace("xlink:href", "href"))
    for stand_in, variable in INK.items():
        body = body.replace(stand_in, variable)
    return Markup(f'<svg {view_box[0]} role="img" aria-label="{escape(label)}">{body}')


def _length_ticks(axes: Axes, lengths: list[int]) -> None:
    """Ticks at measured lengths, leaving out those that would print over their neighbour."""
    span = math.log(lengths[-1] / lengths[0])
    shown = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log(shown[-1] / length) > span * 0.11:
            shown.append(length)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_break_even(axes: Axes, length: int, lengths: list[int]) -> None:
    axes.axvline(length, color=WARN, linewidth=1.2, linestyle=(0, (4, 3)))
    on_the_left = length < math.sqrt(lengths[0] * lengths[-1])
    axes.annotate(
        f"break-even: {length:,} tokens", (length, 1), xycoords=("data", "axes fraction"),
        xytext=(4 if on_the_left else -4, -9), textcoords="offset points", ha="left" if on_the_left else "right",
        color=WARN, fontsize=8.5,
    )  # fmt: skip


def _length_categories(axes: Axes, lengths: list[int]) -> None:
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=_fit(lengths))
    axes.set_xlim(-0.6, max(len(lengths), 3) - 0.4)  # one measured length shall not fill the figure with one bar
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("tokens per sequence")


def _fit(lengths: list[int]) -> float:
    return 9.5 if len(lengths) <= 5 else max(5.0, 48 / len(lengths))


def _distance(deviation: OutputDeviation, label: str) -> float:
    value = deviation.relative_error if label == "relative error" else 1 - deviation.cosine
    return max(value, ERROR_FLOOR) if math.isfinite(value) else value


def _shorten(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
