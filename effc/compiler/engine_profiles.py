"""Optimization profiles: the shapes that an engine takes, and those that it is tuned for."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from effc.compiler.inputs import BATCH, SEQUENCE, TARGET
from effc.errors import UsageError
from effc.exporters.engine_build import Range
from effc.exporters.engine_caches import EngineCache
from effc.passes.engine_settings import default_shapes, parse_shape

Profile = dict[str, Range]
_TOTAL = "total"


def make_profiles(
    inputs: Sequence[ir.Value], shapes: Sequence[str], max_length: int | None, caches: Sequence[EngineCache] = ()
) -> list[Profile]:
    """One profile for each shape: everything up to it, tuned for it.

    Args:
        inputs: of the graph; their symbolic dimensions say what varies.
        shapes: ``8x512``; a choice by the model's length if empty.
        max_length: positions of the model, or None.
        caches: of a decode graph: there the length is that of the text so far.

    Raises:
        UsageError: if a shape does not fit the model.
    """
    kept = {cache.dimension: cache for cache in caches}
    return [_profile(inputs, text, max_length, kept) for text in shapes or default_shapes(max_length)]


def _profile(inputs: Sequence[ir.Value], text: str, max_length: int | None, kept: dict[str, EngineCache]) -> Profile:
    batch, length = parse_shape(text)
    if length is not None and max_length is not None and length > max_length:
        raise UsageError(f"The shape {text} is longer than the model's {max_length} positions.", "Give a smaller one.")

    def size(name: str) -> tuple[int, int]:
        if name == BATCH:
            return 1, batch
        if length is None:
            raise UsageError(f"The shape '{text}' says no length, and the model takes texts.", "Write 8x512.")
        if name in (SEQUENCE, TARGET):
            return 1, length
        if name == _TOTAL:
            return 2, max(length, 2)
        if name in kept:
            longest = -(-max(length - 1, 1) // kept[name].span)
            bound = kept[name].most
            return 1, longest if bound is None else min(bound, longest)
        raise UsageError(f"The shapes do not say how large the dimension '{name}' gets.", "Please report this model.")

    profile: Profile = {}
    for value in inputs:
        assert value.shape is not None
        ranges = [(dim, dim) if isinstance(dim, int) else size(str(dim.value)) for dim in value.shape]
        largest = [high for _, high in ranges]
        profile[str(value.name)] = ([low for low, _ in ranges], largest, largest)
    return profile
