"""Weights stored in fp16 or bf16 and computed with in fp32.

ONNX Runtime has no half-precision products on x86: an fp16 MatMul there is a cast, an fp32 product and a cast back, and
a bf16 one does not load at all. So the weights are stored in 16 bits and turned to fp32 when the model is loaded: half
the file, the speed and memory of fp32.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effc.passes.base import Pass, PassResult
from effc.passes.quantize_exclude import Exclusion, Rules
from effc.passes.quantize_find import find_embeddings, find_linears
from effc.passes.quantize_graph import Editor, constant_of, initializer_bytes, replace_value
from effc.passes.quantize_plan import check_globs, check_unquantized, make_plan
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection

_TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


HALVES: tuple[Literal["fp16", "bf16"], ...] = ("fp16", "bf16")


class StoreHalf(Pass[ir.Model, ir.Model]):
    """Store weights of linear layers and tables in 16 bits; see :class:`QuantizeInt8` for the arguments."""

    name: ClassVar[str] = "store-half"
    version: ClassVar[int] = 1

    def __init__(
        self,
        settings: QuantizationSection,
        mode: Literal["fp16", "bf16"],
        schemes: Schemes | None = None,
        *,
        alone: bool = True,
    ):
        self.settings: QuantizationSection = settings
        self.mode = mode
        self._schemes = schemes or Schemes(settings)
        self._alone = alone

    def requires(self, model: ir.Model) -> None:
        """Check that the graph is not quantized yet.

        Raises:
            PreconditionError: naming the node or the glob.
        """
        if self._alone:
            check_unquantized(model)
            check_globs(model, self.settings)

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Store in place."""
        self.requires(model)
        before, editor = initializer_bytes(model), Editor(model.graph)
        rules = Rules(gated=False, heads=False, small=False)
        exclusion = Exclusion(model.graph, self.settings.exclude, self._schemes, self.mode, rules)
        plan = make_plan(model.graph, exclusion, embeddings=False)
        tables: dict[ir.Value, ir.Value] = {}
        changed: list[str] = []
        for linear, chosen in plan.linears:
            if len(chosen) < len(linear.columns):
                names = [linear.columns[index].name for index in chosen]
                plan.skipped += [(name, "it is packed with a layer of another mode") for name in names]
                continue
            changed += [columns.name for columns in linear.columns]
        whole = set(changed)
        for linear in list(find_linears(model.graph)):
            if whole >= {columns.name for columns in linear.columns}:
                self._store(editor, linear.node, 1, tables, plan.skipped)
        for embedding in list(find_embeddings(model.graph)) if self.settings.embeddings else ():
            tensor = embedding.tensor()
            if exclusion.mode_reason(embedding) is None and tensor.dtype == ir.DataType.FLOAT:
                self._store_table(editor, embedding.node, tables)
                changed.append(embedding.name)
        editor.drop_unused_initializers()
        metrics = {
            "form": f"{self.mode} in the file, fp32 in memory",
            "linears": len(whole),
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
            "note": "half the file; ONNX Runtime computes in fp32 on this kind of CPU, so it is no faster",
        }
        return PassResult(model, bool(changed), changed, plan.skipped, metrics)

    def _store(
        self,
        editor: Editor,
        node: ir.Node,
        place: int,
        tables: dict[ir.Value, ir.Value],
        skipped: list[tuple[str, str]],
    ) -> None:
        """Let ``node`` read its constant through a cast from 16 bits."""
        value = node.inputs[place]
        assert value is not None
        producer = value.producer()
        if constant_of(value) is None and producer is not None:
            # A constant behind a Transpose.
            node, place, value = producer, 0, producer.inputs[0]
        stored = None if value is None else self._stored(editor, value, tables)
        if stored is None:
            skipped.append((str(value.name) if value else "", f"its weights do not fit {self.mode}"))
            return
        (floats,) = editor.insert(node, "Cast", [stored], {"to": ir.DataType.FLOAT}, like=value)
        node.replace_input_with(place, floats)

    def _store_table(self, editor: Editor, node: ir.Node, tables: dict[ir.Value, ir.Value]) -> None:
        """Look rows up in 16 bits and cast those."""
        value, output = node.inputs[0], node.outputs[0]
        stored = None if value is None else self._stored(editor, value, tables)
        if stored is None:
            return
        dtype = ir.DataType.from_numpy(_TYPES[self.mode])
        rows = editor.insert(
            node, "Gather", [stored, node.inputs[1]], {"axis": 0}, like=output, dtype=dtype, origin=node
        )
        (floats,) = editor.insert(node, "Cast", rows, {"to": ir.DataType.FLOAT}, like=output, origin=node)
        replace_value(output, floats)
        editor.graph.remove(node, safe=True)

    def _stored(self, editor: Editor, value: ir.Value, tables: dict[ir.Value, ir.Value]) -> ir.Value | None:
        if value not in tables:
            tensor = constant_of(value)
            assert tensor is not None
            half = tensor.numpy().astype(_TYPES[self.mode])
            if not np.isfinite(half.astype(np.float32)).all():
                return None
            tables[value] = editor.initializer(f"{value.name}_{self.mode}", half)
        return tables[value]
