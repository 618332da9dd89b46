"""What zeros are worth on a target, said before anyone is disappointed, and what the target asks for it."""

from __future__ import annotations

from collections.abc import Collection

_TENSORRT = ("tensorrt", "tensorrt_rtx", "torch_tensorrt")
_CPU_ZEROS = (
    "ONNX Runtime's CPU kernels multiply zeros like any other number: {form} brings no speed and no smaller file on "
    "this target. Heads, FFN neurons, layers and low rank do."
)
_GPU_UNSTRUCTURED = (
    "TensorRT computes zeros that are strewn anywhere like any other number: unstructured pruning brings no speed."
)


def speed_note(method: str, target: str) -> str | None:
    """A sentence on what a masking form brings on a target; None for forms that shrink matrices."""
    if method not in ("unstructured", "2:4"):
        return None
    if target in _TENSORRT:
        return _GPU_UNSTRUCTURED if method == "unstructured" else None
    return _CPU_ZEROS.format(form="2:4 sparsity" if method == "2:4" else "unstructured sparsity")


def sparse_requirements(target: str, quantization: Collection[str] = ()) -> list[str]:
    """What must hold for 2:4 weights to be computed as such on a target; empty where none are.

    Args:
        target: as in the recipe.
        quantization: the modes that linear layers are quantized to.
    """
    if target not in _TENSORRT:
        return []
    rules = [
        "build with sparse weights enabled (SPARSE_WEIGHTS, or --sparsity=enable)",
        "the zeros lie along K, the dimension that a product sums over, and K is a multiple of 4",
        "the weights are constants of the graph",
    ]
    if any(mode.startswith("int8") for mode in quantization):
        rules.append(
            "a sparse INT8 product needs INT8 in and INT8 out: Q/DQ pairs on its input, its weight and its output, or "
            "TensorRT takes a dense kernel"
        )
    return rules
