"""A float64 reference of effc::SparseAttention and a way to run the operator, for the tests in this directory.

What is visible comes from effc's own definition of the patterns, so that the kernels are held to that one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from effc.plugins.forms.registry import parse_pattern

Array = NDArray[np.float32]
OPTIONAL = ("key_mask", "marks", "distance_bias", "distance_slope")


class CallSizes:
    """The sizes of a call; keys and their heads are as queries where a case does not say."""

    causal: bool
    batch: int
    q_len: int
    kv_len: int | None
    num_heads: int
    kv_num_heads: int | None
    head_dim: int

    @property
    def keys(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len

    @property
    def kv_heads(self) -> int:
        return self.kv_num_heads or self.num_heads


@dataclass(frozen=True)
class Case(CallSizes):
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
    marks: NDArray[np.bool_] | None = field(default=None, repr=False)
    bias_reach: int | None = None
    sloped: bool = False
    seed: int = 0

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
        if self.marks is not None:
            feeds["marks"] = self.marks
        if self.bias_reach is not None:
            table = rng.standard_normal((self.num_heads, 2 * self.bias_reach + 1))
            feeds["distance_bias"] = table.astype(np.float32)
        if self.sloped:
            feeds["distance_slope"] = (rng.random(self.num_heads) * 0.1).astype(np.float32)
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
    seen = parse_pattern(case.pattern).mask(case.q_len, case.keys, case.causal, case.marks)
    seen = seen[None, None] if seen.ndim == 2 else seen[:, None]
    if case.key_mask is not None:
        seen = seen & case.key_mask[:, None, None, :]
    distance = np.arange(case.keys)[None, :] - np.arange(case.keys - case.q_len, case.keys)[:, None]
    scores = query @ key.transpose(0, 1, 3, 2) * case.used_scale
    if case.bias_reach is not None:
        table = feeds["distance_bias"].astype(np.float64)
        scores = scores + table[:, distance.clip(-case.bias_reach, case.bias_reach) + case.bias_reach]
    if case.sloped:
        scores = scores + feeds["distance_slope"].astype(np.float64)[:, None, None] * distance
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    output = weights @ value / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        log_sum_exp = (np.log(total) + largest)[..., 0]
    return output.transpose(0, 2, 1, 3).reshape(case.batch, case.q_len, -1), log_sum_exp


def model(attributes: dict[str, Any], given: Collection[str] = (), log_sum_exp: bool = False) -> bytes:
    """A model of one effc::SparseAttention node whose dimensions are all dynamic; ``given`` optional inputs."""

    def tensor(name: str, kind: int = TensorProto.FLOAT, rank: int | None = 3) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, None if rank is None else [None] * rank)

    kinds = {"key_mask": TensorProto.BOOL, "marks": TensorProto.BOOL}
    inputs = [tensor("query"), tensor("key"), tensor("value")]
    inputs += [tensor(name, kinds.get(name, TensorProto.FLOAT), None) for name in OPTIONAL if name in given]
    outputs = [tensor("output")]
    if log_sum_exp:
        outputs.append(tensor("log_sum_exp"))
    names = ["query", "key", "value", *(name if name in given else "" for name in OPTIONAL)]
    while not names[-1]:
        names.pop()
    node = helper.make_node("SparseAttention", names, [x.name for x in outputs], domain="effc", **attributes)
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
    feeds = case.inputs()
    outputs: list[Array] = session(library, model(case.attributes(), feeds, log_sum_exp)).run(None, feeds)
    return outputs


def check(library: Path, case: Case) -> None:
    """Compare the operator's output with the reference. 5e-6 is about 40 units in the last place of the values."""
    actual, expected = run(library, case)[0], reference(case)[0]
    assert actual.shape == expected.shape, case
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6, err_msg=str(case))
