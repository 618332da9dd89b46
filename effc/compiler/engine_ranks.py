"""The shares of a graph that several GPUs compute together, written to files and proved on CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.compiler.engine_proof import graph_error
from effc.errors import PassFailedError
from effc.exporters.onnx_graph import save_onnx
from effc.exporters.shard_graph import shard
from effc.exporters.shard_join import join_ranks

# Sums in another order, in fp32; where activations are rounded, some then fall on the other side.
_SAME, _SAME_ROUNDED = 1e-3, 5e-2


def divide(graph: Path, ranks: int, probe: Mapping[str, Any], work: Path) -> tuple[list[Path], float]:
    """Write each rank's graph into ``work``; the files, and how far all of them together are from the whole.

    Raises:
        PreconditionError: naming the layer that cannot be divided.
        PassFailedError: if together they compute something else.
    """
    files = []
    for rank in range(ranks):
        model = ir.load(str(graph))
        shard(model, ranks, rank)
        files.append(work / f"{graph.stem}.rank{rank}.fp32.onnx")
        save_onnx(model, files[-1])
    joined = work / f"{graph.stem}.ranks.onnx"
    save_onnx(join_ranks([ir.load(str(file)) for file in files]), joined)
    error = graph_error(graph, joined, probe)
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph)
    if not error <= (_SAME_ROUNDED if rounds else _SAME):
        raise PassFailedError(
            f"Divided between {ranks} GPUs the model would be off by {error:.2g}.",
            "Compile without --tensor-parallel, and report this model.",
        )
    return files, error
