"""Attention written out for TensorRT, against the float64 reference, in plain ONNX Runtime; and as plugin nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from attention_cases import expected, one_node_model, random_inputs

from effc.errors import PreconditionError
from effc.exporters.engine_attention import given_inputs, lower_attention
from effc.exporters.half_precision import to_half
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry
from effc.plugins.reference.topk_blocks import chosen_blocks

FORMS = ["dense", "local:5:9", "dilated:9:4", "block:16:2", "strided:8", "random:1", "global:3|local:8", "sinks:5"]


def geometry(form: str, causal: bool, heads: int = 4, kv_heads: int = 2) -> AttentionGeometry:
    return AttentionGeometry(parse_form(form), causal, heads, kv_heads, 8, 0.35)


def lowered(model, plugin: bool, past: bool = False) -> ir.Model:
    graph = ir.serde.deserialize_model(model)
    graph.graph[0].name = "model.layer"
    lower_attention(graph, plugin, past=past)
    return graph


def run(graph: ir.Model, feed) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(graph).SerializeToString(), options)
    return session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})[0]


def seeing_rows(wanted: np.ndarray) -> np.ndarray:
    """Rows that see a key: the others are zero by definition, and dense causal layers of engines give any number."""
    return np.abs(wanted).sum(axis=-1) > 0


@pytest.mark.parametrize("padding", [pytest.param("none", marks=pytest.mark.slow), "left"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_written_out_attention_is_the_reference(form, causal, padding):
    case = geometry(form, causal)
    feed = random_inputs(case, 2, 70, 70, seed=1, padding=padding)
    masked = padding != "none"
    graph = lowered(one_node_model(case, masked), plugin=False)
    assert not graph.functions and all(node.domain == "" for node in graph.graph.all_nodes())
    found = run(graph, feed)
    wanted = expected(case, feed)
    rows = seeing_rows(wanted) if form == "dense" and causal else np.ones(found.shape[:2], dtype=bool)
    np.testing.assert_allclose(found[rows], wanted[rows], atol=2e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("queries", [1, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["dense", "local:16", "global:3|local:8", "sinks:5"])
def test_queries_are_the_last_positions(form, queries):
    case = geometry(form, True)
    feed = random_inputs(case, 2, queries, 40, seed=2, padding="left")
    found = run(lowered(one_node_model(case, True), plugin=False, past=True), feed)
    np.testing.assert_allclose(found, expected(case, feed), atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["dense", "local:16"])
def test_biases_by_distance_are_added(form, causal):
    case = geometry(form, causal)
    feed = random_inputs(case, 2, 33, 33, seed=3, padding="left")
    random = np.random.default_rng(3)
    extras = {
        "distance_bias": random.standard_normal((4, 21), dtype=np.float32),
        "distance_slope": random.standard_normal(4, dtype=np.float32),
    }
    found = run(lowered(one_node_model(case, True, extras), plugin=False), feed | extras)
    wanted = expected(case, feed, extras)
    rows = seeing_rows(wanted)
    np.testing.assert_allclose(found[rows], wanted[rows], atol=5e-5)


@pytest.mark.parametrize("form, padding", [("linear:elu", "left"), ("linear:relu", "none")])
@pytest.mark.parametrize("causal", [False, True])
def test_written_out_linear_attention_is_the_reference(form, causal, padding):
    case = geometry(form, causal)
    queries = 7 if causal else 70
    feed = random_inputs(case, 2, queries, 70, seed=5, padding=padding)
    graph = lowered(one_node_model(case, padding != "none"), plugin=False, past=True)
    assert not graph.functions and all(node.domain == "" for node in graph.graph.all_nodes())
    assert "model.layer" in {node.name for node in graph.graph}, "the build log speaks of layers by their nodes"
    np.testing.assert_allclose(run(graph, feed), expected(case, feed), atol=2e-5)


CHOICES = [("topk-blocks:3:16", 70, "left"), ("topk-blocks:3:16", 7, "none"), ("topk-blocks:9:8", 64, "right")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "form, queries, padding",
    [
        *CHOICES,
        *(
            pytest.param(form, queries, padding, marks=pytest.mark.slow)
            for form in ("topk-blocks:2:8", "topk-blocks:4:16", "topk-blocks:9:16")
            for queries in (1, 7, 30, 70)
            for padding in ("none", "left", "right", "holes", "all")
        ),
    ],
)
def test_written_out_choices_of_blocks_are_the_reference(form, queries, padding, causal):
    case = geometry(form, causal)
    feed = random_inputs(case, 2, queries, 70, seed=6, padding=padding)
    graph = lowered(one_node_model(case, padding != "none"), plugin=False, past=queries < 70)
    assert not graph.functions and all(node.domain == "" for node in graph.graph.all_nodes())
    np.testing.assert_allclose(run(graph, feed), expected(case, feed), atol=2e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [451, pytest.param(70, marks=pytest.mark.slow)])
def test_the_plugin_gets_the_blocks_that_the_form_chooses(queries, causal, padding):
    case = geometry("topk-blocks:3:64", causal)
    feed = random_inputs(case, 2, queries, 451, seed=7, padding=padding)
    graph = lowered(one_node_model(case, padding != "none"), plugin=True, past=queries < 451)
    node = next(node for node in graph.graph if node.op_type == "SparseAttention")
    assert node.attributes["pattern"].as_string() == "dense" and node.attributes["block_size"].as_int() == 64
    assert node.attributes["inputs"].as_string() == ("key_blocks" if padding == "none" else "key_mask,key_blocks")
    lists = node.inputs[-1]
    # ONNX Runtime refuses the graph if it is of another type.
    lists.dtype = ir.DataType.INT32
    graph.graph.outputs[:] = [lists]
    graph.graph.remove(node)
    assert np.array_equal(run(graph, feed), chosen_lists(case, feed))


def chosen_lists(case: AttentionGeometry, feed) -> np.ndarray:
    """What the kernels want, from the form's definition."""
    form, heads = case.form, (case.kv_heads, case.num_heads // case.kv_heads, case.head_dim)
    query = torch.from_numpy(feed["query"]).double().unflatten(-1, heads).permute(0, 2, 3, 1, 4)
    key = torch.from_numpy(feed["key"]).double().unflatten(-1, (heads[0], heads[2])).transpose(1, 2)
    mask = torch.from_numpy(feed["key_mask"])
    blocks = range((key.shape[2] - query.shape[3]) // form.block, -(-key.shape[2] // form.block))
    chosen = [chosen_blocks(form, query, key, mask, case.causal, block).numpy() for block in blocks]
    lists = np.full((2, case.kv_heads, len(chosen), form.count), -1, np.int32)
    for place in np.ndindex(lists.shape[:3]):
        numbers = np.flatnonzero(chosen[place[2]][place[:2]])
        lists[place][: len(numbers)] = numbers
    return lists


def test_blocks_of_a_size_that_kernels_do_not_take_are_written_out():
    model = one_node_model(geometry("topk-blocks:3:48", True), True)
    graph = ir.serde.deserialize_model(model)
    graph.graph[0].name = "model.layer"
    done = lower_attention(graph, True)
    assert done.written_out == ["model.layer"] and not done.plugins


def test_more_blocks_than_tensorrt_ranks_are_refused():
    with pytest.raises(PreconditionError, match="TensorRT chooses at most 3840 blocks"):
        lowered(one_node_model(geometry("topk-blocks:4000:64", True), True), plugin=True)


def test_linear_attention_becomes_a_plugin_node():
    model = one_node_model(geometry("linear:elu", True), True)
    graph = ir.serde.deserialize_model(model)
    graph.graph[0].name = "model.layer"
    to_half(graph, ir.DataType.FLOAT16)
    done = lower_attention(graph, True)
    node = next(node for node in graph.graph if node.op_type == "LinearAttention")
    assert [value.dtype for value in node.inputs[:3]] == [ir.DataType.FLOAT16] * 3, "which tensor cores take"
    assert done.plugins == {"model.layer": "LinearAttention"}
    assert node.attributes["inputs"].as_string() == "key_mask"


def test_marked_tokens_see_and_are_seen():
    case = geometry("global:#101|local:4", False)
    feed = random_inputs(case, 2, 30, 30, seed=4, padding="right")
    marks = np.zeros((2, 30), dtype=bool)
    marks[:, [0, 7]] = True
    found = run(lowered(one_node_model(case, True, {"marks": marks}), plugin=False), feed | {"marks": marks})
    np.testing.assert_allclose(found, expected(case, feed, {"marks": marks}), atol=2e-5)


def test_a_plugin_node_names_the_inputs_that_it_has():
    case = geometry("local:16", False)
    bias = np.zeros((4, 3), dtype=np.float32)
    graph = lowered(one_node_model(case, False, {"distance_bias": bias}), plugin=True)
    node = graph.graph[0]
    assert [value.name for value in node.inputs] == ["query", "key", "value", "distance_bias"]
    assert node.attributes["inputs"].as_string() == "distance_bias" and given_inputs(node) == {"distance_bias": 3}
    assert node.attributes["plugin_namespace"].as_string() == "effc" and not graph.functions and not node.overload


def test_biases_stay_fp32_beside_a_half_precision_query():
    case = geometry("local:16", False)
    model = one_node_model(case, True, {"distance_bias": np.zeros((4, 3), dtype=np.float32)})
    graph = ir.serde.deserialize_model(model)
    to_half(graph, ir.DataType.BFLOAT16)
    node = next(node for node in graph.graph if node.domain == "effc")
    types = [value.dtype for value in node.inputs if value is not None]
    halves = [ir.DataType.BFLOAT16] * 3
    assert types == [*halves, ir.DataType.BOOL, ir.DataType.FLOAT]


def test_dense_layers_are_left_to_tensorrt():
    graph = ir.serde.deserialize_model(one_node_model(geometry("dense", False), True))
    graph.graph[0].name = "encoder.layer.0"
    done = lower_attention(graph, True)
    assert done.plugins == {} and done.written_out == ["encoder.layer.0"]
    assert [node.name for node in graph.graph if node.op_type == "Attention"] == ["encoder.layer.0"]


def test_forms_that_depend_on_content_are_refused():
    graph = ir.serde.deserialize_model(one_node_model(geometry("topk:8", False), True))
    graph.graph[0].name = "encoder.layer.3"
    with pytest.raises(PreconditionError, match=r"'encoder.layer.3' computes 'topk:8'"):
        lower_attention(graph, True)
