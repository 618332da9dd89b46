"""What a quantizing pass is going to change, what it leaves alone, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from effc.errors import PassFailedError, PreconditionError
from effc.passes.quantize_exclude import LEAST_TABLE_BYTES, Exclusion
from effc.passes.quantize_find import Embedding, Linear, find_embeddings, find_linears
from effc.passes.quantize_graph import constant_of
from effc.passes.quantize_schemes import ELSEWHERE
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins.function_body import is_attention

QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
        "QGemm",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "GatherBlockQuantized",
    }
)


@dataclass
class Plan:
    """Linear layers with their chosen parts, embeddings, and ``(name, reason)`` of what stays."""

    linears: list[tuple[Linear, list[int]]] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def keys(self) -> dict[ir.Value, str]:
        """Each input under the name of the first layer that reads it, which is the same in every graph of the model."""
        found: dict[ir.Value, str] = {}
        for linear, _ in self.linears:
            found.setdefault(input_of(linear), linear.columns[0].name)
        return found


def make_plan(graph: ir.Graph, exclusion: Exclusion, *, embeddings: bool) -> Plan:
    """Ask ``exclusion`` about every layer; those of another mode are not mentioned."""
    plan = Plan()
    for linear in find_linears(graph):
        reasons = [exclusion.of_linear(linear, column) for column in range(len(linear.columns))]
        for columns, reason in zip(linear.columns, reasons, strict=True):
            if reason is not None and reason != ELSEWHERE:
                plan.skipped.append((columns.name, reason))
        if chosen := [column for column, reason in enumerate(reasons) if reason is None]:
            plan.linears.append((linear, chosen))
    for embedding in find_embeddings(graph) if embeddings else ():
        if (reason := exclusion.of_embedding(embedding)) is None:
            plan.embeddings.append(embedding)
        elif reason != ELSEWHERE:
            plan.skipped.append((embedding.name, reason))
    plan.skipped += _other_weights(graph)
    return plan


def check_unquantized(model: ir.Model) -> None:
    """Refuse a graph that is quantized already.

    Raises:
        PreconditionError: naming the node.
    """
    for node in model.graph.all_nodes():
        if node.op_type in QUANTIZED_OPS:
            raise PreconditionError(
                f"The graph is quantized already: node '{node.name}' is a {node.op_type}.",
                "Start from the unquantized model, or use a recipe with `quantization: none`.",
            )


def check_opset(model: ir.Model, least: int, what: str) -> None:
    """Refuse a graph of an opset that lacks what a mode needs.

    Raises:
        PreconditionError: naming the opset.
    """
    opset = model.opset_imports.get("", 0)
    if opset < least:
        raise PreconditionError(
            f"The graph uses ONNX opset {opset}, and {what} needs {least}.",
            "Export the model again with a newer opset.",
        )


def check_globs(model: ir.Model, settings: QuantizationSection) -> None:
    """Refuse a glob of the recipe that matches no layer.

    Raises:
        PreconditionError: naming the glob and the nearest name.
    """
    embeddings = find_embeddings(model.graph) if settings.embeddings else ()
    exclusion = Exclusion(model.graph, settings.exclude)
    rounded = settings.attention != "none"
    attention = [str(node.name) for node in model.graph if is_attention(node)] if rounded else []
    exclusion.check_globs(find_linears(model.graph), embeddings, settings.layers, attention)


def check_nothing_left(model: ir.Model, exclusion: Exclusion, name: str, what: str = "fp32") -> None:
    """Check that no layer of the mode was left as it was without a reason.

    Raises:
        PassFailedError: naming the layer.
    """
    for linear in find_linears(model.graph):
        for column, columns in enumerate(linear.columns):
            if exclusion.of_linear(linear, column) is None:
                raise PassFailedError(f"{name} left '{columns.name}' in {what} without a reason.")


def input_of(linear: Linear) -> ir.Value:
    """The value that a linear layer reads."""
    value = linear.node.inputs[0]
    assert value is not None
    return value


def _other_weights(graph: ir.Graph) -> list[tuple[str, str]]:
    """Large constants that nodes of other kinds compute with, so that no fp32 weight is left unmentioned."""
    found = []
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "Gather", "Transpose", "Slice", *QUANTIZED_OPS):
            continue
        for value in node.inputs:
            tensor = constant_of(value)
            if value is None or tensor is None or len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
                continue
            if tensor.nbytes >= LEAST_TABLE_BYTES:
                found.append((str(value.name), f"a weight of {node.op_type}, which is not quantized"))
    return found
