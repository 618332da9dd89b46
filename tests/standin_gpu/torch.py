"""Stands in for torch with CUDA on machines without a GPU: as much of it as running engines needs, over numpy.

Memory is the CPU's. As with CUDA, the current GPU and stream belong to a thread, and work on another one is noticed.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np

float32, float16, int64, int32, bool = (np.dtype(name) for name in ("f4", "f2", "i8", "i4", "?"))
bfloat16 = "bfloat16, which numpy does not have"
_current = threading.local()
working_on: int | None = None
"""The GPU that all work has to be for; any if None."""


class Tensor:
    def __init__(self, array: np.ndarray, is_cuda: bool):
        self.array, self.is_cuda = array, is_cuda

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def to(self, device: str, dtype: np.dtype) -> Tensor:
        _check()
        same = self.is_cuda and self.array.dtype == dtype
        return self if same else Tensor(self.array.astype(dtype), device == "cuda")

    def contiguous(self) -> Tensor:
        return self if self.array.flags.c_contiguous else Tensor(np.ascontiguousarray(self.array), self.is_cuda)

    def data_ptr(self) -> int:
        assert self.is_cuda and self.array.flags.c_contiguous
        return self.array.ctypes.data

    def copy_(self, source: Tensor) -> None:
        _check()
        assert self.is_cuda and source.is_cuda and self.array.shape == source.array.shape
        self.array[...] = source.array

    def clone(self) -> Tensor:
        return Tensor(self.array.copy(), self.is_cuda)

    def float(self) -> Tensor:
        return Tensor(self.array.astype(np.float32), self.is_cuda)

    def cpu(self) -> Tensor:
        return Tensor(self.array.copy(), False)

    def numpy(self) -> np.ndarray:
        assert not self.is_cuda, "memory of a GPU is no memory of numpy's"
        return self.array

    def __getitem__(self, key) -> Tensor:
        return Tensor(self.array[key], self.is_cuda)


class Stream:
    def __init__(self, number: int = 7):
        self.cuda_stream = number

    def synchronize(self) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> object:
        return object()

    def __eq__(self, other: object) -> object:
        return isinstance(other, Stream) and self.cuda_stream == other.cuda_stream


def from_numpy(array: np.ndarray) -> Tensor:
    return Tensor(array, False)


def empty(shape: tuple[int, ...], *, dtype: np.dtype, device: str) -> Tensor:
    _check()
    # What is left in memory may be anything, and is not a number where that is possible.
    return Tensor(np.full(shape, np.nan if dtype.kind == "f" else 99, dtype), device == "cuda")


def zeros(shape: tuple[int, ...], *, dtype: np.dtype, device: str) -> Tensor:
    _check()
    return Tensor(np.zeros(shape, dtype), device == "cuda")


def current_gpu() -> int:
    return getattr(_current, "gpu", 0)


def _set_device(gpu: int) -> None:
    _current.gpu = gpu


def _set_stream(stream: Stream) -> None:
    _current.stream = stream


def current_stream() -> Stream:
    return getattr(_current, "stream", Stream(0))


def _check() -> None:
    assert working_on in (None, current_gpu()), f"this thread works on GPU {current_gpu()}"


cuda = SimpleNamespace(
    is_available=lambda: True,
    set_device=_set_device,
    Stream=Stream,
    set_stream=_set_stream,
    current_stream=current_stream,
)
