"""Triton configurations: what is written is what Triton's own protobuf reads."""

from __future__ import annotations

import pytest

pytest.importorskip("tritonclient.grpc")

from effc.errors import UsageError
from effc.exporters.triton_config import (
    TEXT,
    EnsembleConfig,
    EnsembleStep,
    Instances,
    ModelConfig,
    Tensor,
    WarmUp,
    config_text,
    parse_config,
)


def test_a_model_is_read_back_as_it_was_meant():
    config = ModelConfig(
        name="bert",
        backend="python",
        inputs=[Tensor("input_ids", "int64", (-1,), ragged=True), Tensor("mask", "bool", (-1,), optional=True)],
        outputs=[Tensor("hidden", "float32", (-1, 384)), Tensor("label", TEXT, (1,))],
        max_batch=8,
        instances=Instances("cpu", 2),
        batch_delay_us=300,
        response_cache=True,
        warm_up=[WarmUp("short", {"input_ids": ("int64", (8,))})],
        parameters={"key": "value"},
    )
    message = parse_config(config_text(config, keep=3))
    assert (message.name, message.backend, message.max_batch_size) == ("bert", "python", 8)
    assert [(entry.name, list(entry.dims), entry.optional, entry.allow_ragged_batch) for entry in message.input] == [
        ("input_ids", [-1], False, True),
        ("mask", [-1], True, False),
    ]
    types = [type(message.output[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[t.data_type].name
             for t in (*message.input, *message.output)]  # fmt: skip
    assert types == ["TYPE_INT64", "TYPE_BOOL", "TYPE_FP32", "TYPE_STRING"]
    [group] = message.instance_group
    assert (group.count, group.kind) == (2, group.KIND_CPU)
    assert message.dynamic_batching.max_queue_delay_microseconds == 300
    assert message.response_cache.enable
    assert message.version_policy.latest.num_versions == 3
    assert list(message.model_warmup[0].inputs["input_ids"].dims) == [8]
    assert message.parameters["key"].string_value == "value"


def test_no_batching_and_no_decoupling_unless_asked_for():
    message = parse_config(config_text(ModelConfig("m", "onnxruntime", [], [])))
    assert not message.HasField("dynamic_batching")
    assert not message.model_transaction_policy.decoupled


def test_an_engine_per_compute_capability_with_profiles_and_cuda_graphs():
    config = ModelConfig(
        name="engine",
        backend="tensorrt",
        inputs=[Tensor("input_ids", "int64", (-1,))],
        outputs=[Tensor("hidden", "float16", (-1, 8))],
        max_batch=4,
        instances=Instances.parse("gpu:0,1"),
        profiles=[0, 1],
        engines={"8.9": "sm89.plan", "9.0": "sm90.plan"},
        cuda_graphs=[(1, {"input_ids": [128]})],
    )
    message = parse_config(config_text(config, active=[2]))
    assert dict(message.cc_model_filenames) == {"8.9": "sm89.plan", "9.0": "sm90.plan"}
    [group] = message.instance_group
    assert (group.kind, list(group.gpus), list(group.profile)) == (group.KIND_GPU, [0, 1], ["0", "1"])
    [spec] = message.optimization.cuda.graph_spec
    assert message.optimization.cuda.graphs and (spec.batch_size, list(spec.input["input_ids"].dim)) == (1, [128])
    assert list(message.version_policy.specific.versions) == [2]


def test_an_ensemble_hands_tensors_on():
    steps = [EnsembleStep("tokens", {"text": "text"}, {"input_ids": "ids"})]
    text = config_text(EnsembleConfig("e", [Tensor("text", TEXT, (1,))], [Tensor("ids", "int64", (-1,))], steps, 8))
    message = parse_config(text)
    assert message.platform == "ensemble"
    [step] = message.ensemble_scheduling.step
    assert (step.model_name, dict(step.input_map), dict(step.output_map)) == (
        "tokens",
        {"text": "text"},
        {"input_ids": "ids"},
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", Instances("cpu", 1)),
        ("cpu:3", Instances("cpu", 3)),
        ("gpu", Instances("gpu", 1)),
        ("gpu:0,2", Instances("gpu", 1, (0, 2))),
    ],
)
def test_instances_are_read(text, expected):
    assert Instances.parse(text) == expected


@pytest.mark.parametrize("text", ["", "tpu", "cpu:0", "cpu:1,2", "gpu:-1", "gpu:x", "gpu:1,1", "cpu:-2"])
def test_other_instances_are_refused(text):
    with pytest.raises(UsageError, match="no place to run on"):
        Instances.parse(text)


def test_fields_that_triton_does_not_know_are_refused():
    with pytest.raises(UsageError, match="no Triton model configuration"):
        parse_config('name: "m" max_batch: 8')


def test_a_type_that_triton_has_not_is_refused():
    with pytest.raises(UsageError, match="no tensors of type complex64"):
        config_text(ModelConfig("m", "python", [Tensor("x", "complex64", (1,))], []))
