"""Fuse norms, activations, rotary embeddings and sibling projections into ONNX Runtime's CPU operators."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from effc.passes.base import Pass, PassResult
from effc.passes.quantize_unfuse import split_slow_fusions

CONTRIB = "com.microsoft"


class FuseSection(BaseModel):
    """Nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FuseOnnxRuntime(Pass[ir.Model, ir.Model]):
    """transformers' own fusions for ONNX Runtime on CPU, less those whose kernels are slower than their parts."""

    name: ClassVar[str] = "fuse-onnxruntime"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self.settings: FuseSection = FuseSection()

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Fuse in place; the ``effc::`` nodes and their bodies are left alone."""
        functions, before = dict(model.functions), sum(1 for _ in model.graph)
        # The fusions would otherwise rewrite inside the bodies too.
        model.functions.clear()
        fuse_for_onnxruntime(model, "cpu")
        split_slow_fusions(model)
        model.functions.update(functions)
        model.opset_imports.setdefault(CONTRIB, 1)
        counts = Counter(node.op_type for node in model.graph if node.domain == CONTRIB)
        after = sum(1 for _ in model.graph)
        return PassResult(
            model,
            after != before,
            [f"{count} x {op_type}" for op_type, count in sorted(counts.items())],
            metrics={"nodes_before": before, "nodes_after": after},
        )
