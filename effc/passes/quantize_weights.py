"""Weights of linear layers in 8 or 4 bits, computed with as they are: ``com.microsoft::MatMulNBits``.

A token that is written reads every weight once, so what counts is their bytes. ONNX Runtime's kernel reads the codes
and multiplies them by inputs that it rounds to 8 bits in blocks (accuracy level 4); without that level 8-bit weights
run ten times slower than fp32. Over long inputs arithmetic counts, and ``int8`` is the faster mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effc.passes.base import PassResult
from effc.passes.quantize_blocks import Blocks, gptq_blocks, round_to_nearest
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_embeddings import quantize_embedding
from effc.passes.quantize_exclude import Exclusion, Rules
from effc.passes.quantize_find import PART, Columns, Linear, find_embeddings
from effc.passes.quantize_graph import Editor, initializer_bytes, replace_value
from effc.passes.quantize_grid import own_grid
from effc.passes.quantize_linears import QuantizeLinears
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_plan import input_of, make_plan
from effc.passes.quantize_replace import Beside, replace_linear
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection

CONTRIB = "com.microsoft"
_BLOCK_SIZES = {4: 32, 8: 128}
_ROUND_INPUTS = 4


class QuantizeWeights(QuantizeLinears):
    """Store weights of linear layers in ``bits`` bits; see :class:`QuantizeLinears` for the arguments."""

    name: ClassVar[str] = "quantize-weights"
    version: ClassVar[int] = 1

    def __init__(
        self,
        settings: QuantizationSection,
        bits: int,
        calibration: Iterable[Batch] | None = None,
        schemes: Schemes | None = None,
        remembered: Remembered | None = None,
        *,
        alone: bool = True,
        beside: Beside | None = None,
    ):
        super().__init__(settings, calibration, schemes, remembered, alone=alone, beside=beside)
        self.bits = bits

    @property
    def mode(self) -> str:
        """As the recipe writes it."""
        return f"int{self.bits}-weights"

    @property
    def block_size(self) -> int:
        """Inputs that share a scale."""
        return self.settings.weights.block_size or _BLOCK_SIZES[self.bits]

    def requires(self, model: ir.Model) -> None:
        """Check that the graph is not quantized yet, and that there is data where the method needs some.

        Raises:
            PreconditionError: naming the node, the glob or the method.
        """
        super().requires(model)
        self._check_method()

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Quantize in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        before, editor = initializer_bytes(model), Editor(model.graph)
        exclusion = self._exclusion(model)
        plan = make_plan(model.graph, exclusion, embeddings=False)
        heads = [c.name for linear, _ in plan.linears for c in linear.columns if exclusion.is_head(c)]
        if self.settings.weights.method == "gptq":
            self._observe_moments(model, plan.keys())
        keys, changed = plan.keys(), []
        errors: dict[str, float] = {}
        made: dict[tuple[str, int, int], tuple[list[ir.Value], Blocks]] = {}
        sums: dict[ir.Value, ir.Value] = {}

        for linear, chosen in plan.linears:
            key = keys[input_of(linear)]

            def build(
                columns: Columns, weight: Floats, bias: Floats | None, linear: Linear = linear, key: str = key
            ) -> ir.Value:
                place = (linear.weight_name, columns.start, columns.stop)
                if place not in made:
                    bits = 8 if exclusion.is_head(columns) else self.bits
                    blocks = self._blocks(columns.name, weight, input_of(linear), key, bits)
                    errors[columns.name] = _relative_error(blocks, weight)
                    made[place] = _constants(editor, columns.name, blocks), blocks
                return self._product(editor, linear, columns, *made[place], bias, sums)

            changed += replace_linear(editor, linear, chosen, build, self._beside)
        if self._beside is None:
            editor.drop_unused_initializers()
            embeddings = self._embeddings(model, editor, plan.skipped)
            changed += embeddings
            editor.drop_unused_initializers()
        model.opset_imports.setdefault(CONTRIB, 1)
        worst = max(errors, key=lambda name: errors[name], default=None)
        metrics = {
            "form": f"{self.bits} bits, blocks of {self.block_size}, {self.settings.weights.method}",
            "linears": sum(len(chosen) for _, chosen in plan.linears),
            "heads_in_8_bits": heads if self.bits < 8 else [],
            "on_their_own_grid": sum(blocks.kept for _, blocks in made.values()),
            "largest_weight_error": None if worst is None else {"layer": worst, "relative_error": errors[worst]},
            "skipped": len(plan.skipped),
            "bytes_before": before,
            "bytes_after": initializer_bytes(model),
        }
        return PassResult(model, bool(changed), changed, plan.skipped, metrics)

    def _exclusion(self, model: ir.Model) -> Exclusion:
        # Heads are what a written token reads most of, and blocks of 8 bits hold them well.
        rules = Rules(gated=False, heads=False)
        return Exclusion(model.graph, self.settings.exclude, self._schemes, self.mode, rules)

    def _blocks(self, name: str, weight: Floats, value: ir.Value, key: str, bits: int) -> Blocks:
        known, place = self._remembered.weights, (name, self.mode)
        if place not in known:
            symmetric = self.settings.weights.symmetric
            # Offsets need the input in blocks, for which its rank has to be known.
            own = own_grid(weight, self.block_size) if bits == 4 and value.shape is not None else None
            if own is not None:
                known[place] = own
            elif self.settings.weights.method == "gptq" and bits == self.bits:
                known[place] = gptq_blocks(weight, self._spread(key), bits, self.block_size, symmetric)
            else:
                known[place] = round_to_nearest(weight, bits, self.block_size, symmetric)
        return known[place]

    def _product(
        self,
        editor: Editor,
        linear: Linear,
        columns: Columns,
        constants: list[ir.Value],
        blocks: Blocks,
        bias: Floats | None,
        sums: dict[ir.Value, ir.Value],
    ) -> ir.Value:
        attributes = {
            "K": linear.fan_in,
            "N": columns.stop - columns.start,
            "bits": blocks.bits,
            "block_size": blocks.block_size,
            "accuracy_level": _ROUND_INPUTS,
        }
        value = input_of(linear)
        node = ir.node("MatMulNBits", [value, *constants], attributes=attributes, domain=CONTRIB)
        node.metadata_props.update(linear.node.metadata_props)
        result = node.outputs[0]
        result.shape, result.dtype = columns.output.shape, ir.DataType.FLOAT
        editor.graph.insert_before(linear.node, node)
        addends = []
        if blocks.offsets is not None:
            if value not in sums:
                sums[value] = _block_sums(editor, linear.node, value, blocks)
            weight = editor.initializer(f"{columns.name}.weight_offset", np.ascontiguousarray(blocks.offsets.T))
            (product,) = editor.insert(linear.node, "MatMul", [sums[value], weight], like=columns.output)
            producer = product.producer()
            assert producer is not None
            producer.metadata_props[PART] = columns.name
            addends.append(product)
        if bias is not None:
            addends.append(editor.initializer(f"{columns.name}.bias", bias))
        for addend in addends:
            (result,) = editor.insert(linear.node, "Add", [result, addend], like=columns.output, origin=linear.node)
        return result

    def _embeddings(self, model: ir.Model, editor: Editor, skipped: list[tuple[str, str]]) -> list[str]:
        """Tables in 8 bits with a scale per row; after the linear layers, so that a tied head reads none any more."""
        if not self.settings.embeddings:
            return []
        exclusion, changed = self._exclusion(model), []
        tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for embedding in list(find_embeddings(model.graph)):
            if (reason := exclusion.of_embedding(embedding)) is None:
                output = embedding.node.outputs[0]
                replace_value(output, quantize_embedding(editor, embedding, tables))
                editor.graph.remove(embedding.node, safe=True)
                changed.append(embedding.name)
            else:
                skipped.append((embedding.name, reason))
        return changed


def _block_sums(editor: Editor, before: ir.Node, value: ir.Value, blocks: Blocks) -> ir.Value:
    """The sum of each block of inputs, ``[..., blocks]``."""
    assert value.shape is not None
    sizes = [*[0] * (len(value.shape) - 1), blocks.fan_in // blocks.block_size, blocks.block_size]
    shape = editor.initializer(f"{value.name}_blocks", np.array(sizes, np.int64))
    apart = editor.insert(before, "Reshape", [value, shape])
    axis = editor.initializer(f"{value.name}_block_axis", np.array([-1], np.int64))
    return editor.insert(before, "ReduceSum", [*apart, axis], {"keepdims": 0})[0]


def _constants(editor: Editor, name: str, blocks: Blocks) -> list[ir.Value]:
    arrays: dict[str, npt.NDArray[Any]] = {f"int{blocks.bits}": blocks.values, "scale": blocks.scales.reshape(-1)}
    if blocks.zeros is not None:
        arrays["zero_points"] = blocks.zeros.reshape(-1)
    return [editor.initializer(f"{name}.weight_{what}", array) for what, array in arrays.items()]


def _relative_error(blocks: Blocks, weight: Floats) -> float:
    # The largest tables hold gigabytes; some of their columns say as much.
    step = max(1, weight.shape[1] // 512)
    cut = {
        name: array[::step]
        for name in ("values", "scales", "zeros", "offsets")
        if (array := getattr(blocks, name)) is not None
    }
    part = replace(blocks, **cut)
    wanted = weight[:, ::step]
    return float(np.linalg.norm(part.floats() - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
