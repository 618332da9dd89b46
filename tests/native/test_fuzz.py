"""Whatever a node says and is fed, it computes or refuses with a message: never a crash or numbers from nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated_cases import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import session
from onnx import TensorProto, helper

OPTIONAL = {
    "SparseAttention": {"key_mask": bool, "marks": bool, "distance_bias": float, "distance_slope": float},
    "LinearAttention": {"key_mask": bool, "first_map": float, "second_map": float},
}
PATTERNS = [
    "local:8",
    "local:3:200",
    "strided:5",
    "dilated:4:9|sinks:3",
    "global:2|random:2",
    "global:cls|block:7",
    "linear:elu",
    "linear:relu",
    "performer:3",
    "hedgehog",
]


@dataclass
class Call:
    operator: str
    attributes: dict[str, Any]
    feeds: dict[str, np.ndarray[Any, Any]] = field(repr=False)
    shapes: dict[str, tuple[int, ...]]


def array(draw: st.DrawFn, shape: tuple[int, ...], kind: type) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    made = rng.random(shape) < 0.7 if kind is bool else rng.standard_normal(shape).astype(np.float32)
    # Rows that do not lie side by side in the caller's memory.
    return np.repeat(made, 2, axis=0)[::2] if draw(st.booleans()) else made


def shape_like(draw: st.DrawFn, right: tuple[int, ...]) -> tuple[int, ...]:
    """Mostly the right shape, else one with a wrong number or rank."""
    if draw(st.integers(0, 9)) < 8:
        return right
    wrong = list(right)
    change = draw(st.sampled_from(["size", "less", "more"]))
    if change == "size":
        wrong[draw(st.integers(0, len(wrong) - 1))] = draw(st.integers(0, 70))
    elif change == "less":
        wrong.pop()
    else:
        wrong.append(draw(st.integers(0, 3)))
    return tuple(wrong)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    operator = draw(st.sampled_from(sorted(OPTIONAL)))
    kv_heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    heads, batch = kv_heads * draw(st.integers(1, 3)), draw(st.integers(0, 2))
    queries, keys = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    alphabet = st.text("local:sinkhedgrf|0123456789 +#-\x00é", max_size=12)
    attributes: dict[str, Any] = {
        "pattern": draw(st.one_of(st.sampled_from(PATTERNS), alphabet)),
        "causal": draw(st.sampled_from([0, 0, 1, 1, 2, -1])),
        "num_heads": draw(st.sampled_from([heads] * 8 + [0, -1, 7, 2**40])),
        "kv_num_heads": draw(st.sampled_from([kv_heads] * 8 + [0, -3, 5, 2**62])),
        "scale": draw(st.sampled_from([0.0, 0.125, -1.0, 1e30, float("inf"), float("nan")])),
    }
    for name in ("causal", "num_heads", "kv_num_heads", "scale", "pattern"):
        if draw(st.integers(0, 19)) == 0:
            del attributes[name]
    right = {
        "query": (batch, queries, heads * dim),
        "key": (batch, keys, kv_heads * dim),
        "value": (batch, keys, kv_heads * dim),
        "key_mask": (batch, keys),
        "marks": (batch, keys),
        "distance_bias": (heads, 2 * draw(st.integers(0, 9)) + 1),
        "distance_slope": (heads,),
        "first_map": draw(st.sampled_from([(3, dim), (heads, dim, dim)])),
        "second_map": (kv_heads, dim, dim),
    }
    kinds = {"query": float, "key": float, "value": float}
    kinds |= {name: kind for name, kind in OPTIONAL[operator].items() if draw(st.booleans())}
    shapes = {name: shape_like(draw, right[name]) for name in kinds}
    feeds = {name: array(draw, shapes[name], kind) for name, kind in kinds.items()}
    return Call(operator, attributes, feeds, shapes)


def proto_of(call: Call) -> bytes:
    names = ["query", "key", "value", *(name if name in call.feeds else "" for name in OPTIONAL[call.operator])]
    while not names[-1]:
        names.pop()
    node = helper.make_node(call.operator, names, ["output"], domain="effc", **call.attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
        for name, x in call.feeds.items()
    ]
    graph = helper.make_graph(
        [node], "fuzz", inputs, [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("effc", 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return proto


def compute_or_refuse(library: Path, call: Call) -> None:
    try:
        output = session(library, proto_of(call)).run(None, call.feeds)[0]
    except Exception as refusal:
        assert f"effc::{call.operator}: " in str(refusal), refusal
        assert "unknown error" not in str(refusal) and "bad_alloc" not in str(refusal), refusal
        return
    assert output.shape == call.shapes["query"]
    if abs(call.attributes.get("scale", 0.0)) < 10:
        assert np.isfinite(output).all()


@settings(max_examples=150, derandomize=True, **PROFILE)
@given(call=calls())
def test_anything_is_computed_or_refused(library: Path, call: Call) -> None:
    compute_or_refuse(library, call)


@pytest.mark.slow
@settings(max_examples=1500, **PROFILE)
@given(call=calls())
def test_much_more_is_computed_or_refused(library: Path, call: Call) -> None:
    compute_or_refuse(library, call)
