"""Standard-operator bodies of attention forms against the dense one, one layer, no native kernels.

The dense body is ONNX Runtime's fused kernel (MultiHeadAttention, causal GroupQueryAttention). All take turns in one
run; times are process CPU time over threads. The floor of a form is what its matrix products would take at the rate at
which this machine multiplies large matrices, or what reading its inputs and writing its output would take at the rate
at which it copies memory, whichever is longer. With --memory, each form and length runs in a process of its own, and
what is printed is by how much its peak resident set grows from before the first run to after the last.

    python benchmarks/attention_bodies.py --attention local:256 --attention bigbird --lengths 4096,8192
    python benchmarks/attention_bodies.py --attention linear:elu --causal --lengths 4096
    python benchmarks/attention_bodies.py --attention local:256 --lengths 4096,8192,16384 --memory
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from effc.compiler.bench import measure
from effc.compiler.bench_process import Candidate, Worker
from effc.compiler.feeds import TensorSpec
from effc.compiler.machine import usable_cores
from effc.plugins.bodies import OPSET
from effc.plugins.forms.registry import parse_form
from effc.plugins.function_body import function_body
from effc.plugins.operator import DOMAIN, AttentionGeometry, optional_inputs
from effc.plugins.pattern import DENSE
from effc.plugins.reference import initial_parameters

# Tokens that forms such as global:sep name stand this far apart.
MARK_EVERY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", action="append", help="a form; may be given more than once (local:256)")
    parser.add_argument("--lengths", default="4096", help="tokens, joined by commas")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, help="as many as heads if not given")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--masked", action="store_true", help="give every layer a padding mask that hides nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of work per form, length and round")
    parser.add_argument("--memory", action="store_true", help="measure peak memory in place of time")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        layers = {}
        for text in dict.fromkeys([str(DENSE), *(options.attention or ["local:256"])]):
            geometry = AttentionGeometry(
                parse_form(text),
                options.causal,
                options.heads,
                options.kv_heads or options.heads,
                options.head_dim,
                options.head_dim**-0.5,
            )
            path = Path(folder) / f"{len(layers)}.onnx"
            onnx.save(layer(geometry, options.masked), path)
            layers[text] = Layer(geometry, Candidate(path))
        (memory if options.memory else speed)(layers, lengths, options)


@dataclass(frozen=True)
class Layer:
    """One operator and the model file that holds nothing else."""

    geometry: AttentionGeometry
    candidate: Candidate


def speed(layers: Mapping[str, Layer], lengths: list[int], options: argparse.Namespace) -> None:
    """Print times, ratios and floors."""
    threads = usable_cores()
    gflops, gbytes = multiply_rate(), copy_rate()
    print(f"one core: {gflops:.0f} GFLOP/s in fp32 matrix products, copies {gbytes:.1f} GB/s")
    for length in lengths:
        timings = measure(
            {name: layer.candidate for name, layer in layers.items()},
            specs(next(iter(layers.values())).geometry, options.masked),
            length=length,
            batch=options.batch,
            rounds=options.rounds,
            threads=threads,
            seconds=options.seconds,
        )
        dense = timings[str(DENSE)]
        print(
            f"\n{length} tokens, batch {options.batch}, {options.heads} x {options.head_dim}, "
            f"{'causal' if options.causal else 'bidirectional'}, CPU ms / {threads}"
        )
        for name, timing in timings.items():
            geometry = layers[name].geometry
            flops = geometry.form.cost(length, options.causal, options.head_dim).flops * options.heads * options.batch
            moved = 8 * options.batch * length * options.head_dim * (options.heads + geometry.kv_heads)
            floor = max(flops / gflops, moved / gbytes) / 1e6 / threads
            whole = DENSE.cost(length, options.causal, options.head_dim).flops * options.heads * options.batch
            print(
                f"{name:28s} median {timing.cpu_ms / threads:8.1f}  min {timing.cpu_ms_min / threads:8.1f}   "
                f"{dense.cpu_ms / timing.cpu_ms:6.2f}x dense by medians, "
                f"{dense.cpu_ms_min / timing.cpu_ms_min:6.2f}x by minima   "
                f"{flops / 1e9:7.2f} GFLOP ({flops / whole:6.1%} of dense), {moved / 1e6:5.0f} MB, "
                f"floor {floor:6.1f} ms"
            )


def memory(layers: Mapping[str, Layer], lengths: list[int], options: argparse.Namespace) -> None:
    """Print growth of the peak resident set, and its ratio from one length to the next."""
    print(f"growth of peak memory, MiB, batch {options.batch}, {options.heads} x {options.head_dim}")
    for name, layer_ in layers.items():
        grown = []
        for length in lengths:
            with Worker(name, layer_.candidate.model) as worker:
                inputs = [spec.to_json() for spec in specs(layer_.geometry, options.masked)]
                worker.ask(
                    command="open",
                    model=str(layer_.candidate.model),
                    library=None,
                    inputs=inputs,
                    batch=options.batch,
                    length=length,
                    threads=usable_cores(),
                    seed=0,
                )
                before = worker.ask(command="memory")["peak_rss_mib"]
                for _ in range(2):
                    worker.ask(command="run", seconds=0)
                grown.append(worker.ask(command="memory")["peak_rss_mib"] - before)
        ratios = [f"{after / before:.2f}x" if before else "from nothing" for before, after in pairwise(grown)]
        figures = ", ".join(f"{length}: {size:.0f}" for length, size in zip(lengths, grown, strict=True))
        print(f"{name:28s} {figures}   from one to the next {', '.join(ratios)}")


def specs(geometry: AttentionGeometry, masked: bool) -> list[TensorSpec]:
    """The layer's inputs."""
    widths = {name: geometry.kv_heads * geometry.head_dim for name in ("key", "value")}
    widths["query"] = geometry.num_heads * geometry.head_dim
    result = [TensorSpec(name, "float32", ("batch", "sequence", widths[name])) for name in ("query", "key", "value")]
    return [*result, TensorSpec("attention_mask", "int64", ("batch", "sequence"))] if masked else result


