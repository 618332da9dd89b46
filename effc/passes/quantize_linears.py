"""Base of the passes that quantize linear layers of an ONNX graph."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import onnx_ir as ir

from effc.errors import PreconditionError
from effc.passes.base import Pass
from effc.passes.quantize_calibrate import Batch
from effc.passes.quantize_exclude import Exclusion
from effc.passes.quantize_gptq import Feedback, error_spread
from effc.passes.quantize_numbers import Floats
from effc.passes.quantize_observe import Remembered, observe
from effc.passes.quantize_plan import check_globs, check_nothing_left, check_unquantized
from effc.passes.quantize_replace import Beside
from effc.passes.quantize_schemes import Schemes
from effc.passes.quantize_settings import QuantizationSection


class QuantizeLinears(Pass[ir.Model, ir.Model]):
    """Quantize the linear layers of one mode.

    Args:
        settings: the recipe's ``quantization`` section.
        calibration: batches of model inputs, name -> array, tokenized; None if there are none.
        schemes: which layers are meant; as the settings say if None.
        remembered: what another graph of the same model has found, and takes what this one finds.
        alone: refuse a graph that holds anything quantized.
        beside: keep the fp32 layers beside the quantized ones.
    """

    def __init__(
        self,
        settings: QuantizationSection,
        calibration: Iterable[Batch] | None = None,
        schemes: Schemes | None = None,
        remembered: Remembered | None = None,
        *,
        alone: bool = True,
        beside: Beside | None = None,
    ):
        self.settings: QuantizationSection = settings
        self.calibration = calibration
        self._schemes = schemes or Schemes(settings)
        self._remembered = remembered or Remembered()
        self._alone, self._beside = alone, beside
        self._spreads: dict[str, Floats] = {}
        self._feedbacks: dict[str, Feedback] = {}

    def requires(self, model: ir.Model) -> None:
        """Check that the graph is not quantized yet and that every glob of the recipe matches something.

        Raises:
            PreconditionError: naming the node or the glob.
        """
        if self._alone:
            check_unquantized(model)
            check_globs(model, self.settings)

    def _check_method(self) -> None:
        """Refuse a weight method that needs data where there is none.

        Raises:
            PreconditionError: naming the method.
        """
        method = self.settings.weights.method
        if method != "rtn" and self.calibration is None:
            raise PreconditionError(
                f"The weight method '{method}' looks at activations, and there is no calibration data.",
                "Give --calibration, or use weights.method rtn.",
            )

    def _observe_moments(self, model: ir.Model, keys: dict[ir.Value, str]) -> None:
        """Run the calibration data for the second moments of the values in ``keys``."""
        assert self.calibration is not None
        known = self._remembered
        missing = {value: key for value, key in keys.items() if key not in known.stats or known.stats[key].gram is None}
        if missing:
            known.put(observe(model, missing, self.calibration, gram=True))

    def _spread(self, key: str) -> Floats:
        """How errors spread among the inputs of one activation; layers that read the same one follow each other."""
        if key not in self._spreads:
            gram = self._remembered.smoothed(key).gram
            assert gram is not None
            self._spreads = {key: error_spread(gram)}
        return self._spreads[key]

    def _feedback(self, key: str) -> Feedback:
        """The same, with the inputs in the order in which they are best rounded."""
        if key not in self._feedbacks:
            gram = self._remembered.smoothed(key).gram
            assert gram is not None
            self._feedbacks = {key: Feedback.of(gram)}
        return self._feedbacks[key]

    def ensures(self, model: ir.Model) -> None:
        """Check that no layer is left in fp32 without a reason.

        Raises:
            PassFailedError: naming the layer.
        """
        check_nothing_left(model, self._exclusion(model), self.name)

    @abstractmethod
    def _exclusion(self, model: ir.Model) -> Exclusion:
        """What this mode leaves alone."""
