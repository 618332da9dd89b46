"""``effc doctor``."""

from __future__ import annotations

import click
from rich.console import Console

from effc.cli.flags import common
from effc.cli.terminal import plain, print_json


@click.command()
@common
def doctor(as_json: bool, quiet: bool, debug: bool) -> int:
    """Say what this machine can do, and how to install what is missing."""
    from effc.compiler.doctor import diagnose
    from effc.compiler.doctor_report import render

    report = diagnose()
    if as_json:
        print_json(plain(report))
    elif not quiet:
        render(report, Console())
    return 0
