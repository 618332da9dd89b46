"""Moving the difficulty of quantization from activations to weights, channel by channel.

An activation ``x`` and the weight ``W`` behind it become ``x / s`` and ``s * W``. SmoothQuant (Xiao et al., 2022) takes
``s = max|x|**alpha / max|W|**(1 - alpha)``, so that a few outlier channels do not set the scale of a whole INT8 tensor.
AWQ (Lin et al., 2023) takes ``s = mean|x|**alpha``, so that weights which meet large activations are rounded finer.
Both alphas are searched for by measuring the error of the layers' outputs on calibration rows.

The division goes into the norm or the layer in front where there is one. Elsewhere a product is inserted, if the
error falls enough to be worth its time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.quantize_blocks import round_to_nearest
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_exclude import Exclusion, Rules
from effc.passes.quantize_find import Linear, find_linears
from effc.passes.quantize_fold import Fold, find_fold, scale_rows
from effc.passes.quantize_graph import Editor
from effc.passes.quantize_numbers import Floats, activation_range, quantize_columns
from effc.passes.quantize_observe import ChannelStats, Remembered, observe
from effc.passes.quantize_plan import check_globs, check_unquantized, input_of, make_plan
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection

_ALPHAS = (0.35, 0.5, 0.65, 0.8)
_AWQ_ALPHAS = (0.15, 0.3, 0.45, 0.6, 0.75)
# Output columns that errors are measured on.
_COLUMNS = 384
# What the error has to fall to, for a change that is free and for one that costs a node.
_FREE, _PAID = 0.97, 0.75
_LEAST = 1e-5
_BITS = {"int8-weights": (8, 128), "int4-weights": (4, 32)}


def smooths(settings: QuantizationSection) -> bool:
    """Whether the settings ask for this pass."""
    weights = settings.modes & _BITS.keys() and settings.weights.method == "awq"
    return bool(weights) or ("int8" in settings.modes and settings.smoothing != "none")


class Smooth(Pass[ir.Model, ir.Model]):
    """Smooth the inputs of layers that will be quantized; the graph computes the same afterwards.

    Args:
        settings: the recipe's ``quantization`` section.
        calibration: batches of model inputs.
        schemes, remembered: see :class:`QuantizeInt8`.
    """

    name: ClassVar[str] = "smooth"
    version: ClassVar[int] = 1

    def __init__(
        self,
        settings: QuantizationSection,
        calibration: Iterable[Batch] | None,
        schemes: Schemes | None = None,
        remembered: Remembered | None = None,
    ):
        self.settings: QuantizationSection = settings
        self.calibration = calibration
        self._schemes = schemes or Schemes(settings)
        self._remembered = remembered or Remembered()

    def requires(self, model: ir.Model) -> None:
        """Check that there is calibration data and the graph is not quantized yet.

        Raises:
            PreconditionError: naming the option, the node or the glob.
        """
        if self.calibration is None:
            what = "smoothing" if self.settings.smoothing != "none" else "weights.method awq"
            raise PreconditionError(
                f"quantization.{what} looks at activations, and there is no calibration data.",
                "Give --calibration, or leave the option out.",
            )
        check_unquantized(model)
        check_globs(model, self.settings)

    def run(self, model: ir.Model) -> PassResult[ir.Model]:
        """Smooth in place.

        Raises:
            DataError: if calibration samples do not fit the graph.
        """
        self.requires(model)
        assert self.calibration is not None
        editor = Editor(model.graph)
        targets = self._targets(model.graph)
        keys = {value: key for value, (key, _, _) in targets.items()}
        known = self._remembered
        if missing := {value: key for value, key in keys.items() if key not in known.stats}:
            gram = self.settings.weights.method == "gptq"
            known.stats.update(observe(model, missing, self.calibration, gram=gram))
        linears = list(find_linears(model.graph))
        parts = {columns.output: (linear, columns) for linear in linears for columns in linear.columns}
        changed, skipped = [], []
        gains: dict[str, float] = {}
        inserted = 0
        for value, (key, mode, readers) in targets.items():
            fold = None if _read_elsewhere(value, readers) else find_fold(editor, value, parts)
            scale, gain = known.smoothing.get(key), None
            if scale is None:
                scale, gain = self._choose(known.stats[key], mode, readers, free=fold is not None)
                known.smoothing[key] = scale
            if np.all(scale == 1):
                skipped.append((key, "no scales lower the error enough"))
                continue
            if gain is not None:
                gains[key] = gain
            _apply(editor, value, readers, scale, fold)
            inserted += fold is None
            changed.append(key)
        editor.drop_unused_initializers()
        metrics = {
            "smoothed": len(changed),
            "products_inserted": inserted,
            "error_left": float(np.mean(list(gains.values()))) if gains else None,
        }
        return PassResult(model, bool(changed), changed, skipped, metrics)

    def _targets(self, graph: ir.Graph) -> dict[ir.Value, tuple[str, str, list[tuple[Linear, list[int]]]]]:
        """Each input to smooth with its name, its mode and the layers that read it."""
        found: dict[ir.Value, tuple[str, str, list[tuple[Linear, list[int]]]]] = {}
        wanted = ["int8"] if self.settings.smoothing != "none" else []
        wanted += list(_BITS) if self.settings.weights.method == "awq" else []
        for mode in wanted:
            rules = Rules() if mode == "int8" else Rules(gated=False, heads=False)
            exclusion = Exclusion(graph, self.settings.exclude, self._schemes, mode, rules)
            plan = make_plan(graph, exclusion, embeddings=False)
            keys = plan.keys()
            for linear, chosen in plan.linears:
                value = input_of(linear)
                if value not in found:
                    found[value] = (keys[value], mode, [])
                if found[value][1] == mode:
                    found[value][2].append((linear, chosen))
        # Scales change the whole weight, which must not serve another layer too.
        return {
            value: target
            for value, target in found.items()
            if all(
                len(chosen) == len(linear.columns) and _is_own(linear.node.inputs[1]) for linear, chosen in target[2]
            )
        }

    def _choose(
        self, stats: ChannelStats, mode: str, readers: list[tuple[Linear, list[int]]], *, free: bool
    ) -> tuple[Floats, float]:
        """The best scales, and the error they leave as a share of that without; ones where none is good enough."""
        weight = np.concatenate([linear.weight() for linear, _ in readers], axis=1)
        peak_of_weight = np.abs(weight).max(axis=1)
        weight = np.ascontiguousarray(weight[:, :: max(1, weight.shape[1] // _COLUMNS)], np.float32)
        ones = np.ones(len(weight), np.float32)
        if mode == "int8":
            peak = np.maximum(np.abs(stats.low), np.abs(stats.high))
            alphas = _ALPHAS if self.settings.smoothing == "auto" else (float(self.settings.smoothing),)
            scales = [
                np.maximum(peak, _LEAST) ** alpha / np.maximum(peak_of_weight, _LEAST) ** (1 - alpha)
                for alpha in alphas
            ]
        else:
            scales = [np.maximum(stats.peak, _LEAST) ** alpha for alpha in _AWQ_ALPHAS]
            # Centred, so that fp32 neither grows nor shrinks.
            scales = [scale / np.sqrt(scale.max() * scale.min()) for scale in scales]
        scales = [np.maximum(scale, _LEAST).astype(np.float32) for scale in scales]
        before = self._error(stats, weight, ones, mode)
        errors = [self._error(stats, weight, scale, mode) for scale in scales]
        best = int(np.argmin(errors))
        ratio = errors[best] / before if before > 0 else 1.0
        fixed = mode == "int8" and self.settings.smoothing != "auto" and free
        return (scales[best], ratio) if fixed or ratio <= (_FREE if free else _PAID) else (ones, 1.0)

    def _error(self, stats: ChannelStats, weight: Floats, scale: Floats, mode: str) -> float:
        wanted, rows, scaled = stats.rows @ weight, stats.rows / scale, weight * scale[:, None]
        if mode == "int8":
            quantized = quantize_columns(scaled, reduce_range=self.settings.reduce_range)
            scaled = quantized.values * quantized.scale
            if self.settings.activations == "token":
                step = np.maximum(np.abs(rows).max(axis=1, keepdims=True), _LEAST) / 127
                rows = np.rint(rows / step) * step
            else:
                step, zero = activation_range(float((stats.low / scale).min()), float((stats.high / scale).max()))
                rows = (np.clip(np.rint(rows / step) + zero, 0, 255) - zero) * step
        else:
            bits, size = _BITS[mode]
            size = self.settings.weights.block_size or size
            scaled = round_to_nearest(scaled, bits, size, self.settings.weights.symmetric).floats()
        return float(np.square(rows @ scaled - wanted).sum(dtype=np.float64))


def _apply(
    editor: Editor, value: ir.Value, readers: list[tuple[Linear, list[int]]], scale: Floats, fold: Fold | None
) -> None:
    for linear, _ in readers:
        scale_rows(editor, linear, scale)
    if fold is not None:
        fold(scale)
        return
    factor = editor.initializer(f"{value.name}_smoothing", (1 / scale).astype(np.float32))
    first = readers[0][0].node
    (divided,) = editor.insert(first, "Mul", [value, factor], like=value, origin=first)
    for linear, _ in readers:
        linear.node.replace_input_with(0, divided)


def _read_elsewhere(value: ir.Value, readers: list[tuple[Linear, list[int]]]) -> bool:
    nodes = {linear.node for linear, _ in readers}
    return any(use.node not in nodes for use in value.uses())


def _is_own(value: ir.Value | None) -> bool:
    """Whether a weight serves one product alone, and is stored as it is read."""
    return value is not None and value.producer() is None and len(list(value.uses())) == 1