def layer(geometry: AttentionGeometry, masked: bool = False) -> onnx.ModelProto:
    """One operator node with its body; what the form learns are its initial values."""
    form = geometry.form
    parameters = initial_parameters(form, geometry.num_heads, geometry.kv_heads, geometry.head_dim, 0)
    initializers = [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in parameters.items()]
    marked = bool(getattr(form, "tokens", ()))
    given = set(parameters) | ({"marks"} if marked else set()) | ({"key_mask"} if masked else set())
    nodes = []
    if masked:
        nodes.append(helper.make_node("Cast", ["attention_mask"], ["key_mask"], to=TensorProto.BOOL))
    if marked:
        nodes += _marks()
    optional = [name if name in given else "" for name in optional_inputs(form)]
    while optional and not optional[-1]:
        optional.pop()
    body = ir.serde.serialize_function(function_body(geometry, frozenset(given)))
    nodes.append(
        helper.make_node(
            form.op_type,
            ["query", "key", "value", *optional],
            ["output"],
            domain=DOMAIN,
            overload=body.overload,
            pattern=str(form),
            causal=int(geometry.causal),
            num_heads=geometry.num_heads,
            kv_num_heads=geometry.kv_heads,
            scale=geometry.scale,
        )
    )
    inputs = [
        helper.make_tensor_value_info(
            spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), list(spec.shape)
        )
        for spec in specs(geometry, masked)
    ]
    width = geometry.num_heads * geometry.head_dim
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "sequence", width])
    return helper.make_model(
        helper.make_graph(nodes, "layer", inputs, [output], initializers),
        functions=[body],
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid(DOMAIN, 1),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )


def _marks() -> list[onnx.NodeProto]:
    """Nodes that mark one token in every ``MARK_EVERY``."""
    constants = {"zero": 0, "one": 1, "apart": MARK_EVERY}
    return [
        *(
            helper.make_node("Constant", [], [f"marks_{name}"], value=numpy_helper.from_array(np.array(value)))
            for name, value in constants.items()
        ),
        helper.make_node("Shape", ["key"], ["marks_shape"], start=0, end=2),
        helper.make_node("Gather", ["marks_shape", "marks_one"], ["marks_length"]),
        helper.make_node("Range", ["marks_zero", "marks_length", "marks_one"], ["marks_positions"]),
        helper.make_node("Mod", ["marks_positions", "marks_apart"], ["marks_rest"]),
        helper.make_node("Equal", ["marks_rest", "marks_one"], ["marks_row"]),
        helper.make_node("Expand", ["marks_row", "marks_shape"], ["marks"]),
    ]


def multiply_rate() -> float:
    """GFLOP per second of CPU time of a large fp32 product."""
    size = 2048
    left, right = (np.ones((size, size), dtype=np.float32) for _ in range(2))
    return 2 * size**3 / _best(lambda: left @ right) / 1e9


def copy_rate() -> float:
    """GB read and written per second of CPU time by a copy that fits no cache."""
    source = np.ones(1 << 26, dtype=np.float32)
    target = np.empty_like(source)
    return 2 * source.nbytes / _best(lambda: np.copyto(target, source)) / 1e9


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
