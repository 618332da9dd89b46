"""The target ``torch_tensorrt``: what it needs, and its program in an artifact."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from effc.errors import MissingDependencyError, PreconditionError, UsageError
from effc.exporters.cuda_device import device_capability
from effc.passes.engine_settings import TORCH_TARGET, EngineSection, default_shapes, parse_shape

if TYPE_CHECKING:
    from effc.compiler.recipe import Recipe
    from effc.compiler.source import SourceModel
    from effc.exporters.engine_build import Tell

FOLDER, PROGRAM_NAME = "torch_tensorrt", "model.ep"


def check_torch(recipe: Recipe) -> None:
    """Check that this machine can compile with Torch-TensorRT what the recipe asks for. Imports nothing.

    Raises:
        MissingDependencyError: if Torch-TensorRT is not installed; names the package.
        UsageError: if there is no GPU, or the recipe asks for what engines of their own have.
        PreconditionError: if layers are to be quantized.
    """
    if importlib.util.find_spec(TORCH_TARGET) is None:
        raise MissingDependencyError(
            "The target 'torch_tensorrt' needs Torch-TensorRT, which is not installed.",
            "Install it on the machine with the GPU: pip install torch-tensorrt.",
        )
    if device_capability() is None:
        raise UsageError(
            "Torch-TensorRT builds engines on the GPU that they are for, and this machine has none.",
            "Compile on that machine, or build with --target=tensorrt_rtx, which needs no GPU.",
        )
    if recipe.quantization.modes - {"fp16", "bf16", "none"}:
        raise PreconditionError(
            "effc quantizes ONNX graphs, and Torch-TensorRT compiles torch's.",
            "Leave --quant out, or use --target=tensorrt.",
        )
    kept = {"precision", "shapes", "plugin"}
    if recipe.engine.model_copy(update={name: getattr(EngineSection(), name) for name in kept}) != EngineSection():
        raise UsageError(
            "Torch-TensorRT takes engine.precision, engine.shapes and engine.plugin only.", "Leave the others out."
        )


def build_torch_program(source: SourceModel, settings: EngineSection, directory: Path, tell: Tell) -> Path:
    """Compile ``source.model``, its attention rewritten, into ``directory/torch_tensorrt``. Never run.

    Raises:
        PreconditionError, PassFailedError: see :mod:`effc.exporters.engine_torch`.
        MissingDependencyError, PassFailedError: if the plugin cannot be compiled.
    """
    import torch

    from effc.compiler.engines import plugin_library
    from effc.compiler.inputs import BATCH, dynamic_axes, ragged_inputs
    from effc.exporters.engine_torch import compile_program, export_program, moved
    from effc.plugins.tensorrt_library import LIBRARY_NAME

    capability = device_capability()
    assert capability is not None
    inputs = ragged_inputs(source, [20, 11])
    axes = dynamic_axes(inputs)
    texts = settings.shapes or tuple(default_shapes(source.max_length))
    batch, length = max((parse_shape(text) for text in texts), key=lambda shape: shape[0] * (shape[1] or 1))
    largest = {
        name: [batch if axes[name].get(axis) == BATCH else length or size for axis, size in enumerate(value.shape)]
        for name, value in inputs.items()
    }
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[settings.precision]
    folder = directory / FOLDER
    folder.mkdir()
    library = plugin_library([capability], tell) if settings.plugin else None
    tell("torch program")
    with moved(source.model, "cuda", dtype):
        program = export_program(source.model, {name: value.to("cuda") for name, value in inputs.items()}, axes)
        compile_program(program, largest, library, folder / PROGRAM_NAME)
    if library is not None:
        shutil.copy2(library, folder / LIBRARY_NAME)
    return folder / PROGRAM_NAME
