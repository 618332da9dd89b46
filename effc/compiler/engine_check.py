"""What has to hold before an engine can be built, checked before anything is loaded: a mistake should not take minutes.

Imports neither torch nor onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from effc.compiler.engine_torch import check_torch
from effc.compiler.recipe import Recipe
from effc.errors import PreconditionError, UsageError
from effc.exporters.tensorrt_flavours import Flavour, choose_capabilities, require_flavour, version_of
from effc.passes.engine_settings import ENGINE_TARGETS, TORCH_TARGET, EngineSection
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins.tensorrt_library import LEAST_CAPABILITY, existing_library, find_compiler

ENGINE_MODES = ("int8", "fp8")
"""What layers of an engine can be quantized to."""
_LEAST_FP8, _LEAST_BF16 = 89, 80
_LEAST_PARALLEL, _LEAST_COLLECTIVE = 11, 80
_WEIGHTS_ONLY = "their weights would be dequantized before every product, and nothing would be gained"
_REFUSED = {"int8-weights": _WEIGHTS_ONLY, "int4-weights": "effc writes them in a form that only ONNX Runtime reads"}


@dataclass(frozen=True)
class EnginePlan:
    """What is going to be built.

    Attributes:
        flavour: which TensorRT.
        capabilities: 89 for sm_89.
        precision: of what is not quantized.
        flags: builder flags.
    """

    flavour: Flavour
    capabilities: tuple[int, ...]
    precision: Literal["fp16", "bf16", "fp32"]
    flags: tuple[str, ...]


def check_engine(recipe: Recipe, calibration_given: bool = False) -> EnginePlan | None:
    """The engines that a recipe asks for; None if it asks for none.

    Args:
        calibration_given: whether calibration data come from somewhere else than the recipe.

    Raises:
        UsageError: if settings contradict each other, or this machine cannot build for an architecture.
        MissingDependencyError: if TensorRT, or what its plugin is compiled with, is not installed.
        PreconditionError: if an architecture lacks what is asked of it.
    """
    if recipe.target == TORCH_TARGET:
        check_torch(recipe)
        return None
    if recipe.target not in ENGINE_TARGETS:
        if recipe.engine != EngineSection():
            raise UsageError(
                f"There are settings for engines, and the target '{recipe.target}' has none.",
                "Give --target=tensorrt_rtx or --target=tensorrt, or leave them out.",
            )
        return None
    flavour = require_flavour(recipe.target)
    _check_quantization(recipe.quantization)
    precision = _precision(recipe)
    least, reason = _least(recipe, precision)
    for capability in recipe.engine.capabilities:
        if capability < least:
            raise PreconditionError(f"sm_{capability} {reason}", "Leave it out of --arch, or choose another form.")
    capabilities = choose_capabilities(flavour, recipe.engine.capabilities, least)
    for capability in capabilities:
        if capability < least:
            raise PreconditionError(f"sm_{capability} {reason}", "Name another GPU in --arch, or choose another form.")
    _check_calibration(recipe.quantization, calibration_given)
    if recipe.require.min_speedup is not None or recipe.require.min_decode_speedup is not None:
        raise UsageError("A speed-up is required, and engines are not timed while compiling.", "Leave it out.")
    if recipe.engine.embed_plugin and not recipe.engine.plugin:
        raise UsageError("The plugin is to be put into the plan and is not used.", "Leave out one of the two.")
    if recipe.engine.refit and flavour.anywhere:
        raise PreconditionError(
            f"{flavour.name} makes plans whose weights can be replaced only where there is a GPU to check them on.",
            "Leave engine.refit out.",
        )
    if recipe.engine.version_compatible and flavour.anywhere:
        raise PreconditionError(
            f"{flavour.name} lacks the lean runtime that plans for other releases are made of.",
            "Leave engine.version_compatible out.",
        )
    _check_parallel(recipe, flavour)
    if recipe.engine.plugin and _is_sparse(recipe) and existing_library() is None:
        find_compiler()
    names = {"version_compatible": "VERSION_COMPATIBLE", "refit": "REFIT", "weight_streaming": "WEIGHT_STREAMING"}
    flags = tuple(flag for name, flag in names.items() if getattr(recipe.engine, name))
    return EnginePlan(flavour, capabilities, precision, flags)


def _check_parallel(recipe: Recipe, flavour: Flavour) -> None:
    """TensorRT's collectives came with release 11, and Triton runs them with one profile and without caches."""
    if recipe.engine.tensor_parallel == 1:
        return
    if len(recipe.engine.shapes) != 1:
        raise UsageError(
            "Engines that several GPUs compute together have one optimization profile.",
            "Name one shape, such as --shapes=8x512.",
        )
    release = version_of(flavour) or ""
    if not flavour.anywhere and int(release.partition(".")[0] or 0) < _LEAST_PARALLEL:
        raise PreconditionError(
            f"TensorRT {release} has no collective layers; they came with {_LEAST_PARALLEL}.", "Install a newer one."
        )


