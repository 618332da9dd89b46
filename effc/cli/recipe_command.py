"""``effc recipe``."""

from __future__ import annotations

import click

from effc.cli.flags import common
from effc.cli.terminal import plain, print_json
from effc.compiler.recipe import build_recipe, load_recipe


@click.group()
def recipe() -> None:
    """Work with recipes."""


@recipe.command()
@click.argument("path", required=False, type=click.Path())
@common
def show(path: str | None, as_json: bool, quiet: bool, debug: bool) -> int:
    """Print the full recipe with defaults, or that of a recipe file."""
    whole = build_recipe(load_recipe(path) if path else {}, origin=path or "the recipe")
    if as_json:
        print_json(plain(whole))
    elif not quiet:
        click.echo(whole.to_yaml(), nl=False)
    return 0
