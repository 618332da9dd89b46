"""Show what a load test measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from effc.serving.load_result import LoadResult


def show_load(result: LoadResult, console: Console) -> None:
    """As a table."""
    tool = "" if result.tool == "effc" else f" by {result.tool}"
    title = f"{result.model}, {result.mode} loop{tool}, {result.requests} requests in {result.seconds:.1f} s"
    table = Table("ms", "mean", "p50", "p95", "p99", "max", title=title)
    for name, values in (("answer", result.latency), ("first token", result.first_token)):
        if values is not None:
            shown = (values.mean, values.p50, values.p95, values.p99, values.maximum)
            table.add_row(name, *(f"{value:.1f}" for value in shown))
    console.print(table)
    tokens = f", {result.tokens_per_s:.1f} tokens/s" if result.first_token is not None else ""
    console.print(f"{result.throughput:.1f} answers/s{tokens}, {result.failed} errors")
    for error, count in result.errors.items():
        console.print(f"{count} x {error}", markup=False)
