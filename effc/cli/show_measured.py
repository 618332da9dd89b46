"""What was measured of artifacts, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from effc.compiler.manifest import BenchRecord, SpeedRecord, VerifyRecord

if TYPE_CHECKING:
    from effc.compiler.compare import Comparison


def show_verification(record: VerifyRecord | None) -> None:
    """Quality against the untouched model, by output, and the one number of the task."""
    if record is None:
        return
    table = Table("output", "relative error", "cosine", "top-1 agreement", title=f"Quality on {record.data}")
    for name, deviation in record.outputs.items():
        top1 = "" if deviation.top1_agreement is None else f"{deviation.top1_agreement:.4f}"
        table.add_row(name, f"{deviation.relative_error:.4f}", f"{deviation.cosine:.4f}", top1)
    console = Console()
    console.print(table)
    console.print(f"Quality drop ({record.quality_metric}): {record.quality_drop:.4f}, {record.samples} samples")
    if record.extended is not None:
        beyond = record.extended
        console.print(
            f"At {beyond.length} tokens, to {beyond.reference}: {beyond.quality_drop:.4f}, {beyond.samples} samples"
        )


def show_benchmark(record: BenchRecord | None) -> None:
    """Speed against the dense twin, by length, of a run and of a token that is written."""
    if record is None:
        return
    _show_speed(record, f"CPU time against {record.dense_form}")
    if record.decode is not None:
        _show_speed(record.decode, f"CPU time to write the token at that place, against {record.decode.dense_form}")
    if record.not_written is not None:
        click.echo(f"Writing was not measured: {record.not_written}")


def _show_speed(record: SpeedRecord, title: str) -> None:
    table = Table("tokens", "dense ms", "compiled ms", "speed-up", "memory", title=title)
    for length in map(str, record.lengths):
        table.add_row(
            length,
            f"{record.dense[length].cpu_ms:.1f}",
            f"{record.compiled[length].cpu_ms:.1f}",
            f"{record.speedup[length]:.2f}x",
            f"{record.memory_ratio[length]:.2f}x",
        )
    Console().print(table)


def show_comparison(comparison: Comparison) -> None:
    """Artifacts of one model side by side."""
    places = comparison.token_places
    tokens = [f"token at {place:,}" for place in places]
    table = Table("artifact", "flags", "quality drop", "speed-up", "memory", "MB", *tokens, title=comparison.source)
    for one in comparison.contenders:
        figures = [f"{one.speedup:.2f}x", f"{one.memory_ratio:.2f}x", f"{one.bytes / 1e6:.0f}"]
        figures += [one.token(place).replace("×", "x") for place in places]
        table.add_row(one.name, one.flags, f"{one.quality_drop:.4f}", *figures, style="bold" if one.on_front else None)
    Console().print(table)
    click.echo(comparison.caption)