def _check_quantization(settings: QuantizationSection) -> None:
    if settings.budget is not None:
        raise UsageError(
            "Choosing layers by a budget (auto) measures ONNX Runtime's kernels, which engines do not have.",
            "Name layers in --quant-layer or --quant-exclude.",
        )
    for mode in settings.modes:
        if mode in _REFUSED:
            raise PreconditionError(
                f"Engines hold no layers of '{mode}': {_REFUSED[mode]}.", "Use int8 or fp8, or --target=onnxruntime."
            )
    if settings.activations != "tensor":
        raise PreconditionError(
            "Engines have one constant scale for each activation, not one for each token.",
            "Leave --quant-activations out; --quant-smoothing=auto evens out channels instead.",
        )
    if settings.bias_correction:
        raise PreconditionError("Biases are not corrected for engines.", "Leave bias_correction out.")
    if settings.reduce_range:
        raise PreconditionError("7-bit weights are for CPUs; no GPU gains from them.", "Leave reduce_range out.")


def _check_calibration(settings: QuantizationSection, given: bool) -> None:
    quantized = sorted(settings.formats & set(ENGINE_MODES))
    if quantized and settings.calibration.data is None and not given:
        raise PreconditionError(
            f"{quantized[0].upper()} engines need constant ranges of activations, and there is no calibration data.",
            "Give --calibration FILE, with texts like those that the model will see.",
        )


def _precision(recipe: Recipe) -> Literal["fp16", "bf16", "fp32"]:
    """``--quant=bf16`` says the same as ``engine.precision``, which wins if it was set."""
    mode = recipe.quantization.mode
    if mode not in ("fp16", "bf16"):
        return recipe.engine.precision
    if "precision" in recipe.engine.model_fields_set and recipe.engine.precision != mode:
        raise UsageError(
            f"The quantization says {mode}, and the engine's precision is {recipe.engine.precision}.",
            "Leave out one of the two.",
        )
    return cast(Literal["fp16", "bf16"], mode)


def _least(recipe: Recipe, precision: str) -> tuple[int, str]:
    """The oldest architecture that will do, and what those before it lack, after their name."""
    if "fp8" in recipe.quantization.formats:
        return _LEAST_FP8, "has no FP8 products; they came with sm_89."
    if recipe.engine.plugin and _is_sparse(recipe):
        return LEAST_CAPABILITY, f"is older than effc's kernels, which need sm_{LEAST_CAPABILITY}."
    if precision == "bf16":
        return _LEAST_BF16, "has no bf16 products; they came with sm_80."
    if recipe.engine.tensor_parallel > 1:
        return _LEAST_COLLECTIVE, "is too old for TensorRT's collective layers, which need sm_80."
    return 0, ""


def _is_sparse(recipe: Recipe) -> bool:
    """Whether a layer may need the plugin. Models with windows of their own may as well; that shows later."""
    return recipe.attention.pattern != "dense" or any(form != "dense" for form in recipe.attention.layers.values())
