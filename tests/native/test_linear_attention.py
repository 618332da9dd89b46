"""effc::LinearAttention in ONNX Runtime against the quadratic definition, on every instruction set this machine has.

The models carry their function bodies, as exported ones do, so that the tests also show that the kernel takes their
place.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from generated_cases import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import session
from onnx import TensorProto, helper
from test_sparse_attention import available_isas

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attention_cases import one_node_model

from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry
from effc.plugins.reference.linear import quadratic_attention

FORMS = ["linear:elu", "linear:relu", "performer:40", "hedgehog"]


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EFFC_ISA", request.param)
    name: str = request.param
    return name


@dataclass(frozen=True)
class LinearCase:
    form: str = "linear:elu"
    causal: bool = False
    batch: int = 1
    q_len: int = 150
    kv_len: int = 150
    num_heads: int = 2
    kv_num_heads: int = 2
    head_dim: int = 32
    visible: float | None = None
    size: float = 1.0

    @property
    def geometry(self) -> AttentionGeometry:
        form = parse_form(self.form)
        return AttentionGeometry(
            form, self.causal, self.num_heads, self.kv_num_heads, self.head_dim, self.head_dim**-0.5
        )

    def inputs(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
        """Feeds without and of the form's own inputs."""
        rng = np.random.default_rng(7)

        def normal(*shape: int, size: float = 1.0) -> np.ndarray[Any, Any]:
            return (rng.standard_normal(shape) * size).astype(np.float32)

        dim, keys = self.head_dim, (self.batch, self.kv_len, self.kv_num_heads * self.head_dim)
        feeds = {
            "query": normal(self.batch, self.q_len, self.num_heads * dim, size=self.size),
            "key": normal(*keys, size=self.size),
            "value": normal(*keys),
        }
        if self.visible is not None:
            feeds["key_mask"] = rng.random((self.batch, self.kv_len)) < self.visible
        extras = {}
        if self.form.startswith("performer"):
            extras = {"features": normal(int(self.form.split(":")[1]), dim)}
        elif self.form == "hedgehog":
            extras = {
                name: normal(heads, dim, dim, size=dim**-0.5)
                for name, heads in (("query_map", self.num_heads), ("key_map", self.kv_num_heads))
            }
        return feeds, extras


def expected(case: LinearCase) -> np.ndarray[Any, Any]:
    feeds, extras = case.inputs()

    def split(name: str, heads: int) -> torch.Tensor:
        tensor = torch.from_numpy(feeds[name]).double()
        return tensor.view(*tensor.shape[:2], heads, case.head_dim).transpose(1, 2)

    result = quadratic_attention(
        case.geometry.form,
        split("query", case.num_heads),
        split("key", case.kv_num_heads),
        split("value", case.kv_num_heads),
        scale=case.geometry.scale,
        causal=case.causal,
        key_mask=torch.from_numpy(feeds["key_mask"]) if "key_mask" in feeds else None,
        extras={name: torch.from_numpy(array).double() for name, array in extras.items()},
    )
    return result.transpose(1, 2).reshape(case.batch, case.q_len, -1).numpy()


def proto_of(case: LinearCase) -> bytes:
    model: onnx.ModelProto = one_node_model(case.geometry, case.visible is not None, case.inputs()[1])
    return model.SerializeToString()


def run(library: Path, case: LinearCase, threads: int = 2) -> np.ndarray[Any, Any]:
    feeds, extras = case.inputs()
    output: np.ndarray[Any, Any] = session(library, proto_of(case), threads).run(None, {**feeds, **extras})[0]
    return output


def check(library: Path, case: LinearCase) -> None:
    np.testing.assert_allclose(run(library, case), expected(case), atol=2e-5, rtol=1e-5, err_msg=str(case))


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(library: Path, isa: str, form: str, causal: bool) -> None:
    check(library, LinearCase(form, causal, batch=2))
    check(library, LinearCase(form, causal, 2, 70, 200, num_heads=6, kv_num_heads=2, head_dim=20, visible=0.7))


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("head_dim", [1, 4, 7, 8, 16, 40, 64, 72, 80, 96, 128, 256])
def test_head_dims(library: Path, isa: str, head_dim: int, causal: bool) -> None:
    for form in ("linear:elu", "hedgehog"):
        check(library, LinearCase(form, causal, q_len=70, kv_len=70, head_dim=head_dim))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
def test_lengths(library: Path, isa: str, form: str, length: int) -> None:
    for causal in (False, True):
        check(library, LinearCase(form, causal, q_len=length, kv_len=length))
        check(library, LinearCase(form, causal, q_len=1, kv_len=length))


@pytest.mark.parametrize("form", FORMS)
def test_several_states(library: Path, form: str) -> None:
    """Long sequences are summed in parts, whatever the number of threads."""
    for causal in (False, True):
        case = LinearCase(form, causal, q_len=30, kv_len=3100, num_heads=4, visible=0.9)
        check(library, case)
        np.testing.assert_array_equal(run(library, case, 1), run(library, case, 5))


