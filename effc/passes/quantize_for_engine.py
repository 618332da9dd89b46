"""The quantizing passes of a compile whose target is TensorRT, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from effc.passes.quantize import GraphPass, quantizing_passes
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_engine import QuantizeInt8Engine
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection

_MODES = frozenset({"int8", "fp8"})


def engine_quantizing_passes(
    settings: QuantizationSection,
    calibration: Sequence[Batch] | None,
    schemes: Schemes | None = None,
    remembered: Remembered | None = None,
) -> Iterator[GraphPass]:
    """The passes for the modes of ``settings``; see :func:`effc.passes.quantize.quantizing_passes`.

    ``fp16`` and ``bf16`` need none: they are what an engine computes in.
    """
    modes = settings.modes & _MODES
    return quantizing_passes(settings, calibration, schemes, remembered, modes=modes, int8=QuantizeInt8Engine)
