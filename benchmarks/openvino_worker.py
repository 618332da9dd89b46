"""One model on OpenVINO's CPU device in a process of its own, for benchmarks/encoder_speed.py.

Runs in whichever Python has OpenVINO, and NNCF for INT8, because neither is a dependency of effc. Speaks the protocol
of ``effc.compiler.bench_worker``: one JSON request per line, one JSON answer each. ``open`` also takes ``form``: f32
and bf16 say what floating-point layers are computed in, int8 quantizes weights and activations after training and
leaves the rest to OpenVINO's own choice, which is bf16 where the CPU has it.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    compiled, feeds = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "open":
            compiled, feeds = open_model(request)
            answer = {}
        elif request["command"] == "run":
            answer = run(compiled, feeds, request["seconds"])
        else:
            answer = {"peak_rss_mib": peak_rss_mib()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def open_model(request):
    import openvino

    core = openvino.Core()
    model = core.read_model(request["model"])
    names = [sorted(port.get_names())[0] for port in model.inputs]
    if request["form"] == "int8":
        import nncf

        samples = [inputs(names, request["vocabulary"], 1, 128, seed) for seed in range(8)]
        model = nncf.quantize(
            model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": request["threads"]}
    if request["form"] != "int8":
        settings["INFERENCE_PRECISION_HINT"] = request["form"]
    compiled = core.compile_model(model, "CPU", settings)
    return compiled, inputs(names, request["vocabulary"], request["batch"], request["length"], 0)


def inputs(names, vocabulary, batch, length, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (batch, length), dtype=np.int64)
    others = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: others.get(name, ids) for name in names}


def run(compiled, feeds, seconds):
    cpu_ms, wall_ms, end = [], [], time.perf_counter() + seconds
    while not wall_ms or time.perf_counter() < end:
        cpu, wall = time.process_time(), time.perf_counter()
        compiled(feeds)
        wall_ms.append((time.perf_counter() - wall) * 1e3)
        cpu_ms.append((time.process_time() - cpu) * 1e3)
    return {"cpu_ms": cpu_ms, "wall_ms": wall_ms}


def peak_rss_mib():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
