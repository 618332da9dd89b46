"""Weights that are 4-bit already: finding the grid that they lie on.

A checkpoint that was stored in 4 bits (a GGUF file of type Q4_0 or Q4_1, for one) has 16 values in each block of 32
inputs, ``least + code * step``. Rounding them to another grid costs as much as the first rounding did. On their own
grid they cost nothing.
"""

from __future__ import annotations

import numpy as np

from effc.passes.quantize_blocks import Blocks, pack
from effc.passes.quantize_numbers import Floats

_STEPS = 15
_MIDDLE = 8
# Of a step. Checkpoints in 16 bits round what they store; 32 other weights lie this near to a grid once in 10^20 times.
_TOLERANCE = 0.05
_NO_OFFSET = 1e-3
# Output channels that are looked at first, because nearly all weights fail there.
_FEW = 16


def own_grid(weight: Floats, block_size: int) -> Blocks | None:
    """The 4-bit grid on which every block of ``weight [fan_in, fan_out]`` lies, or None if some block lies on none."""
    fan_in, fan_out = weight.shape
    if fan_in % block_size:
        return None
    blocks = weight.T.reshape(fan_out, -1, block_size)
    if _codes(blocks[:_FEW]) is None or (found := _codes(blocks)) is None:
        return None
    codes, least, steps = found
    values = pack(codes.reshape(-1, block_size), 4).reshape(fan_out, -1, block_size // 2)
    offsets = np.asarray(least + _MIDDLE * steps, np.float32)
    symmetric = bool((np.abs(offsets) <= _NO_OFFSET * steps).all())
    return Blocks(values, steps, None, 4, block_size, fan_in, None if symmetric else offsets, kept=True)


def _codes(blocks: Floats) -> tuple[np.ndarray, Floats, Floats] | None:
    """Codes shaped like ``blocks [fan_out, blocks, block_size]``, the least weight and the step of each block."""
    least, largest = blocks.min(axis=-1), blocks.max(axis=-1)
    flat, low = blocks.reshape(-1, blocks.shape[-1]), least.reshape(-1)
    span = (largest - least).reshape(-1)
    codes, steps = np.zeros(flat.shape, np.uint8), np.zeros(len(flat), np.float32)
    open_ = np.flatnonzero(span > 0)
    # From the finest step down: a block that leaves the outermost levels out has fewer.
    for count in range(_STEPS, 0, -1):
        if not len(open_):
            break
        step = span[open_] / np.float32(count)
        exact = (flat[open_] - low[open_, None]) / step[:, None]
        nearest = np.rint(exact)
        fits = np.abs(exact - nearest).max(axis=-1) <= _TOLERANCE
        codes[open_[fits]], steps[open_[fits]] = nearest[fits], step[fits]
        open_ = open_[~fits]
    if len(open_):
        return None
    return codes.reshape(blocks.shape), least, steps.reshape(least.shape)
