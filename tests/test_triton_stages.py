"""Graphs in stages: parts that compute what the whole does, of about equal weight, tied by an ensemble."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_checkpoints
from onnx import TensorProto, helper
from test_triton_repository import artifact

pytest.importorskip("tritonclient.grpc")

import effc
from effc.cli import main
from effc.compiler.artifact_files import read_manifest
from effc.errors import UsageError
from effc.exporters.triton_config import Instances, parse_config
from effc.serving.deployment import plan_artifact
from effc.serving.graph_stages import Stage, split_graph
from effc.serving.options import ServingOptions, parse_stages
from effc.serving.repository import check_repository, write_repository

LAYERS = 4
COMPILED = {
    "int8 encoder": ("BertModel", {"quantization": "int8"}, {"num_hidden_layers": LAYERS}),
    "rotary decoder": ("LlamaForCausalLM", {"generation": {"enabled": False}}, {"num_hidden_layers": LAYERS}),
    "encoder with distance bias": ("T5Model", {}, {"num_layers": LAYERS}),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("stages")

    @cache
    def compile_it(name: str) -> Path:
        kind, options, changes = COMPILED[name]
        checkpoint = tiny_checkpoints.save_lively(folder / f"{name}-model", kind, **changes)
        output = folder / name
        return effc.compile(checkpoint, attention="local:8", output=output, bench={"enabled": False}, **options).path

    return compile_it


def split(path: Path, count: int) -> list[Stage]:
    return split_graph(path / "model.onnx", {layer.layer for layer in read_manifest(path).attention}, count)


def inputs(path: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask = np.ones((2, 20), np.int64)
    mask[1, 13:] = 0
    given = {"input_ids": random.integers(3, 30, (2, 20)), "attention_mask": mask}
    if any(record.name == "token_type_ids" for record in read_manifest(path).inputs):
        given["token_type_ids"] = random.integers(0, 2, (2, 20))
    return given


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", [
    "int8 encoder", pytest.param("rotary decoder", marks=pytest.mark.slow),
    pytest.param("encoder with distance bias", marks=pytest.mark.slow),
])  # fmt: skip
def test_stages_one_after_the_other_compute_what_the_whole_does(compiled, tmp_path, name, count):
    path = compiled(name)
    expected, known = effc.load(path)(**inputs(path)), dict(inputs(path))
    stages = split(path, count)
    assert len(stages) == count
    given = {record.name for record in read_manifest(path).inputs}
    for number, stage in enumerate(stages):
        (tmp_path / str(number)).mkdir()
        stage.save(tmp_path / str(number) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(tmp_path / str(number) / "model.onnx", options, ["CPUExecutionProvider"])
        assert [record.name for record in stage.inputs] == [entry.name for entry in session.get_inputs()]
        # What passes between stages has the batch first, and is little: hidden states of one width.
        passed = [record for record in stage.inputs if record.name not in given]
        assert len(passed) == (number > 0) and all(record.shape[:2] == ["batch", "sequence"] for record in passed)
        values = session.run([r.name for r in stage.outputs], {r.name: known[r.name] for r in stage.inputs})
        known |= {record.name: value for record, value in zip(stage.outputs, values, strict=True)}
    for output in expected:
        np.testing.assert_allclose(known[output], expected[output], atol=1e-4)


def test_stages_are_cut_between_layers_into_about_equal_weights(compiled, tmp_path):
    path = compiled("int8 encoder")
    whole = split(path, 1)[0].weights
    for count, layers in ((2, [2, 2]), (4, [1, 1, 1, 1])):
        stages = split(path, count)
        attention = [sum(node.domain == "effc" for node in stage.model.graph) for stage in stages]
        assert attention == layers
        # Each weight is in one stage; small constants may be in several.
        assert whole <= sum(stage.weights for stage in stages) < whole * 1.05
        stages[-1].save(tmp_path / f"{count}.onnx")
        assert (tmp_path / f"{count}.onnx.data").stat().st_size < stages[-1].weights * 1.05
        assert all(len(stage.model.functions) == 1 for stage in stages)


def test_heavy_layers_get_a_stage_of_their_own(tmp_path):
    """Layers of 1, 1, 1 and 9 parts: one of 9 parts, and the others among two."""
    stages = split_products(tmp_path / "m.onnx", [1, 1, 1, 9], 3)
    assert sorted(round(stage.weights / _PART) for stage in stages) == [1, 2, 9]
    # The cheapest place to cut is not in the middle of a layer, where the hidden state is wide.
    assert [record.shape for record in stages[1].inputs] == [["batch", "sequence", 4]]


def test_a_tied_weight_counts_in_each_stage_that_uses_it(tmp_path):
    """The last layer has the weights of the first, so the middle goes to both alike."""
    stages = split_products(tmp_path / "m.onnx", [4, 1, 1, 1, 4], 2, tied=True)
    assert sorted(round(stage.weights / _PART) for stage in stages) == [5, 6]


_PART = 2 * 4 * 4000 * 4
"""Bytes of a layer of one part: two matrices of 4 x 4000 floats."""


def split_products(path: Path, parts: list[int], count: int, tied: bool = False) -> list[Stage]:
    """The stages of a graph whose layers are two products each, out to a width and back."""
    nodes, weights = [], []
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        taken, given = f"out{number - 1}" if number else "x", "y" if last else f"out{number}"
        own = 0 if tied and last else number
        if own == number:
            weight = np.full((4, 4000 * part), 0.5, np.float32)
            weights += [onnx.numpy_helper.from_array(weight, f"w{own}")]
            weights += [onnx.numpy_helper.from_array(weight.T, f"v{own}")]
        nodes.append(helper.make_node("MatMul", [taken, f"w{own}"], [f"wide{number}"], name=f"layer.{number}"))
        nodes.append(helper.make_node("MatMul", [f"wide{number}", f"v{own}"], [given]))
    onnx.save(graph(nodes, weights), path)
    return split_graph(path, {f"layer.{number}" for number in range(len(parts))}, count)


def graph(nodes, weights) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 4]) for name in "xy"]
    made = helper.make_graph(nodes, "g", value[:1], value[1:], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def test_what_has_no_batch_does_not_pass(tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((4, 1 << 17), np.float32), "w")
    back = onnx.numpy_helper.from_array(np.ones((1 << 17, 4), np.float32), "v")
    axis = onnx.numpy_helper.from_array(np.array([0]), "axis")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wide"], name="layer.0"),
        helper.make_node("MatMul", ["wide", "v"], ["hidden"]),
        helper.make_node("ReduceSum", ["wide", "axis"], ["over_rows"], keepdims=0),
        helper.make_node("MatMul", ["over_rows", "v"], ["all_rows"]),
        helper.make_node("Add", ["hidden", "all_rows"], ["y"], name="layer.1"),
    ]
    onnx.save(graph(nodes, [weight, back, axis]), tmp_path / "m.onnx")
    stages = split_graph(tmp_path / "m.onnx", {"layer.0", "layer.1"}, 2)
    # The sum over rows is computed again, behind the cut.
    assert [record.name for record in stages[1].inputs] == ["wide"]
    nodes[0].name, nodes[2].name = "", "layer.0"
    onnx.save(graph(nodes, [weight, back, axis]), tmp_path / "n.onnx")
    with pytest.raises(UsageError, match="boundaries between layers can be cut"):
        split_graph(tmp_path / "n.onnx", {"layer.0", "layer.1"}, 2)


def test_an_ensemble_ties_stages_with_an_instance_group_each(compiled, tmp_path):
    stages, instances = parse_stages("gpu:1,3", Instances("auto"))
    options = ServingOptions(name="m", stages=stages, instances=instances)
    done = write_repository(compiled("int8 encoder"), tmp_path / "r", options)
    assert done.models == ("m_model_stage_0", "m_model_stage_1", "m_model", "m_tokenizer", "m_output", "m")
    assert check_repository(tmp_path / "r") == ["m"]
    ensemble = config(tmp_path / "r", "m_model")
    first, second = ensemble.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == done.models[:2]
    [passed] = first.output_map.values()
    assert passed in second.input_map.values() and "attention_mask" in second.input_map
    assert {entry.name for entry in ensemble.output} == {"last_hidden_state", "pooler_output"}
    groups = [config(tmp_path / "r", name).instance_group[0] for name in done.models[:2]]
    assert [list(group.gpus) for group in groups] == [[1], [3]]
    assert not any(e.optional or e.allow_ragged_batch for e in config(tmp_path / "r", done.models[0]).input)
    settings = json.loads((tmp_path / "r" / done.models[0] / "1/effc_model.json").read_text())
    assert settings["forward"]["inputs"][0]["maximum"] == 31


def config(repository: Path, model: str):
    return parse_config((repository / model / "config.pbtxt").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 5}, "4 attention layers, which cannot be split into 5 stages"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"stages": 2, "instances": Instances("gpu", 1, (0,))}, "2 stages and 1 GPUs"),
        ({"stages": 2, "variants": {"a": Path("b")}}, "--stages and --variant do not go together"),
    ],
)
def test_stages_that_cannot_be_are_refused(compiled, options, message):
    with pytest.raises(UsageError, match=message):
        plan_artifact(compiled("int8 encoder"), ServingOptions(name="m", **options))


def test_stages_are_read_as_a_user_writes_them(tmp_path, capsys):
    assert parse_stages("3", Instances("cpu", 2)) == (3, Instances("cpu", 2))
    assert parse_stages(None, Instances("auto")) == (None, Instances("auto"))
    for text, instances in (("x", "auto"), ("cpu:2", "auto"), ("gpu:0,1", "gpu:0"), ("gpu:0,0", "auto"), ("²", "auto")):
        with pytest.raises(UsageError):
            parse_stages(text, Instances.parse(instances))
    one = artifact(tmp_path / "a")
    with pytest.raises(SystemExit) as ended:
        main(["triton", str(one), "--repository", str(tmp_path / "r"), "--stages", "gpu:0,1"])
    assert ended.value.code == 2 and "1 attention layer, which cannot be split into 2" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
