"""Flags that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from effc.errors import UsageError

Command = Callable[..., Any]


def common(command: Command) -> Command:
    """The flags that every command takes."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)
    command = click.option("--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """The lengths that a flag lists, None where it is not given.

    Raises:
        UsageError: if it is no list of whole numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"'{text}' is not a list of lengths.", "Write, for example, --lengths 512,1024.") from None
