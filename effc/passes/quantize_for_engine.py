"""The quantizing passes of a compile whose target is TensorRT, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from effc.passes.quantize import GraphPass
from effc.passes.quantize_attention import QuantizeAttention
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_engine import QuantizeInt8Engine
from effc.passes.quantize_fp8 import QuantizeFp8
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection
from effc.passes.quantize_smooth import Smooth, smooths


def engine_quantizing_passes(
    settings: QuantizationSection,
    calibration: Sequence[Batch] | None,
    schemes: Schemes | None = None,
    remembered: Remembered | None = None,
) -> Iterator[GraphPass]:
    """The passes for the modes of ``settings``; see :func:`effc.passes.quantize.quantizing_passes`.

    ``fp16`` and ``bf16`` need none: they are what an engine computes in.
    """
    schemes, remembered = schemes or Schemes(settings), remembered or Remembered()
    alone = True
    if smooths(settings):
        yield Smooth(settings, calibration, schemes, remembered)
        alone = False
    if "int8" in settings.modes:
        yield QuantizeInt8Engine(settings, calibration, schemes, remembered, alone=alone)
        alone = False
    if "fp8" in settings.modes:
        yield QuantizeFp8(settings, calibration, schemes, remembered, alone=alone)
        alone = False
    if settings.attention != "none":
        yield QuantizeAttention(settings, calibration, remembered, alone=alone)
