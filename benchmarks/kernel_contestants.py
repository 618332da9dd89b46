"""What benchmarks/cpu_kernels.py compares: effc's kernels and the attention of ONNX Runtime and PyTorch, ready to run.

Each function builds its session once and returns a function that runs it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effc.plugins import native
from effc.plugins.forms.registry import parse_form, parse_pattern
from effc.plugins.pattern import Pattern

Feeds = dict[str, np.ndarray[Any, Any]]
Run = Callable[[], Any]
"""Runs once; what ONNX Runtime's contestants return is the first output, overwritten by the next run."""


@dataclass(frozen=True)
class Shape:
    """One attention call."""

    pattern: str
    causal: bool
    q_len: int
    kv_len: int
    num_heads: int
    kv_num_heads: int
    head_dim: int

    def flops(self) -> float:
        """Useful floating point operations: two multiply-adds per visible pair and element of head_dim.

        Of forms that are no patterns of positions, what their definition says for as many queries as keys.
        """
        form = parse_form(self.pattern)
        if not isinstance(form, Pattern):
            return float(form.cost(self.kv_len, self.causal, self.head_dim).flops * self.num_heads)
        return 4.0 * self.visible_pairs() * self.head_dim * self.num_heads

    def visible_pairs(self) -> int:
        """Visible (query, key) pairs of one head, counted by the pattern's definition."""
        pattern = parse_pattern(self.pattern)
        if self.q_len == self.kv_len:
            return int(pattern.visible_pairs(self.kv_len, self.causal))
        return int(pattern.mask(self.q_len, self.kv_len, self.causal).sum())


def tensors(shape: Shape) -> Feeds:
    rng = np.random.default_rng(0)

    def normal(length: int, heads: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((1, length, heads * shape.head_dim), dtype=np.float32)

    return {
        "query": normal(shape.q_len, shape.num_heads),
        "key": normal(shape.kv_len, shape.kv_num_heads),
        "value": normal(shape.kv_len, shape.kv_num_heads),
    }


def as_within_model(array: np.ndarray[Any, Any]) -> Any:
    """A copy in ONNX Runtime's own memory, which begins on a cache line; large arrays of NumPy begin in the middle."""
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype)
    value.update_inplace(array)
    return value


def bound(node: Any, inputs: Feeds, shapes: dict[str, tuple[int, ...]], threads: int, library: str | None) -> Run:
    """A session of one node; threads sleep while they wait.

    Outputs, whose ``shapes`` are given by name, are written to memory that is there from the start, as within a model,
    where ONNX Runtime uses memory again. Fresh pages for every run would cost as much as a fast kernel.
    """
    kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    given = [helper.make_tensor_value_info(n, kinds[str(x.dtype)], [None] * x.ndim) for n, x in inputs.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("effc", 1), ("com.microsoft", 1))]
    model = helper.make_model(
        helper.make_graph([node], "attention", given, outputs), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, as_within_model(array))
    values = [as_within_model(np.zeros(shape, np.float32)) for shape in shapes.values()]
    for name, value in zip(shapes, values, strict=True):
        binding.bind_ortvalue_output(name, value)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return values[0]

    return run


def ours(shape: Shape, threads: int, precision: str = "fp32", library: Path | None = None) -> Run:
    """The operator of effc's native library for the shape's form; ``library`` is another build of it."""
    feeds, operator = tensors(shape), parse_form(shape.pattern).op_type
    attributes = {"precision": precision} if operator == "SparseAttention" else {}
    node = helper.make_node(
        operator,
        list(feeds),
        ["output"],
        domain="effc",
        pattern=shape.pattern,
        causal=int(shape.causal),
        num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
        scale=shape.head_dim**-0.5,
        **attributes,
    )
    return bound(node, feeds, {"output": feeds["query"].shape}, threads, str(library or native.native_library()))


def multi_head_attention(shape: Shape, threads: int) -> Run:
    """Contrib MultiHeadAttention without a mask, which takes its flash path: ONNX Runtime's strongest dense attention.

    It has no grouped heads, so it reads as many key heads as there are query heads.
    """
    feeds = tensors(replace(shape, kv_num_heads=shape.num_heads))
    node = helper.make_node(
        "MultiHeadAttention", list(feeds), ["output"], domain="com.microsoft", num_heads=shape.num_heads
    )
    return bound(node, feeds, {"output": feeds["query"].shape}, threads, None)


def grouped_query_attention(shape: Shape, threads: int) -> Run:
    """Contrib GroupQueryAttention for new tokens. It appends to the cache, which is part of its time."""
    feeds = tensors(shape)
    past = shape.kv_len - shape.q_len
    rng = np.random.default_rng(1)
    cache = [rng.standard_normal((1, shape.kv_num_heads, past, shape.head_dim), dtype=np.float32) for _ in range(2)]
    feeds = {
        "query": feeds["query"],
        "key": np.ascontiguousarray(feeds["key"][:, -shape.q_len :]),
        "value": np.ascontiguousarray(feeds["value"][:, -shape.q_len :]),
        "past_key": cache[0],
        "past_value": cache[1],
        "seqlens_k": np.array([shape.kv_len - 1], np.int32),
        "total": np.array(shape.kv_len, np.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention",
        list(feeds),
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=shape.num_heads,
        kv_num_heads=shape.kv_num_heads,
    )
    present = (1, shape.kv_num_heads, shape.kv_len, shape.head_dim)
    shapes = {"output": feeds["query"].shape, "present_key": present, "present_value": present}
    return bound(node, feeds, shapes, threads, None)


def flex_attention(shape: Shape, threads: int) -> Run:
    """PyTorch's flex_attention, compiled, with the local window as its block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    name, window = shape.pattern.split(":")
    if name != "local":
        raise SystemExit("--flex compares local:W only")
    reach = int(window) - 1 if shape.causal else int(window) // 2

    def mask(batch: Any, head: Any, i: Any, j: Any) -> Any:
        return ((i >= j) & (i - j <= reach)) if shape.causal else (abs(i - j) <= reach)

    torch.set_num_threads(threads)
    blocks = create_block_mask(mask, None, None, shape.q_len, shape.kv_len, device="cpu")
    q, k, v = (
        torch.randn(1, shape.num_heads, length, shape.head_dim) for length in (shape.q_len, shape.kv_len, shape.kv_len)
    )
    compiled = torch.compile(flex)

    def run() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=blocks)

    return run


PEAK_ROUNDS = 10_000_000
"""About 20 ms per thread: in a tenth of that, waking the threads takes up to a tenth of the time."""


def peak_meter(threads: int) -> Callable[[], float]:
    """Returns a function that measures floating point operations per second of CPU time, with all threads at it.

    Busy cores share what the machine can spend on them, so one core alone would say too much of two.
    """
    rounds = ctypes.CDLL(native.native_library()).effc_multiply_add_rounds
    rounds.restype, rounds.argtypes = ctypes.c_double, [ctypes.c_int64]
    pool = ThreadPoolExecutor(threads)  # ctypes lets go of the interpreter's lock

    def measure() -> float:
        start = time.process_time()
        operations: float = sum(pool.map(rounds, [PEAK_ROUNDS] * threads))
        return operations / (time.process_time() - start)

    return measure


def exact_precision() -> None:
    """Let no variable of the environment change what is compared."""
    os.environ.pop("EFFC_PRECISION", None)