def test_more_queries_than_keys(library: Path) -> None:
    check(library, LinearCase(q_len=170, kv_len=30))
    with pytest.raises(Exception, match="170 queries and 30 keys"):
        run(library, LinearCase(causal=True, q_len=170, kv_len=30))


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_are_zero(library: Path, isa: str, form: str) -> None:
    for causal in (False, True):
        assert (run(library, LinearCase(form, causal, visible=0.0)) == 0).all()


@pytest.mark.parametrize("form", ["performer:64", "linear:elu"])
def test_large_inputs_do_not_overflow(library: Path, isa: str, form: str) -> None:
    for causal in (False, True):
        case = LinearCase(form, causal, size=6.0, head_dim=16)
        np.testing.assert_allclose(run(library, case), expected(case), atol=2e-3)


def test_not_a_number_stays_in_its_row(library: Path, isa: str) -> None:
    case = LinearCase(q_len=64, kv_len=64)
    feeds, _ = case.inputs()
    feeds["query"][0, 3, 0] = np.nan
    output = session(library, proto_of(case)).run(None, feeds)[0]
    assert np.isnan(output[0, 3, :32]).all()
    assert np.isfinite(np.delete(output[0], 3, axis=0)).all() and np.isfinite(output[0, 3, 32:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_takes_the_place_of_the_body(library: Path, tmp_path: Path, form: str) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    case = LinearCase(form)
    feeds, extras = case.inputs()
    made = onnxruntime.InferenceSession(proto_of(case), options)
    made.run(None, {**feeds, **extras})
    events = json.loads(Path(made.end_profiling()).read_text())
    operators = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert operators == {"LinearAttention"}


def bad_node(pattern: str, shapes: dict[str, tuple[int, ...]], **attributes: object) -> bytes:
    given = {"query": (1, 8, 32), "key": (1, 8, 32), "value": (1, 8, 32), **shapes}
    node = helper.make_node(
        "LinearAttention",
        [*list(given)[:3], *([""] if len(given) > 3 else []), *list(given)[3:]],
        ["output"],
        domain="effc",
        **{"pattern": pattern, "num_heads": 2, "kv_num_heads": 2, **attributes},
    )
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in given.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("effc", 1)]
    graph = helper.make_graph([node], "linear", inputs, [output])
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return proto


@pytest.mark.parametrize(
    ("pattern", "shapes", "message"),
    [
        ("linear:gelu", {}, "'linear:gelu' is not a form of linear attention.*Known forms: linear:elu"),
        ("performer:", {}, "'performer:' is not a form"),
        ("performerx", {}, "'performerx' is not a form"),
        ("performer:8", {}, "features has shape .*it must be .features, head_dim. with head_dim 16"),
        ("performer:8", {"features": (8, 15)}, "features has shape .8, 15."),
        ("performer:8", {"features": (5000, 16)}, "at most 4096 features"),
        ("hedgehog", {"query_map": (2, 16, 16)}, "key_map has shape"),
        ("hedgehog", {"query_map": (2, 16, 16), "key_map": (3, 16, 16)}, "key_map has shape .3, 16, 16.; it must be"),
        ("linear:elu", {"key": (1, 8, 16)}, "the last dimension of key is 16"),
        ("linear:elu", {"value": (1, 7, 32)}, "value has shape"),
        ("linear:elu", {"query": (2, 8, 32)}, "query has batch 2 and key 1"),
    ],
)
def test_refusals(library: Path, pattern: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    proto = bad_node(pattern, shapes)
    given = {"query": (1, 8, 32), "key": (1, 8, 32), "value": (1, 8, 32), **shapes}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in given.items()}
    with pytest.raises(Exception, match=message):
        session(library, proto).run(None, feeds)


@st.composite
def cases(draw: st.DrawFn) -> LinearCase:
    kv_num_heads, keys = draw(st.integers(1, 3)), draw(st.integers(1, 300))
    return LinearCase(
        form=draw(st.sampled_from(["linear:elu", "linear:relu", "performer:1", "performer:17", "hedgehog"])),
        causal=draw(st.booleans()),
        batch=draw(st.integers(1, 2)),
        q_len=draw(st.integers(1, keys)),
        kv_len=keys,
        num_heads=kv_num_heads * draw(st.integers(1, 4)),
        kv_num_heads=kv_num_heads,
        head_dim=draw(st.integers(1, 70)),
        visible=draw(st.sampled_from([None, 0.0, 0.05, 0.5, 1.0])),
    )


@settings(max_examples=25, derandomize=True, **PROFILE)
@given(case=cases())
def test_anything(library: Path, isa: str, case: LinearCase) -> None:
    np.testing.assert_allclose(run(library, case), expected(case), atol=1e-4, rtol=1e-4, err_msg=str(case))
