"""The training curves of a recovery, for the report."""

from __future__ import annotations

from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from effc.compiler.manifest import PassRecord
from effc.compiler.report_plots import COMPILED, HEIGHT, STYLE, WARN, WIDTH, as_svg


def recovery_record(passes: list[PassRecord]) -> dict[str, Any] | None:
    """The figures of the pass that trained the model, None if none did."""
    return next(
        (record.metrics for record in passes if record.name == "recover" and record.metrics.get("stages")), None
    )


def recovery_curves(record: dict[str, Any]) -> Markup:
    """One panel for each stage: training and held-out loss over steps, logarithmic."""
    stages = record["stages"]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "recovery"}):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(stages) * 0.8), layout="constrained")
        for axes, stage in zip(figure.subplots(len(stages), 1, squeeze=False)[:, 0], stages, strict=True):
            if stage["curve"]:
                axes.plot(*zip(*stage["curve"], strict=True), color=WARN, linewidth=1.4)
            axes.plot(*zip(*stage["held_out"], strict=True), color=COMPILED, linewidth=1.8, marker="o", markersize=4)
            axes.set_yscale("log")
            axes.grid(axis="y", which="both")
            axes.set_xlabel(f"steps of {stage['name'].replace('-', ' ')}")
            axes.set_ylabel("loss")
        return as_svg(figure, "Loss over the steps of the recovery")
