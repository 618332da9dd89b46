"""The figure of :class:`effc.compiler.attention_mass.AttentionMass`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from effc.compiler.attention_mass import AttentionMass


def mass_figure(mass: AttentionMass) -> Figure:
    """Three panels: mass over distance per layer, mean distance per layer and head, share that candidates keep."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    by_distance, heads, kept = figure.subplots(1, 3)
    last = max(1, len(mass.layers) - 1)
    edges = mass.edges()
    # Bins are drawn at their lower edge, 0 at one half, so that a logarithmic axis can show it.
    places = np.array([0.5, *edges[1:-1]])
    colours = ScalarMappable(Normalize(0, last), "viridis")
    for number, layer in enumerate(mass.layers):
        by_distance.plot(
            places, layer.by_distance(edges).mean(axis=0), color=colours.to_rgba(np.array(number)), linewidth=1.4
        )
    by_distance.set_xscale("log", base=2)
    by_distance.set_xticks(places, ["0", *(str(edge) for edge in edges[1:-1])], rotation=45)
    by_distance.minorticks_off()
    by_distance.set_xlabel("distance in tokens, from ... to double")
    by_distance.set_ylabel("share of attention, mean over heads")
    by_distance.set_title("Attention by distance", loc="left")
    figure.colorbar(colours, ax=by_distance, label="layer")

    width = max(len(layer.mean_distance) for layer in mass.layers)
    distances = np.full((len(mass.layers), width), np.nan)
    for number, layer in enumerate(mass.layers):
        distances[number, : len(layer.mean_distance)] = layer.mean_distance
    image = heads.imshow(distances, cmap="magma", aspect="auto", interpolation="nearest")
    heads.set_xlabel("head")
    heads.set_ylabel("layer")
    for axis in (heads.xaxis, heads.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    heads.set_title("Mean distance in tokens", loc="left")
    figure.colorbar(image, ax=heads)

    for candidate in mass.candidates:
        shares = np.array([layer.kept[candidate].mean() for layer in mass.layers])
        kept.plot(np.arange(len(shares)), shares, marker="o", markersize=3, label=candidate)
    kept.set_ylim(0, 1.02)
    kept.xaxis.set_major_locator(MaxNLocator(integer=True))
    kept.set_xlabel("layer")
    kept.set_ylabel("share of attention kept, mean over heads")
    kept.set_title("What a pattern keeps", loc="left")
    kept.legend(fontsize="small")
    figure.suptitle(
        f"{mass.model}: {mass.samples} texts, {mass.tokens} tokens, the longest {mass.longest}", x=0.01, ha="left"
    )
    return figure
