"""effc::BlockTopKAttention in ONNX Runtime against the form's definition, on every instruction set this machine has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import session
from test_sparse_attention import available_isas

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attention_cases import expected, one_node_model, random_inputs

from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EFFC_ISA", request.param)
    name: str = request.param
    return name


def geometry(form: str, causal: bool = False, heads: int = 2, kv_heads: int = 2, dim: int = 32) -> AttentionGeometry:
    return AttentionGeometry(parse_form(form), causal, heads, kv_heads, dim, dim**-0.5)


def check(
    library: Path, case: AttentionGeometry, batch: int, queries: int, keys: int, padding: str = "none", seed: int = 0
) -> None:
    feed = random_inputs(case, batch, queries, keys, seed, padding)
    found = session(library, one_node_model(case, masked=True).SerializeToString()).run(None, feed)[0]
    np.testing.assert_allclose(found, expected(case, feed), atol=2e-5, rtol=1e-5, err_msg=f"{case} {padding} {seed}")


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("form", ["topk-blocks:2:64", "topk-blocks:3:64", "topk-blocks:4:128", "topk-blocks:5:16"])
def test_forms(library: Path, isa: str, form: str, causal: bool) -> None:
    check(library, geometry(form, causal, dim=64), 2, 500, 500)
    check(library, geometry(form, causal, heads=6, kv_heads=2, dim=20), 2, 70, 411, "holes")


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("padding", ["left", "right", "holes", "all"])
def test_padding(library: Path, isa: str, padding: str, causal: bool) -> None:
    check(library, geometry("topk-blocks:3:32", causal), 3, 200, 200, padding)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
def test_lengths(library: Path, isa: str, length: int) -> None:
    for causal in (False, True):
        check(library, geometry("topk-blocks:2:32", causal), 1, length, length)
        check(library, geometry("topk-blocks:2:32", causal, heads=4), 1, 1, length)


def test_more_blocks_than_a_word_has_bits(library: Path) -> None:
    for causal in (False, True):
        check(library, geometry("topk-blocks:9:8", causal, heads=4, dim=8), 1, 300, 1100, "holes")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(library: Path, data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    form = f"topk-blocks:{data.draw(st.integers(2, 6))}:{data.draw(st.integers(1, 100))}"
    case = geometry(
        form, data.draw(st.booleans()), kv_heads * data.draw(st.integers(1, 3)), kv_heads, data.draw(st.integers(1, 70))
    )
    keys = data.draw(st.integers(1, 260))
    queries = data.draw(st.integers(1, keys))
    padding = data.draw(st.sampled_from(["none", "left", "right", "holes"]))
    check(library, case, data.draw(st.integers(1, 2)), queries, keys, padding, data.draw(st.integers(0, 1000)))


def test_the_kernel_takes_the_place_of_the_body(library: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    case = geometry("topk-blocks:2:16")
    made = onnxruntime.InferenceSession(one_node_model(case, masked=True).SerializeToString(), options)
    made.run(None, random_inputs(case, 1, 50, 50, 0, "none"))
    events = json.loads(Path(made.end_profiling()).read_text())
    assert {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})} == {
        "BlockTopKAttention"
    }


def test_the_choice_does_not_depend_on_threads(library: Path) -> None:
    case = geometry("topk-blocks:3:64", True, heads=4)
    feed = random_inputs(case, 2, 700, 700, 5, "left")
    proto = one_node_model(case, masked=True).SerializeToString()
    one, many = (session(library, proto, threads).run(None, feed)[0] for threads in (1, 5))
    np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize(
    "pattern", ["topk-blocks:3", "topk-blocks:1:64", "topk-blocks:3:0", "topk:3", "topk-blocks:a:b"]
)
def test_other_forms_are_refused(library: Path, pattern: str) -> None:
    model = one_node_model(geometry("topk-blocks:3:64"), masked=True)
    bad = onnx.ModelProto.FromString(model.SerializeToString())
    next(one for one in bad.graph.node[0].attribute if one.name == "pattern").s = pattern.encode()
    with pytest.raises(Exception, match=f"'{pattern}' is no topk-blocks:COUNT:BLOCK"):
        session(library, bad.SerializeToString())


def test_more_queries_than_keys_are_refused(library: Path) -> None:
    case = geometry("topk-blocks:3:64")
    feed = random_inputs(case, 1, 50, 50, 0, "none")
    feed["query"] = np.concatenate([feed["query"], feed["query"]], axis=1)
    with pytest.raises(Exception, match="100 queries and 50 keys"):
        session(library, one_node_model(case, masked=True).SerializeToString()).run(None, feed)
