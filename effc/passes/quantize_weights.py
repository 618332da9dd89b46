"""Weights of linear layers in 8 or 4 bits, computed with as they are: ``com.microsoft::MatMulNBits``.

A token that is written reads every weight once, so what counts is their bytes. ONNX Runtime's kernel reads the codes
and multiplies them by inputs that it rounds to 8 bits in blocks (accuracy level 4); without that level 8-bit weights
run ten times slower than fp32. Over long inputs arithmetic counts, and ``int8`` is the faster mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.base import PassResult
from effc.passes.quantize_blocks import Blocks, error_spread, gptq, round_to_nearest
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_embeddings import quantize_embedding
from effc.passes.quantize_exclude import Exclusion, Rules
from effc.passes.quantize_find import Columns, Linear, find_embeddings
from effc.passes.quantize_graph import Editor, initializer_bytes, replace_value
from effc.passes.quantize_linears import QuantizeLinears
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_observe import Remembered, observe
from effc.passes.quantize_plan import input_of, make_plan
from effc.passes.quantize_replace import Switches, replace_linear
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
        switches: Switches | None = None,
    ):
        super().__init__(settings, calibration, schemes, remembered, alone=alone, switches=switches)
        self.bits = bits
        self._spreads: dict[str, Floats] = {}

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
        method = self.settings.weights.method
        if method != "rtn" and self.calibration is None:
            raise PreconditionError(
                f"The weight method '{method}' looks at activations, and there is no calibration data.",
                "Give --calibration, or use weights.method rtn.",
            )

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
            self._observe(model, plan.keys())
        keys, changed = plan.keys(), []
        errors: dict[str, float] = {}
        made: dict[tuple[str, int, int], list[ir.Value]] = {}

        for linear, chosen in plan.linears:
            key = keys[input_of(linear)]

            def build(
                columns: Columns, weight: Floats, bias: Floats | None, linear: Linear = linear, key: str = key
            ) -> ir.Value:
                place = (linear.weight_name, columns.start, columns.stop)
                bits = 8 if exclusion.is_head(columns) else self.bits
                if place not in made:
                    blocks = self._blocks(columns.name, weight, key, bits)
                    errors[columns.name] = _relative_error(blocks, weight)
                    made[place] = _constants(editor, columns.name, blocks)
                return self._product(editor, linear, columns, made[place], bias, bits)

            changed += replace_linear(editor, linear, chosen, build, self._switches)
        if self._switches is None:
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

    def _observe(self, model: ir.Model, keys: dict[ir.Value, str]) -> None:
        assert self.calibration is not None
        known = self._remembered
        missing = {value: key for value, key in keys.items() if key not in known.stats or known.stats[key].gram is None}
        if missing:
            known.put(observe(model, missing, self.calibration, gram=True))

    def _blocks(self, name: str, weight: Floats, key: str, bits: int) -> Blocks:
        known, place = self._remembered.weights, (name, self.mode)
        if place not in known:
            symmetric = self.settings.weights.symmetric
            if self.settings.weights.method == "gptq" and bits == self.bits:
                blocks = gptq(weight, self._spread(key), bits, self.block_size, symmetric)
            else:
                blocks = round_to_nearest(weight, bits, self.block_size, symmetric)
            known[place] = (blocks.values, blocks.scales, *([] if blocks.zeros is None else [blocks.zeros]))
        values, scales, *zeros = known[place]
        return Blocks(values, scales, zeros[0] if zeros else None, bits, self.block_size, weight.shape[0])

    def _spread(self, key: str) -> Floats:
        """That of one activation; layers that read the same one follow each other."""
        if key not in self._spreads:
            gram = self._remembered.smoothed(key).gram
            assert gram is not None
            self._spreads = {key: error_spread(gram)}
        return self._spreads[key]

    def _product(
        self,
        editor: Editor,
        linear: Linear,
        columns: Columns,
        constants: list[ir.Value],
        bias: Floats | None,
        bits: int,
    ) -> ir.Value:
        attributes = {
            "K": linear.fan_in,
            "N": columns.stop - columns.start,
            "bits": bits,
            "block_size": self.block_size,
            "accuracy_level": _ROUND_INPUTS,
        }
        inputs = [input_of(linear), *constants]
        node = ir.node("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB)
        node.metadata_props.update(linear.node.metadata_props)
        result = node.outputs[0]
        result.shape, result.dtype = columns.output.shape, ir.DataType.FLOAT
        editor.graph.insert_before(linear.node, node)
        if bias is not None:
            addend = editor.initializer(f"{columns.name}.bias", bias)
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


def _constants(editor: Editor, name: str, blocks: Blocks) -> list[ir.Value]:
    arrays: dict[str, npt.NDArray[Any]] = {f"int{blocks.bits}": blocks.values, "scale": blocks.scales.reshape(-1)}
    if blocks.zeros is not None:
        arrays["zero_points"] = blocks.zeros.reshape(-1)
    return [editor.initializer(f"{name}.weight_{what}", array) for what, array in arrays.items()]


def _relative_error(blocks: Blocks, weight: Floats) -> float:
    # The largest tables hold gigabytes; some of their columns say as much.
    step = max(1, weight.shape[1] // 512)
    part = Blocks(
        blocks.values[::step],
        blocks.scales[::step],
        None if blocks.zeros is None else blocks.zeros[::step],
        blocks.bits,
        blocks.block_size,
        blocks.fan_in,
    )
    wanted = weight[:, ::step]
    return float(np.linalg.norm(part.floats() - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
