"""Draw attention forms side by side into one picture, as in docs/attention.md.

python scripts/draw_forms.py docs/attention-forms.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from effc.plugins.forms.registry import parse_form

# Parameters small enough to see their effect at this length.
LENGTH = 256
FORMS = (
    "local:32",
    "dilated:32:4",
    "block:32:1",
    "strided:16",
    "random:1",
    "global:8",
    "sinks:8",
    "longformer:32:8",
    "bigbird:32:1:16",
    "lsg:32:4:8",
    "hierarchical:8",
    "chunked:64:gate",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    figure, axes = pyplot.subplots(3, len(FORMS) // 3, figsize=(10, 8))
    for axis, text in zip(axes.flat, FORMS, strict=True):
        # A root, so that what is seen in summary shows beside what is seen exactly.
        axis.imshow(parse_form(text).picture(LENGTH, causal=False) ** 0.4, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(text, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"Which keys (columns) a query (row) sees, {LENGTH} tokens", fontsize=10)
    figure.tight_layout()
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
