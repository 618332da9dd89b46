"""Running a case of effc::SparseAttention on the CUDA kernels under the emulator, and holding it to the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from emulated_run import NUMBERS, check_close, rounded, run_problem
from native_cases import OPTIONAL, Case, reference
from numpy.typing import NDArray

TENSORS = ("query", "key", "value")


@dataclass(frozen=True)
class CudaCase(Case):
    """One call of the kernels. Queries, keys and values are rounded to ``number`` before they go anywhere.

    E4M3 tensors have a scale each, in ``scales``, and the output has ``output``; other numbers ignore both.
    ``key_blocks [batch, kv_heads, query blocks, count]``: what content-based selection chose.
    """

    number: str = "half"
    key_blocks: NDArray[np.int32] | None = field(default=None, repr=False)
    block_size: int = 0
    scales: tuple[float, float, float] = (0.01, 0.0125, 0.02)
    output: str = "half"
    small_tiles: bool = False

    @property
    def output_number(self) -> str:
        return self.output if self.number == "e4m3" else self.number

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        feeds = super().inputs()
        for name in TENSORS:
            feeds[name] = rounded(feeds[name], self.number) if self.number != "e4m3" else self.meant(feeds, name)
        return feeds

    def meant(self, feeds: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.float32]:
        """What the E4M3 numbers nearest to a tensor stand for."""
        scale = np.float32(self.scales[TENSORS.index(name)])
        return rounded(np.clip(feeds[name].astype(np.float32) / scale, -448, 448), "e4m3") * scale

    def given(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """What the kernels are given for it."""
        if self.number != "e4m3":
            return dict(feeds)
        scales = zip(TENSORS, self.scales, strict=True)
        return {**feeds, **{name: feeds[name].astype(np.float32) / np.float32(scale) for name, scale in scales}}


@dataclass(frozen=True)
class Outcome:
    output: NDArray[np.float32]
    log_sum_exp: NDArray[np.float32]
    counters: dict[str, int]


def run(program: Path, case: CudaCase, *options: str, feeds: dict[str, NDArray[np.generic]] | None = None) -> Outcome:
    """Run one case; ``options`` are the program's."""
    feeds = feeds if feeds is not None else case.inputs()
    fields = {
        "bias_reach": case.bias_reach or 0,
        "scale": repr(float(case.used_scale)),
        "pattern": case.pattern,
        "log_sum_exp": 1,
        "key_block_count": 0 if case.key_blocks is None else case.key_blocks.shape[-1],
        "block_lists": 0 if case.key_blocks is None else int(np.prod(case.key_blocks.shape[:-1])),
        "block_size": case.block_size,
        "tiling": int(case.small_tiles),
        **{f"{name}_scale": repr(scale) for name, scale in zip(TENSORS, case.scales, strict=True)},
        "output_number": list(NUMBERS).index(case.output_number),
        **{name: int(name in feeds) for name in OPTIONAL},
    }
    others = [feeds[name] for name in OPTIONAL if name in feeds]
    if case.key_blocks is not None:
        others.append(case.key_blocks.astype(np.int32))
    output, statistics, counters = run_problem(
        program, case, case.number, fields, case.given(feeds), others, options, case.output_number
    )
    return Outcome(output, statistics.reshape(case.batch, case.num_heads, case.q_len), counters)


def check(program: Path, case: CudaCase, *options: str) -> Outcome:
    """Run one case and compare output and log-sum-exp with the reference."""
    outcome = run(program, case, *options)
    expected, expected_statistics = reference(case)
    check_close(outcome.output, expected, case.number, case)
    np.testing.assert_allclose(outcome.log_sum_exp, expected_statistics, rtol=0, atol=1e-4, err_msg=str(case))
    return outcome
