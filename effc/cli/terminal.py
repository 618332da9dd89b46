"""What commands write to the terminal: progress on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from effc.compiler.progress import Progress


@contextmanager
def progress_bar(show: bool) -> Iterator[Progress | None]:
    """A rich progress bar on stderr, or nothing."""
    if not show:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def print_json(value: Any) -> None:
    """Print plain values as the one object on stdout; what JSON does not know becomes text."""
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def plain(record: Any) -> Any:
    """JSON values of a record; infinities become text."""
    return json.loads(record.model_dump_json())
