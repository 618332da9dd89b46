"""What ``effc doctor`` found, and how it is shown."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effc.compiler.machine import Machine

Status = Literal["ok", "missing", "broken", "n/a"]


class Check(BaseModel):
    """One thing that effc uses.

    Attributes:
        group: heading it is shown under.
        status: ``ok``; ``missing``; ``broken``: there, but not usable; ``n/a``: of no use on this machine.
        version: what was found, None if nothing or if it does not tell.
        tested: release line that effc is tested with, where there is one.
        purpose: what effc uses it for.
        detail: what was found out, in particular why it is broken or not applicable.
        command: what installs or repairs it.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    group: str
    status: Status
    version: str | None = None
    tested: str | None = None
    purpose: str
    detail: str | None = None
    command: str | None = None

    @property
    def untested_version(self) -> bool:
        """True if another release line than the tested one is installed."""
        if self.version is None or self.tested is None:
            return False
        return self.version.split("+")[0].split(".")[:2] != self.tested.split(".")[:2]


class DoctorReport(BaseModel):
    """Everything ``effc doctor`` found."""

    model_config = ConfigDict(extra="forbid")

    effc_version: str
    machine: Machine
    checks: list[Check]

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)


def render(report: DoctorReport, console: Console) -> None:
    """Print a report as a table per group, followed by the commands that install what is missing."""
    machine = report.machine
    console.print(f"[bold]effc {report.effc_version}[/] · Python {machine.python} · {machine.system}", highlight=False)
    quota = "" if machine.cpu_quota is None else f", cgroup limit {machine.cpu_quota:g}"
    memory = "unknown memory" if machine.memory_gib is None else f"{machine.memory_gib:g} GiB"
    console.print(
        f"{machine.cpu} · {machine.usable_cores} usable cores of {machine.physical_cores or '?'} "
        f"({machine.affinity_cpus} of {machine.logical_cpus} threads{quota}) · {memory}",
        highlight=False,
    )
    console.print(f"vector units: {', '.join(machine.isa) or 'unknown'}\n", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = None
    for check in report.checks:
        if check.group != group:
            if group is not None:
                table.add_row()
            table.add_row(Text(check.group, style="bold"))
            group = check.group
        table.add_row(
            Text(check.status, style={"ok": "green", "missing": "yellow", "broken": "red", "n/a": "dim"}[check.status]),
            check.name,
            Text(check.version or "", style="yellow" if check.untested_version else ""),
            Text(_remark(check)),
        )
    console.print(table)
    commands: dict[str, list[str]] = {}
    for check in report.checks:
        if check.command and check.status in ("missing", "broken"):
            commands.setdefault(check.command, []).append(check.name)
    if commands:
        console.print("\n[bold]To install or repair[/]")
        for command, names in commands.items():
            console.print(Text.assemble("  ", (command, "cyan"), f"   # {', '.join(names)}"), soft_wrap=True)


def _remark(check: Check) -> str:
    parts = [check.purpose]
    if check.untested_version:
        parts.append(f"tested with {check.tested}")
    if check.detail:
        parts.append(check.detail)
    return "; ".join(parts)
