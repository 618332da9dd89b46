"""Bring an exported graph into the form that TensorRT's parser takes, in standard operators that ONNX Runtime runs too.

This takes the place of ONNX Runtime's fusions, whose contrib operators TensorRT does not know. Little is fused here,
since TensorRT fuses by itself; norms are, because their parts would each be typed on their own in half precision and
the square of an fp16 number overflows.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter.rules.fusion import _layer_norm, _rms_normalization
from pydantic import BaseModel, ConfigDict

from effc.errors import PreconditionError
from effc.exporters.engine_attention import check_forms
from effc.passes.base import Pass, PassResult


class PrepareSection(BaseModel):
    """Nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PrepareEngine(Pass[ir.Model, ir.Model]):
    """Fuse norms into standard operators and drop what is computed twice."""

    name: ClassVar[str] = "prepare-engine"
    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self.settings: PrepareSection = PrepareSection()

    def requires(self, model: ir.Model) -> None:
        """Check that every attention layer can be part of an engine.

        Raises:
            PreconditionError: naming the layer and its form.
        """
        check_forms(model)

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Fuse in place; the ``effc::`` nodes and their bodies are left alone."""
        self.requires(model)
        functions, before = dict(model.functions), Counter(node.op_type for node in model.graph)
        # The rules would otherwise rewrite inside the bodies too.
        model.functions.clear()
        _rms_normalization.fuse_rms_normalization(model)
        _layer_norm.fuse_layer_normalization(model)
        CommonSubexpressionEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        model.functions.update(functions)
        after = Counter(node.op_type for node in model.graph)
        changed = [
            f"{after[op] - before[op]} x {op}"
            for op in ("LayerNormalization", "RMSNormalization")
            if after[op] > before[op]
        ]
        metrics = {"nodes_before": before.total(), "nodes_after": after.total()}
        return PassResult(model, before != after, changed, metrics=metrics)

    def ensures(self, model: ir.Model) -> None:
        """Check that no operator is left that only ONNX Runtime knows.

        Raises:
            PreconditionError: naming the node.
        """
        for node in model.graph.all_nodes():
            if node.domain == "com.microsoft":
                raise PreconditionError(
                    f"'{node.name}' is a {node.op_type} of ONNX Runtime, which TensorRT does not know.",
                    "Please report this model; --target=onnxruntime takes it.",
                )
