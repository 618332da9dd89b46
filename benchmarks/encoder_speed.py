"""A BERT-base-sized encoder with random weights: local attention and INT8 against the dense fp32 twin.

Prints CPU-time ratios and peak memory of three models, each in its own process, taking turns in one run: the compiled
one, the dense twin (fused), and the plain dense export without any fusion. ``--native`` lets effc's kernels run;
without it the standard-operator bodies do.

    python benchmarks/encoder_speed.py --length 4096
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import effc
from effc.compiler.bench import Candidate, measure
from effc.compiler.feeds import TensorSpec
from effc.compiler.machine import usable_cores
from effc.compiler.runtime import loadable_native_library
from effc.compiler.twin import dense_twin
from effc.exporters.onnx_graph import export_onnx, save_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--attention", default="local:256")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, output, plain = (Path(folder) / name for name in ("source", "compiled", "plain"))
        config = BertConfig(num_hidden_layers=options.layers, max_position_embeddings=options.length)
        BertModel(config, add_pooling_layer=False).eval().save_pretrained(source)
        artifact = effc.compile(
            source,
            attention=options.attention,
            quantization=options.quantization,
            output=output,
            bench={"enabled": False},
            verify={"samples": 1, "max_length": 128},
        )
        twin = dense_twin(artifact.manifest)
        _plain_dense(source, plain)
        library = loadable_native_library() if options.native else None
        timings = measure(
            {
                "plain dense": Candidate(plain / "model.onnx"),
                "dense twin": Candidate(twin),
                "compiled": Candidate(output / "model.onnx", library),
            },
            [TensorSpec.of_record(record) for record in artifact.manifest.inputs],
            length=options.length,
            batch=1,
            rounds=options.rounds,
            threads=usable_cores(),
        )
    compiled = timings["compiled"]
    rows = {
        name: {
            "cpu_ms": timing.cpu_ms,
            "peak_rss_mib": timing.peak_rss_mib,
            "speedup_of_compiled": timing.cpu_ms / compiled.cpu_ms,
            "memory_of_compiled": compiled.peak_rss_mib / timing.peak_rss_mib,
        }
        for name, timing in timings.items()
    }
    if options.json:
        print(json.dumps({"length": options.length, "native": bool(library), "models": rows}, indent=2))
        return
    print(f"{options.layers} x 768, {options.length} tokens, {options.attention} + {options.quantization}, ", end="")
    print("native kernels" if library else "standard operators")
    for name, row in rows.items():
        print(
            f"{name:12s} {row['cpu_ms']:9.0f} ms CPU  {row['peak_rss_mib']:7.0f} MiB peak   compiled: "
            f"{row['speedup_of_compiled']:.2f}x the speed, {row['memory_of_compiled']:.2f}x the memory"
        )


def _plain_dense(source: Path, directory: Path) -> None:
    """What transformers' exporter makes of the untouched model, no fusion at all."""
    inputs = {name: torch.ones((2, 24), dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    directory.mkdir()
    model = BertModel.from_pretrained(source, add_pooling_layer=False).eval()
    save_onnx(export_onnx(model, inputs, axes), directory / "model.onnx")


if __name__ == "__main__":
    main()
