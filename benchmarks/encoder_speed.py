"""A BERT-base-sized encoder with random weights: local attention and INT8 against the dense model, on ONNX Runtime and
on OpenVINO.

Prints CPU time, wall time and peak memory of the models, each in its own process, taking turns in one run: the compiled
one, its dense twin (fused fp32, the fastest dense form on ONNX Runtime) and, with ``--plain``, the dense export without
any fusion. ``--native`` lets effc's kernels run; without it the standard-operator bodies do.

    python benchmarks/encoder_speed.py --length 4096 --native --plain
    python benchmarks/encoder_speed.py --length 4096 --native --openvino PYTHON

``--openvino`` adds the dense model on OpenVINO in bf16 and in INT8 (quantized by NNCF), run by a Python that has both:
``python -m venv ov && ov/bin/pip install openvino nncf``, then ``--openvino ov/bin/python``. ``--folder`` keeps the
models for the next run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BertConfig, BertModel

import effc
from effc.compiler.artifact_files import read_manifest
from effc.compiler.bench_process import Worker
from effc.compiler.feeds import TensorSpec
from effc.compiler.machine import usable_cores
from effc.compiler.native_choice import loadable_native_library
from effc.compiler.twin import dense_twin
from effc.exporters.onnx_graph import export_onnx, save_onnx

OPENVINO_FORMS = ("bf16", "int8")


class OpenVinoWorker(Worker):
    """The same protocol, spoken by another Python."""

    def __init__(self, name: str, model: Path, python: str):
        super().__init__(name, model)
        self._python = python

    def command(self) -> list[str]:
        return [self._python, str(Path(__file__).with_name("openvino_worker.py"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--attention", default="local:256")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--plain", action="store_true", help="also the dense export without fusion")
    parser.add_argument("--openvino", metavar="PYTHON", help="also dense on OpenVINO, by a Python that has it")
    parser.add_argument("--no-twin", action="store_true", help="leave out the dense twin, which takes the longest")
    parser.add_argument("--folder", type=Path, default=None, help="keep the models here, and use those that are there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.openvino:
        _check_openvino(options.openvino)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        rows = _measure(options, _models(options, folder), read_manifest(folder / "compiled"))
    if options.json:
        print(json.dumps({"length": options.length, "native": options.native, "models": rows}, indent=2))
        return
    print(f"{options.layers} x 768, {options.length} tokens, {options.attention} + {options.quantization}, ", end="")
    print("native kernels" if options.native else "standard operators")
    for name, row in rows.items():
        print(
            f"{name:13s} {row['cpu_ms']:9.0f} ms CPU {row['wall_ms']:9.0f} ms wall {row['peak_rss_mib']:7.0f} MiB peak"
            f"   compiled: {row['speedup_of_compiled']:.2f}x the speed ({row['wall_speedup_of_compiled']:.2f}x by wall"
            f" time), {row['memory_of_compiled']:.2f}x the memory"
        )


def _models(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The .onnx files of the source, the compiled one first; what is not there yet is made."""
    source, output, plain = (folder / name for name in ("source", "compiled", "plain"))
    if not output.exists():
        config = BertConfig(num_hidden_layers=options.layers, max_position_embeddings=options.length)
        BertModel(config, add_pooling_layer=False).eval().save_pretrained(source)
        effc.compile(
            source,
            attention=options.attention,
            quantization=options.quantization,
            output=output,
            bench={"enabled": False},
            verify={"samples": 1, "max_length": 128},
        )
    models = {"compiled": output / "model.onnx"}
    if not options.no_twin:
        models["dense twin"] = dense_twin(read_manifest(output))
    if (options.plain or options.openvino) and not plain.exists():
        _plain_dense(source, plain)
    if options.plain:
        models["plain dense"] = plain / "model.onnx"
    for form in OPENVINO_FORMS if options.openvino else ():
        models[f"openvino {form}"] = plain / "model.onnx"
    return models


def _measure(options: argparse.Namespace, models: dict[str, Path], manifest: Any) -> dict[str, dict[str, float]]:
    """All models on random inputs of one length, taking turns."""
    library = loadable_native_library() if options.native else None
    specs = [TensorSpec.of_record(record) for record in manifest.inputs]
    request = {"command": "open", "threads": usable_cores(), "batch": 1, "length": options.length, "seed": 0}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, model in models.items():
            own: dict[str, Any] = {"model": str(model), "inputs": [spec.to_json() for spec in specs], "library": None}
            if name.startswith("openvino"):
                workers[name] = stack.enter_context(OpenVinoWorker(name, model, options.openvino))
                own = {"model": str(model), "form": name.split()[1], "vocabulary": BertConfig().vocab_size}
            else:
                workers[name] = stack.enter_context(Worker(name, model))
                own["library"] = str(library) if library and name == "compiled" else None
            workers[name].ask(**request, **own)
            workers[name].ask(command="run", seconds=0)
        for _ in range(options.rounds):
            for name, worker in workers.items():
                answer = worker.ask(command="run", seconds=0.3)
                runs[name].extend(zip(answer["cpu_ms"], answer["wall_ms"], strict=True))
        peaks = {name: worker.ask(command="memory")["peak_rss_mib"] for name, worker in workers.items()}
    cpu = {name: median(run[0] for run in own_runs) for name, own_runs in runs.items()}
    wall = {name: median(run[1] for run in own_runs) for name, own_runs in runs.items()}
    return {
        name: {
            "cpu_ms": cpu[name],
            "wall_ms": wall[name],
            "peak_rss_mib": peaks[name],
            "speedup_of_compiled": cpu[name] / cpu["compiled"],
            "wall_speedup_of_compiled": wall[name] / wall["compiled"],
            "memory_of_compiled": peaks["compiled"] / peaks[name],
        }
        for name in models
    }


def _check_openvino(python: str) -> None:
    try:
        done = subprocess.run([python, "-c", "import openvino, nncf"], capture_output=True, text=True, check=False)
        problem = (done.stderr.strip().splitlines() or ["it ended early"])[-1] if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise SystemExit(f"--openvino {python}: {problem}. Give a Python into which openvino and nncf are installed.")


def _plain_dense(source: Path, directory: Path) -> None:
    """What transformers' exporter makes of the untouched model, no fusion at all."""
    inputs = {name: torch.ones((2, 24), dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    directory.mkdir()
    model = BertModel.from_pretrained(source, add_pooling_layer=False).eval()
    save_onnx(export_onnx(model, inputs, axes), directory / "model.onnx")


if __name__ == "__main__":
    main()
