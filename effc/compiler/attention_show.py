"""Attention forms, pictures and mass on a terminal."""

from __future__ import annotations

from itertools import pairwise

from rich.console import Console
from rich.table import Table

from effc.compiler.attention_mass import AttentionMass
from effc.compiler.attention_pictures import AttentionPicture, attention_forms

# Texts too short to tell windows apart.
_SHORT = 64


def show_forms(console: Console) -> None:
    """Every form, one table a group."""
    forms = attention_forms()
    for group in dict.fromkeys(form["group"] for form in forms):
        table = Table(title=group, title_justify="left", expand=True)
        for name, ratio in (("form", 4), ("what it computes", 6), ("source", 3)):
            table.add_column(name, ratio=ratio, overflow="fold")
        for form in forms:
            if form["group"] == group:
                # Brackets are part of the syntax, not markup.
                table.add_row(form["syntax"].replace("[", r"\["), form["summary"], form["source"])
        console.print(table)


def show_picture(picture: AttentionPicture, console: Console) -> None:
    """The drawing and what it costs at a few lengths."""
    direction = "causal" if picture.causal else "bidirectional"
    console.print(
        f"{picture.form}, {direction}, {picture.length} tokens; queries go down, keys to the right", markup=False
    )
    console.print(picture.as_text(console.width), highlight=False, markup=False)
    table = Table("tokens", "visible pairs", "density", "MFLOP a head", "of dense")
    for column in table.columns:
        column.justify = "right"
    for cost in picture.costs:
        pairs = "-" if cost.pairs is None else f"{cost.pairs:,}"
        density = "-" if cost.density is None else f"{cost.density:.2%}"
        table.add_row(f"{cost.length:,}", pairs, density, f"{cost.flops / 1e6:,.2f}", f"{cost.share:.3f}")
    console.print(table)


def show_mass(mass: AttentionMass, console: Console) -> None:
    """Share of attention by distance and the share that candidates keep, by layer."""
    edges = mass.edges()
    # Bins of a factor of four are enough for a terminal.
    edges = [0, 1, *[edge for edge in edges[2:-1] if edge.bit_length() % 2 == 1], edges[-1]]
    table = Table("layer", "mean distance", title="Attention by distance, mean over heads", title_justify="left")
    for low, high in pairwise(edges):
        table.add_column(str(low) if high == low + 1 else f"{low}-{min(high, mass.longest) - 1}", justify="right")
    for number, layer in enumerate(mass.layers):
        shares = layer.by_distance(edges).mean(axis=0)
        table.add_row(str(number), f"{layer.mean_distance.mean():.1f}", *(f"{share:.3f}" for share in shares))
    console.print(table)
    kept = Table("layer", title="Share of attention that a pattern keeps, mean (lowest head)", title_justify="left")
    for candidate in mass.candidates:
        kept.add_column(candidate, justify="right", overflow="fold")
    for number, layer in enumerate(mass.layers):
        values = [layer.kept[candidate] for candidate in mass.candidates]
        kept.add_row(str(number), *(f"{value.mean():.3f} ({value.min():.3f})" for value in values))
    kept.add_section()
    kept.add_row("all", *(f"{mass.overall(candidate):.3f}" for candidate in mass.candidates))
    console.print(kept)
    console.print(
        f"{mass.samples} texts of {mass.data}, {mass.tokens:,} tokens, the longest {mass.longest:,}", soft_wrap=True
    )
    if mass.longest <= _SHORT:
        console.print("These texts are short: every window sees most of them. Give longer ones.")
