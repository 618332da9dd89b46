"""``effc attention``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from effc.cli.flags import common
from effc.cli.terminal import print_json, progress_bar
from effc.errors import UsageError


@click.command()
@click.argument("subject", required=False, metavar="[PATTERN or MODEL]")
@click.option("--list", "list_forms", is_flag=True, help="List every form, its parameters and its source.")
@click.option("--length", type=int, help="Tokens to draw a pattern at; 64 when not given.")
@click.option("--causal", is_flag=True, help="Draw a pattern as a decoder sees it.")
@click.option("--head-dim", type=int, help="Numbers per head that a pattern's cost is counted for; 64 when not given.")
@click.option("--text", type=click.Path(), help="Text, .jsonl or .csv file to run MODEL on.")
@click.option("--samples", type=int, help="Texts to run MODEL on; 8 when not given.")
@click.option("--max-length", type=int, help="Tokens per text; 512 when not given.")
@click.option("--candidates", help="Patterns whose share of MODEL's attention is counted: local:128,local:256|sinks:4.")
@click.option("--task", help="MODEL's task; detected from the config when not given.")
@click.option("--revision", help="Hub branch, tag or commit of MODEL.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that MODEL brings along.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the picture to this .png, .svg or .pdf.")
@common
def attention(
    subject: str | None,
    list_forms: bool,
    save: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> int:
    """Draw an attention PATTERN with its cost, or measure where a MODEL's attention goes on --text."""
    from effc.compiler.attention_show import show_forms, show_mass, show_picture

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if list_forms:
        _refuse_options(given | ({"save": save} if save else {}), (), "with --list")
        if as_json:
            from effc.compiler.attention_pictures import attention_forms

            print_json(attention_forms())
        elif not quiet:
            show_forms(Console())
        return 0
    if subject is None:
        raise UsageError(
            "There is nothing to show.", "Give a pattern such as local:256, a model with --text, or --list."
        )
    if "text" not in given:
        _refuse_options(given, ("length", "causal", "head_dim"), "for a pattern (a model also needs --text)")
        from effc.compiler.attention_pictures import draw

        picture = draw(subject, **given)
        if save:
            picture.save(save)
        if as_json:
            print_json(picture.as_json())
        elif not quiet:
            show_picture(picture, Console())
        return 0
    _refuse_options(given, tuple(set(options) - {"length", "causal", "head_dim"}), "for a model")
    from effc.compiler.attention_mass import attention_mass

    if "candidates" in given:
        given["candidates"] = [part.strip() for part in given["candidates"].split(",")]
    with progress_bar(not (quiet or as_json)) as progress:
        mass = attention_mass(subject, progress=progress, **given)
    if save:
        mass.save(save)
    if as_json:
        print_json(mass.as_json())
    elif not quiet:
        show_mass(mass, Console())
    return 0


def _refuse_options(given: dict[str, Any], known: tuple[str, ...], why: str) -> None:
    """An option that has no meaning here is an error, not ignored."""
    for name in given:
        if name not in known:
            raise UsageError(f"--{name.replace('_', '-')} means nothing {why}.", "Leave it out.")
