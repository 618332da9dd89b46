"""The standard-operator body of local attention against the dense one, one layer, no native kernels.

The dense body is ONNX Runtime's fused kernel. Both take turns in one run; times are process CPU time over threads.

    python benchmarks/attention_bodies.py --length 4096
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from effc.compiler.bench import Candidate, measure
from effc.compiler.feeds import TensorSpec
from effc.compiler.machine import usable_cores
from effc.plugins.forms.registry import parse_pattern
from effc.plugins.function_body import OPSET, function_body
from effc.plugins.operator import DOMAIN, AttentionGeometry
from effc.plugins.pattern import DENSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="local:256")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    threads, width = usable_cores(), options.heads * options.head_dim
    with tempfile.TemporaryDirectory() as folder:
        candidates = {}
        for pattern in (DENSE, parse_pattern(options.attention)):
            geometry = AttentionGeometry(
                pattern, options.causal, options.heads, options.heads, options.head_dim, options.head_dim**-0.5
            )
            path = Path(folder) / f"{len(candidates)}.onnx"
            onnx.save(_layer(geometry), path)
            candidates[str(pattern)] = Candidate(path)
        timings = measure(
            candidates,
            [TensorSpec(name, "float32", ("batch", "sequence", width)) for name in ("query", "key", "value")],
            length=options.length,
            batch=1,
            rounds=options.rounds,
            threads=threads,
        )
    dense = timings[str(DENSE)]
    print(f"{options.length} tokens, {options.heads} x {options.head_dim}, CPU ms / {threads}")
    for name, timing in timings.items():
        print(
            f"{name:12s} median {timing.cpu_ms / threads:7.1f}  min {timing.cpu_ms_min / threads:7.1f}   "
            f"{dense.cpu_ms / timing.cpu_ms:.2f}x dense by medians, "
            f"{dense.cpu_ms_min / timing.cpu_ms_min:.2f}x by minima"
        )


def _layer(geometry: AttentionGeometry) -> onnx.ModelProto:
    """One operator node without a mask, with its body."""
    shape = ["batch", "sequence", geometry.num_heads * geometry.head_dim]
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("query", "key", "value", "output")
    }
    body = ir.serde.serialize_function(function_body(geometry))
    node = helper.make_node(
        geometry.form.op_type,
        ["query", "key", "value"],
        ["output"],
        domain=DOMAIN,
        pattern=str(geometry.form),
        causal=int(geometry.causal),
        num_heads=geometry.num_heads,
        kv_num_heads=geometry.kv_heads,
        scale=geometry.scale,
    )
    node.overload = body.overload
    output = values.pop("output")
    return helper.make_model(
        helper.make_graph([node], "layer", list(values.values()), [output]),
        functions=[body],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


if __name__ == "__main__":
    main()
