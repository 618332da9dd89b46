"""Quality against speed, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from effc.compiler.report_plots import COMPILED, DENSE, FG, INK, MUTED, as_svg, canvas


class Point(Protocol):
    """What is drawn of an artifact."""

    @property
    def name(self) -> str: ...
    @property
    def speedup(self) -> float: ...
    @property
    def quality_drop(self) -> float: ...
    @property
    def on_front(self) -> bool: ...


# The page's light colours, for a picture without a page around it.
_ALONE = {
    "var(--fg)": "#151a21",
    "var(--muted)": "#566171",
    "var(--line)": "#dde2e8",
    "var(--dense)": "#7b8794",
    "var(--compiled)": "#1767d2",
    "var(--card)": "#ffffff",
}


# Where a name may stand: points from its mark, and the side of it that is nearer.
_PLACES: tuple[tuple[tuple[float, float], str], ...] = (
    ((7, 0), "left"),
    ((-7, 0), "right"),
    ((5, 9), "left"),
    ((5, -9), "left"),
    ((-5, 9), "right"),
    ((-5, -9), "right"),
    ((5, 19), "left"),
    ((5, -19), "left"),
)


def pareto(points: Sequence[Point], metric: str, *, alone: bool = False) -> Markup:
    """Quality drop, the least on top, over speed-up; the points of the front are joined.

    Args:
        alone: make a file of its own, which brings its colours and namespace.
    """
    figure, axes = canvas("pareto", width=7.2, height=4.6)
    front = sorted((point for point in points if point.on_front), key=lambda point: point.speedup)
    axes.plot(
        [point.speedup for point in front],
        [point.quality_drop for point in front],
        color=COMPILED,
        linewidth=1.4,
        drawstyle="steps-pre",
        alpha=0.7,
    )
    for point in points:
        colour = COMPILED if point.on_front else DENSE
        axes.plot(point.speedup, point.quality_drop, "o" if point.on_front else "s", color=colour, markersize=6)
    axes.margins(x=0.12, y=0.12)
    axes.invert_yaxis()
    _names(axes, points)
    axes.set_xlabel("speed-up against the dense twin")
    axes.set_ylabel(f"quality drop ({metric})")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(True)
    svg = as_svg(figure, "Quality drop over speed-up; the joined points are beaten by no other")
    if not alone:
        return svg
    text = str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    for stand_in, colour in _ALONE.items():
        assert stand_in in INK.values()
        text = text.replace(stand_in, colour)
    return Markup(text)


def _names(axes: Axes, points: Sequence[Point]) -> None:
    """Write each name beside its point, above or below it where the names before it are in the way."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    taken: list[Bbox] = []
    for point in sorted(points, key=lambda point: (not point.on_front, point.speedup)):
        for offset, align in _PLACES:
            text = axes.annotate(
                point.name,
                (point.speedup, point.quality_drop),
                xytext=offset,
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=8,
                color=FG if point.on_front else MUTED,
            )
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            # The table has those that find no room.
            continue
        taken.append(box)
