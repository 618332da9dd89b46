"""Every quantizing pass that a recipe asks for, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from effc.passes.base import Pass
from effc.passes.quantize_attention import QuantizeAttention
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_fp8 import QuantizeFp8
from effc.passes.quantize_half import HALVES, StoreHalf
from effc.passes.quantize_int8 import QuantizeInt8
from effc.passes.quantize_linears import QuantizeLinears
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_replace import Beside
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection
from effc.passes.quantize_smooth import Smooth, smooths
from effc.passes.quantize_weights import QuantizeWeights

GraphPass = Pass[ir.Model, ir.Model]


def quantizing_passes(
    settings: QuantizationSection,
    calibration: Sequence[Batch] | None,
    schemes: Schemes | None = None,
    remembered: Remembered | None = None,
    beside: Beside | None = None,
    *,
    modes: frozenset[str] | None = None,
    int8: type[QuantizeLinears] = QuantizeInt8,
) -> Iterator[GraphPass]:
    """The passes for the modes of ``settings``.

    Args:
        calibration: batches of model inputs, or None.
        schemes: the mode of every layer; as the settings say if None.
        remembered: shared by the graphs of one model, so that they get equal weights.
        beside: keep fp32 layers beside the quantized ones.
        modes: those that need a pass; all of ``settings`` if None.
        int8: the pass for the mode of that name.
    """
    schemes, remembered = schemes or Schemes(settings), remembered or Remembered()
    modes = settings.modes if modes is None else modes
    # The first to run sees the graph as it was, and checks it for all.
    alone = True
    if smooths(settings):
        yield Smooth(settings, calibration, schemes, remembered)
        alone = False
    common = (calibration, schemes, remembered)
    if "int8" in modes:
        yield int8(settings, *common, alone=alone, beside=beside)
        alone = False
    if "fp8" in modes:
        yield QuantizeFp8(settings, *common, alone=alone, beside=beside)
        alone = False
    for bits in (8, 4):
        if f"int{bits}-weights" in modes:
            yield QuantizeWeights(settings, bits, *common, alone=alone, beside=beside)
            alone = False
    if settings.attention != "none" and beside is None:
        yield QuantizeAttention(settings, calibration, remembered, alone=alone)
        alone = False
    # Last, so that what they store is not taken for a weight of another type.
    for half in HALVES:
        if half in modes and beside is None:
            yield StoreHalf(settings, half, schemes, alone=alone)
            alone = False


def quantize(
    model: ir.Model,
    settings: QuantizationSection,
    calibration: Sequence[Batch] | None,
    schemes: Schemes | None = None,
    remembered: Remembered | None = None,
) -> None:
    """Run all of them on a graph, in place.

    Raises:
        PreconditionError, DataError, PassFailedError: see the passes.
    """
    for step in quantizing_passes(settings, calibration, schemes, remembered):
        step.run(model)
        step.ensures(model)
