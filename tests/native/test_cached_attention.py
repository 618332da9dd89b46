"""effc::CachedAttention, kernel and function body, against its definition in float64 on every instruction set here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from generated_cases import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import session
from numpy.typing import NDArray
from onnx import helper
from test_sparse_attention import available_isas

from effc.exporters.generation_bodies import CACHED_INPUTS, HIDDEN, cached_attention
from effc.plugins.caches import CACHED_ATTENTION
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry

Feeds = dict[str, NDArray[Any]]
SLOTS_PER_TASK = 512  # of cached_plan.cpp


@dataclass(frozen=True)
class Step:
    """One call."""

    batch: int = 1
    slots: int = 70
    num_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    kept_in: str = "fp32"
    distances: tuple[str, ...] = ()
    hidden: str = "some"  # slots: none, some, all, or all and the token itself: everything
    seed: int = 0

    @property
    def geometry(self) -> AttentionGeometry:
        # Of this form a token may see nothing, so that the body has to guard against it.
        form = parse_form("global:4" if self.hidden == "everything" else "dense")
        return AttentionGeometry(form, True, self.num_heads, self.kv_heads, self.head_dim, self.head_dim**-0.5)

    def feeds(self) -> Feeds:
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> NDArray[np.float32]:
            return rng.standard_normal((self.batch, *shape)).astype(np.float32)

        feeds: Feeds = {
            "query": normal(1, self.num_heads * self.head_dim),
            "key": normal(1, self.kv_heads * self.head_dim),
            "value": normal(1, self.kv_heads * self.head_dim),
        }
        cache = (self.kv_heads, self.slots)
        for name in ("past_key", "past_value"):
            rows = normal(*cache, self.head_dim)
            if self.kept_in == "int8":
                feeds[name] = (rows * 40).clip(-127, 127).astype(np.int8)
                feeds[f"{name}_scale"] = rng.uniform(0.01, 0.04, (self.batch, *cache, 1)).astype(np.float32)
            else:
                # Also numbers that half precision has in its subnormal range only.
                rows[..., :3] *= 1e-6
                feeds[name] = rows.astype({"fp32": np.float32, "fp16": np.float16}[self.kept_in])
        bias = np.zeros((self.batch, 1, 1, self.slots + 1), np.float32)
        if self.hidden == "some":
            bias[..., :-1][rng.random((self.batch, 1, 1, self.slots)) < 0.4] = HIDDEN
        elif self.hidden != "none":
            bias[..., : None if self.hidden == "everything" else -1] = HIDDEN
        feeds["bias"] = bias
        if self.distances:
            feeds["distance"] = np.append(rng.integers(-2 * self.slots - 1, 1, self.slots), 0)
        if "distance_bias" in self.distances:
            feeds["distance_bias"] = rng.standard_normal((self.num_heads, 2 * 16 + 1)).astype(np.float32)
        if "distance_slope" in self.distances:
            feeds["distance_slope"] = (rng.random(self.num_heads) * 0.1).astype(np.float32)
        return feeds

    def model(self, body: bool) -> bytes:
        """A model of one node, with the function body or for the kernel only; all dimensions are dynamic."""
        feeds = self.feeds()
        names = [name if name in feeds else "" for name in CACHED_INPUTS]
        while not names[-1]:
            names.pop()
        attributes: dict[str, Any] = {
            "pattern": str(self.geometry.form),
            "causal": 1,
            "num_heads": self.num_heads,
            "kv_num_heads": self.kv_heads,
            "scale": self.geometry.scale,
        }
        node = helper.make_node(CACHED_ATTENTION, names, ["output"], domain="effc", **attributes)
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in feeds.items()
        ]
        output = helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [None] * 3)
        functions = []
        if body:
            function = cached_attention(self.geometry, frozenset(self.distances), self.kept_in)
            node.overload = function.overload
            functions.append(ir.serde.serialize_function(function))
        opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("effc", 1), ("com.microsoft", 1))]
        graph = helper.make_graph([node], "step", inputs, [output])
        model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
        proto: bytes = model.SerializeToString()
        return proto


def expected(step: Step, feeds: Feeds) -> NDArray[np.float64]:
    exact = {name: array.astype(np.float64) for name, array in feeds.items()}
    heads, kv, dim = step.num_heads, step.kv_heads, step.head_dim
    query = exact["query"].reshape(step.batch, heads, 1, dim)
    rows = {}
    for name in ("key", "value"):
        own = exact[name].reshape(step.batch, kv, 1, dim)
        past = exact[f"past_{name}"] * exact.get(f"past_{name}_scale", 1.0)
        rows[name] = np.concatenate([past, own], axis=2).repeat(heads // kv, axis=1)
    scores = (query @ rows["key"].swapaxes(2, 3))[:, :, 0] * np.float32(dim**-0.5)
    if "distance_bias" in feeds:
        reach = feeds["distance_bias"].shape[1] // 2
        scores += exact["distance_bias"][:, feeds["distance"].clip(-reach, reach) + reach]
    if "distance_slope" in feeds:
        scores += exact["distance_slope"][:, None] * exact["distance"]
    seen = (feeds["bias"] > HIDDEN / 2)[:, :, 0]
    largest = np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True)
    weights = np.where(seen, np.exp(scores - np.where(np.isfinite(largest), largest, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    output: NDArray[np.float64] = weights[:, :, None] @ rows["value"]
    return output.reshape(step.batch, 1, heads * dim)


def check(library: Path, step: Step, threads: int = 2) -> None:
    feeds = step.feeds()
    actual = session(library, step.model(body=False), threads).run(None, feeds)[0]
    np.testing.assert_allclose(actual, expected(step, feeds), rtol=0, atol=5e-6, err_msg=str(step))


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EFFC_ISA", request.param)
    name: str = request.param
    return name


@pytest.mark.parametrize("kept_in", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("slots", [0, 1, 63, 64, 65, SLOTS_PER_TASK, SLOTS_PER_TASK + 1, 3 * SLOTS_PER_TASK - 7])
def test_lengths(library: Path, isa: str, kept_in: str, slots: int) -> None:
    check(library, Step(batch=2, slots=slots, kept_in=kept_in, hidden="some"))


@pytest.mark.parametrize("hidden", ["none", "all", "everything"])
@pytest.mark.parametrize("kept_in", ["fp32", "fp16", "int8"])
def test_hidden_slots(library: Path, isa: str, kept_in: str, hidden: str) -> None:
    check(library, Step(batch=2, slots=130, kept_in=kept_in, hidden=hidden))


@pytest.mark.parametrize("distances", [("distance_bias",), ("distance_slope",), ("distance_bias", "distance_slope")])
def test_distances(library: Path, isa: str, distances: tuple[str, ...]) -> None:
    check(library, Step(batch=2, slots=600, num_heads=6, kv_heads=3, distances=distances))


@pytest.mark.parametrize("distances", [(), ("distance_bias", "distance_slope")])
@pytest.mark.parametrize("kept_in", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("hidden", ["some", "everything"])
def test_function_body(library: Path, kept_in: str, hidden: str, distances: tuple[str, ...]) -> None:
    """The body, which runs without the library, says the same; with it the kernel takes its place."""
    step = Step(batch=2, slots=90, kept_in=kept_in, hidden=hidden, distances=distances)
    feeds = step.feeds()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    body = onnxruntime.InferenceSession(step.model(body=True), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(body.run(None, feeds)[0], expected(step, feeds), rtol=0, atol=1e-5)
    kernel = session(library, step.model(body=True))
    np.testing.assert_array_equal(kernel.run(None, feeds)[0], session(library, step.model(False)).run(None, feeds)[0])


def test_infinite_half_numbers(library: Path, isa: str) -> None:
    """An overflow of half precision is as visible as in any other runtime."""
    step = Step(kept_in="fp16", hidden="none")
    feeds = step.feeds()
    feeds["past_value"][0, 0, 3, 5] = np.inf
    output = session(library, step.model(body=False)).run(None, feeds)[0].reshape(4, 32)
    assert np.isposinf(output[:2, 5]).all()
    assert np.isfinite(np.delete(output, 5, axis=1)).all()
    assert np.isfinite(output[2:]).all()


@settings(max_examples=40, derandomize=True, **PROFILE)
@given(data=st.data())
def test_random_calls(library: Path, data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    step = Step(
        batch=data.draw(st.integers(1, 3)),
        slots=data.draw(st.integers(0, 1200)),
        num_heads=kv_heads * data.draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=data.draw(st.sampled_from([1, 8, 20, 32, 64, 80, 96, 128, 256])),
        kept_in=data.draw(st.sampled_from(["fp32", "fp16", "int8"])),
        distances=data.draw(st.sampled_from([(), ("distance_bias",), ("distance_slope",)])),
        hidden=data.draw(st.sampled_from(["none", "some", "all", "everything"])),
        seed=data.draw(st.integers(0, 2**20)),
    )
    check(library, step, threads=data.draw(st.integers(1, 3)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda a: np.repeat(a, 2, axis=1), "there are 2 queries and 1 keys; a step has one new token"),
        ("past_key", lambda a: a[0], r"past_key has shape .* give it as .batch, kv_num_heads, slots, head_dim."),
        ("past_value", lambda a: a[:, :, 1:], r"past_value has shape .* it must be .1, 2, 70, 32."),
        ("bias", lambda a: a[..., 1:], r"bias has shape .* it must be .1, 1, 1, 71."),
        ("past_key", lambda a: a.astype(np.float64), "past_key must be float, float16 or int8"),
        ("past_value", lambda a: a.astype(np.float16), "different types"),
        ("past_key_scale", lambda a: np.ones((1, 2, 70, 1), np.float32), "belong to INT8 caches"),
        ("distance_slope", lambda a: np.ones(4, np.float32), "need the input distance"),
    ],
)
def test_refusals(library: Path, name: str, change: Any, message: str) -> None:
    feeds = Step().feeds()
    feeds[name] = change(feeds.get(name))
    refuse(library, feeds, message)


def test_int8_needs_its_scales(library: Path) -> None:
    feeds = Step(kept_in="int8").feeds()
    del feeds["past_value_scale"]
    refuse(library, feeds, "INT8 caches, which need both")


def refuse(library: Path, feeds: Feeds, message: str) -> None:
    class Given(Step):
        def feeds(self) -> Feeds:
            return feeds

    with pytest.raises(Exception, match=message):
        session(library, Given().model(body=False)).run(None, feeds)
