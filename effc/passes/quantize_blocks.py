"""Weights in blocks of 4 or 8 bits with a scale for each block, as ``com.microsoft::MatMulNBits`` reads them.

Rounding to nearest is ONNX Runtime's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnxruntime.capi import _pybind_state as kernels

from effc.passes.quantize_gptq import RoundRow, round_with_feedback
from effc.passes.quantize_numbers import Floats

Bytes = npt.NDArray[np.uint8]

_FEW_BITS = 4
_CUTS = (0.95, 0.9, 0.85, 0.8, 0.72)


@dataclass(frozen=True)
class Blocks:
    """A weight ``[fan_in, fan_out]`` in blocks along its inputs.

    Attributes:
        values: packed codes ``[fan_out, blocks, block_size * bits / 8]``, low bits first.
        scales: ``[fan_out, blocks]``.
        zeros: packed zero points ``[fan_out, blocks * bits / 8 rounded up]``; None if all are in the middle.
        offsets: ``[fan_out, blocks]``, added to every weight of a block; None if all are 0. The kernel knows nothing of
            them: they multiply the sum of a block's inputs.
        kept: the weight lay on this grid, so that nothing was rounded.
    """

    values: Bytes
    scales: Floats
    zeros: Bytes | None
    bits: int
    block_size: int
    fan_in: int
    offsets: Floats | None = None
    kept: bool = False

    def floats(self) -> Floats:
        """The weight that the codes stand for, ``[fan_in, fan_out]``."""
        blocks = self.scales.shape[1]
        codes = _unpack(self.values, self.bits).reshape(len(self.scales), blocks, self.block_size)
        zeros = self.zero_points()[:, :, None]
        floats = (codes.astype(np.float32) - zeros) * self.scales[:, :, None]
        if self.offsets is not None:
            floats += self.offsets[:, :, None]
        return np.ascontiguousarray(floats.reshape(len(self.scales), -1)[:, : self.fan_in].T)

    def zero_points(self) -> Floats:
        """``[fan_out, blocks]``."""
        blocks = self.scales.shape[1]
        if self.zeros is None:
            return np.full((len(self.scales), blocks), 1 << (self.bits - 1), np.float32)
        return _unpack(self.zeros, self.bits)[:, :blocks].astype(np.float32)


def round_to_nearest(weight: Floats, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Quantize ``weight [fan_in, fan_out]`` with ONNX Runtime's block-wise kernel.

    Where codes are few, the largest weights of a block are cut by as much as lowers the block's squared error most.
    """
    best = _round(weight, bits, block_size, symmetric)
    if bits > _FEW_BITS:
        return best
    least = _block_errors(best, weight)
    low, high = _block_edges(weight, block_size)
    for share in _CUTS:
        tried = _round(np.clip(weight, share * low, share * high), bits, block_size, symmetric)
        errors = _block_errors(tried, weight)
        better = errors < least
        least = np.where(better, errors, least)
        zeros = np.where(better, tried.zero_points(), best.zero_points()).astype(np.uint8)
        best = Blocks(
            np.where(better[:, :, None], tried.values, best.values),
            np.where(better, tried.scales, best.scales),
            None if symmetric else pack(zeros, bits),
            bits,
            block_size,
            best.fan_in,
        )
    return best


def _block_edges(weight: Floats, block_size: int) -> tuple[Floats, Floats]:
    """The least and the largest weight of each block, 0 included, at every weight's place."""
    starts = np.arange(0, len(weight), block_size)
    sizes = np.diff(np.append(starts, len(weight)))
    low = np.minimum(np.minimum.reduceat(weight, starts, axis=0), 0)
    high = np.maximum(np.maximum.reduceat(weight, starts, axis=0), 0)
    return np.repeat(low, sizes, axis=0), np.repeat(high, sizes, axis=0)


def _block_errors(blocks: Blocks, weight: Floats) -> Floats:
    """Squared error of each block ``[fan_out, blocks]``."""
    starts = np.arange(0, len(weight), blocks.block_size)
    return np.add.reduceat(np.square(blocks.floats() - weight), starts, axis=0).T


def _round(weight: Floats, bits: int, block_size: int, symmetric: bool) -> Blocks:
    fan_in, fan_out = weight.shape
    blocks = -(-fan_in // block_size)
    values = np.zeros((fan_out, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros(fan_out * blocks, np.float32)
    zeros = np.zeros((fan_out, -(-blocks * bits // 8)), np.uint8)
    quantize = kernels.quantize_matmul_4bits if bits == 4 else kernels.quantize_matmul_8bits
    quantize(
        values,
        np.ascontiguousarray(weight, np.float32),
        scales,
        zeros.reshape(-1),
        block_size,
        fan_out,
        fan_in,
        symmetric,
    )
    return Blocks(values, scales.reshape(fan_out, blocks), None if symmetric else zeros, bits, block_size, fan_in)


def gptq_blocks(weight: Floats, spread: Floats, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Quantize ``weight [fan_in, fan_out]`` by GPTQ, every block with the scale that fits what is left of it.

    Args:
        spread: what ``effc.passes.quantize_gptq.error_spread`` makes of the inputs' second moments.
    """
    fan_in, fan_out = weight.shape
    top, blocks = (1 << bits) - 1, []

    def grid(left: Floats) -> RoundRow:
        fitted = round_to_nearest(left, bits, block_size, symmetric)
        scale, zero = fitted.scales[:, 0], fitted.zero_points()[:, 0]
        safe = np.where(scale == 0, np.float32(1), scale)
        codes = np.full((block_size, fan_out), zero, np.float32)
        blocks.append((codes, scale, zero.astype(np.uint8)))

        def round_row(row: Floats, place: int) -> Floats:
            codes[place] = np.clip(np.rint(row / safe + zero), 0, top)
            return np.asarray((codes[place] - zero) * scale, np.float32)

        return round_row

    round_with_feedback(weight, spread, block_size, grid)
    values = np.stack([pack(codes.T.astype(np.uint8), bits) for codes, _, _ in blocks], axis=1)
    scales = np.stack([scale for _, scale, _ in blocks], axis=1)
    zeros = None if symmetric else pack(np.stack([zero for _, _, zero in blocks], axis=1), bits)
    return Blocks(values, scales, zeros, bits, block_size, fan_in)


def _unpack(packed: Bytes, bits: int) -> Bytes:
    """``[rows, n]`` codes of ``[rows, ...]`` bytes."""
    flat = packed.reshape(len(packed), -1)
    if bits == 8:
        return flat
    return np.stack([flat & 15, flat >> 4], axis=2).reshape(len(packed), -1)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Codes ``[rows, n]`` as bytes, low bits first; an odd number of 4-bit codes is filled with a zero."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
