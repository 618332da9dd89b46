"""A float64 reference of effc::SparseAttention and a way to run the operator, for the tests in this directory.

The reference is written from the patterns' definitions, pair by pair, and shares no code with the kernels or with effc.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

Array = NDArray[np.float32]


def visible(pattern: str, causal: bool, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where query position ``i`` sees key position ``j``."""
    result = np.zeros(np.broadcast_shapes(i.shape, j.shape), dtype=bool)
    for term in pattern.split("|"):
        name, *texts = term.split(":")
        p = [int(text) for text in texts]
        if name == "dense":
            result |= True
        elif name == "local" and len(p) == 1:
            result |= (j <= i) & (i - j < p[0]) if causal else abs(i - j) <= p[0] // 2
        elif name == "local":
            result |= (j >= i - p[0]) & (j <= i + p[1])
        elif name == "dilated":
            inside = (i - j >= 0) & (i - j < p[0] * p[1]) if causal else abs(i - j) <= p[0] // 2 * p[1]
            result |= inside & ((i - j) % p[1] == 0)
        elif name == "block":
            result |= abs(i // p[0] - j // p[0]) <= (p[1] if len(p) == 2 else 0)
        elif name == "strided":
            result |= (i - j) % p[0] == 0
        elif name == "global":
            result |= (j < p[0]) | (i < p[0])
        elif name == "sinks":
            result |= j < p[0] + 0 * i
        else:
            raise ValueError(term)
    return result & (j <= i) if causal else result


@dataclass(frozen=True)
class Case:
    """One call of the operator."""

    pattern: str = "local:32"
    causal: bool = False
    batch: int = 1
    q_len: int = 64
    kv_len: int | None = None
    num_heads: int = 2
    kv_num_heads: int | None = None
    head_dim: int = 32
    scale: float | None = None
    key_mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    seed: int = 0

    @property
    def keys(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len

    @property
    def kv_heads(self) -> int:
        return self.kv_num_heads or self.num_heads

    @property
    def used_scale(self) -> float:
        return self.scale if self.scale is not None else self.head_dim**-0.5

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        rng = np.random.default_rng(self.seed)

        def normal(length: int, heads: int) -> Array:
            return rng.standard_normal((self.batch, length, heads * self.head_dim)).astype(np.float32)

        feeds: dict[str, NDArray[np.generic]] = {
            "query": normal(self.q_len, self.num_heads),
            "key": normal(self.keys, self.kv_heads),
            "value": normal(self.keys, self.kv_heads),
        }
        if self.key_mask is not None:
            feeds["key_mask"] = self.key_mask
        return feeds

    def attributes(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "causal": int(self.causal),
            "num_heads": self.num_heads,
            "kv_num_heads": self.kv_heads,
            "scale": self.used_scale,
        }


def reference(case: Case) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Output ``[batch, q_len, num_heads * head_dim]`` and log-sum-exp ``[batch, num_heads, q_len]`` in float64."""
    feeds = case.inputs()

    def heads(name: str, count: int) -> NDArray[np.float64]:
        tensor = feeds[name].astype(np.float64)
        split = tensor.reshape(*tensor.shape[:2], count, case.head_dim).transpose(0, 2, 1, 3)
        return split.repeat(case.num_heads // count, axis=1)

    query, key, value = heads("query", case.num_heads), heads("key", case.kv_heads), heads("value", case.kv_heads)
    i = np.arange(case.keys - case.q_len, case.keys)[:, None]
    seen = visible(case.pattern, case.causal, i, np.arange(case.keys)[None, :])[None, None]
    if case.key_mask is not None:
        seen = seen & case.key_mask[:, None, None, :]
    scores = np.where(seen, query @ key.transpose(0, 1, 3, 2) * case.used_scale, -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    output = weights @ value / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        log_sum_exp = (np.log(total) + largest)[..., 0]
    return output.transpose(0, 2, 1, 3).reshape(case.batch, case.q_len, -1), log_sum_exp


def model(attributes: dict[str, Any], key_mask: bool, log_sum_exp: bool = False) -> bytes:
    """A model of one effc::SparseAttention node whose dimensions are all dynamic."""

    def tensor(name: str, kind: int = TensorProto.FLOAT, rank: int = 3) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    inputs = [tensor("query"), tensor("key"), tensor("value")]
    outputs = [tensor("output")]
    if key_mask:
        inputs.append(tensor("key_mask", TensorProto.BOOL, 2))
    if log_sum_exp:
        outputs.append(tensor("log_sum_exp"))
    node = helper.make_node(
        "SparseAttention", [x.name for x in inputs], [x.name for x in outputs], domain="effc", **attributes
    )
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("effc", 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return proto


def session(library: Path, proto: bytes, threads: int = 2) -> onnxruntime.InferenceSession:
    """A CPU session with the native library registered."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def run(library: Path, case: Case, log_sum_exp: bool = False) -> list[Array]:
    """Run one case through ONNX Runtime."""
    proto = model(case.attributes(), case.key_mask is not None, log_sum_exp)
    outputs: list[Array] = session(library, proto).run(None, case.inputs())
    return outputs


def check(library: Path, case: Case) -> None:
    """Compare the operator's output with the reference. 5e-6 is about 40 units in the last place of the values."""
    actual, expected = run(library, case)[0], reference(case)[0]
    assert actual.shape == expected.shape, case
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6, err_msg=str(case))
