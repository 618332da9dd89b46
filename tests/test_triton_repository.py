"""Model repositories: whole or not at all, versions beside each other, every file hashed, nothing from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tiny_artifacts import make_artifact, token_manifest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

pytest.importorskip("tritonclient.grpc")

from effc.compiler.artifact_files import read_manifest
from effc.compiler.manifest import BenchRecord, Timing
from effc.errors import EffcError, OutputError, UsageError
from effc.exporters.triton_config import Instances, parse_config
from effc.serving.backend.version import HASHES_NAME, check_version, inside
from effc.serving.deployment import plan_artifact
from effc.serving.external_data import check_external_data
from effc.serving.options import ServingOptions
from effc.serving.repository import check_repository, write_repository
from effc.serving.repository_version import use_version, use_version_text


def artifact(directory: Path, *, text: bool = False, times: dict[int, float] | None = None, work: int = 0) -> Path:
    """A tiny artifact, with a tokenizer and a measured speed where asked for."""
    make_artifact(directory, work=work)
    if text:
        tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "good": 1, "film": 2}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(directory / "tokenizer.json"))
    manifest = token_manifest(directory)
    if times:
        timing = {str(n): Timing(cpu_ms=t, wall_ms=t, cpu_ms_min=t, wall_ms_min=t, peak_rss_mib=1, runs=1)
                  for n, t in times.items()}  # fmt: skip
        ones = {str(n): 1.0 for n in times}
        manifest.benchmark = BenchRecord(
            batch=1, lengths=list(times), threads=1, dense=timing, compiled=timing, speedup=ones, speedup_wall=ones,
            memory_ratio=ones, dense_form="none",
        )  # fmt: skip
    (directory / "effc.json").write_text(manifest.model_dump_json())
    return directory


def config(repository: Path, model: str):
    return parse_config((repository / model / "config.pbtxt").read_text())


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_text_model_becomes_four_models(tmp_path):
    done = write_repository(artifact(tmp_path / "a", text=True), tmp_path / "r", ServingOptions(name="tiny"))
    assert done.models == ("tiny_model", "tiny_tokenizer", "tiny_output", "tiny") and done.version == 1
    assert check_repository(tmp_path / "r") == ["tiny"]
    ensemble = config(tmp_path / "r", "tiny")
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == list(
        ("tiny_tokenizer", "tiny_model", "tiny_output")
    )
    assert [entry.name for entry in ensemble.output] == ["embedding", "truncated"]
    inner = config(tmp_path / "r", "tiny_model")
    assert {entry.name: entry.optional for entry in inner.input} == {
        "input_ids": False,
        "attention_mask": True,
        "token_type_ids": True,
    }
    assert (tmp_path / "r/tiny_model/1/model.onnx").is_file()
    script = tmp_path / "r/launch.sh"
    assert os.access(script, os.X_OK) and "address=${ADDRESS:-127.0.0.1}" in script.read_text()
    assert not list(tmp_path.glob(".r-*"))


def test_a_model_without_a_tokenizer_is_one_model(tmp_path):
    done = write_repository(artifact(tmp_path / "a.effc"), tmp_path / "r")
    assert done.models == ("a",)
    with pytest.raises(UsageError, match="--pooling is for models that take text"):
        plan_artifact(tmp_path / "a.effc", ServingOptions(pooling="mean"))


def test_the_onnxruntime_backend_takes_all_inputs_and_no_code(tmp_path):
    options = ServingOptions(backend="onnxruntime", name="m", threads=2, instances=Instances("gpu", 1, (0,)))
    write_repository(artifact(tmp_path / "a"), tmp_path / "r", options)
    message = config(tmp_path / "r", "m")
    assert message.backend == "onnxruntime" and not any(entry.optional for entry in message.input)
    assert message.parameters["intra_op_thread_count"].string_value == "2"
    assert sorted(path.name for path in (tmp_path / "r/m/1").iterdir()) == [HASHES_NAME, "model.onnx"]


def test_versions_stand_beside_each_other_and_one_can_go_back(tmp_path):
    repository = tmp_path / "r"
    write_repository(artifact(tmp_path / "a"), repository, ServingOptions(name="m"))
    first = content(repository / "m" / "1")
    assert write_repository(artifact(tmp_path / "b", work=3), repository, ServingOptions(name="m")).version == 2
    assert content(repository / "m" / "1") == first
    assert config(repository, "m").version_policy.latest.num_versions == 2
    assert use_version(repository, "m", 1) == ["m"]
    assert list(config(repository, "m").version_policy.specific.versions) == [1]
    assert check_repository(repository) == ["m"]
    use_version_text(repository, "m", "newest")
    assert config(repository, "m").version_policy.latest.num_versions == 2
    for name, version, message in (("m", 3, "no version 3"), ("x", 1, "no model 'x'")):
        with pytest.raises(UsageError, match=message):
            use_version(repository, name, version)
    for name, text in ((None, "1"), ("m", "old")):
        with pytest.raises(UsageError):
            use_version_text(repository, name, text)


def test_a_version_that_takes_other_tensors_is_refused(tmp_path):
    write_repository(artifact(tmp_path / "a"), tmp_path / "r", ServingOptions(name="m"))
    before = content(tmp_path / "r")
    make_artifact(tmp_path / "b", mask=False)
    with pytest.raises(UsageError, match="other tensors"):
        write_repository(tmp_path / "b", tmp_path / "r", ServingOptions(name="m"))
    assert content(tmp_path / "r") == before


@pytest.mark.parametrize("fails_at", ["copy", "rename"])
def test_a_failure_leaves_the_repository_as_it_was(tmp_path, monkeypatch, fails_at):
    repository = tmp_path / "r"
    options = ServingOptions(name="m")
    write_repository(artifact(tmp_path / "a", text=True), repository, options)
    before = content(repository)
    calls = 0

    def failing(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments, **named)

    if fails_at == "copy":
        real = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", failing)
    else:
        real = Path.rename
        monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="No space left"):
        write_repository(tmp_path / "a", repository, options)
    assert calls == 3
    monkeypatch.undo()
    assert content(repository) == before
    assert not list(tmp_path.glob(".r-*"))
    assert write_repository(tmp_path / "a", repository, options).version == 2


@pytest.mark.parametrize("file", ["m/config.pbtxt", "m/1/model.onnx", "m/1/model.py", "m/1/lib/effc/errors.py"])
@pytest.mark.parametrize("change", ["edited", "gone"])
def test_a_changed_file_is_found(tmp_path, file, change):
    write_repository(artifact(tmp_path / "a"), tmp_path / "r", ServingOptions(name="m"))
    path = tmp_path / "r" / file
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(OutputError, match=path.name):
        check_repository(tmp_path / "r")


def test_a_damaged_artifact_is_not_served(tmp_path):
    directory = artifact(tmp_path / "a", text=True)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"tokenizer\.json"):
        write_repository(directory, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_foreign_directories_are_left_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/file").touch()
    with pytest.raises(OutputError, match="no repository that effc wrote"):
        write_repository(artifact(tmp_path / "a"), tmp_path / "r")
    write_repository(tmp_path / "a", tmp_path / "s", ServingOptions(name="m"))
    (tmp_path / "s/n").mkdir()
    with pytest.raises(UsageError, match="has a model 'n' already"):
        write_repository(tmp_path / "a", tmp_path / "s", ServingOptions(name="n"))


@pytest.mark.parametrize("name", ["../m", "a/b", "", ".hidden", "a b", "m\n", "x" * 101])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(UsageError, match="cannot name a model"):
        ServingOptions(name=name)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../secret", "link/secret"])
def test_paths_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/link").symlink_to("/")
    with pytest.raises(OutputError, match="leads out of"):
        inside(tmp_path / "m", name)
    (tmp_path / "m" / HASHES_NAME).write_text(json.dumps({name: "0"}))
    with pytest.raises(OutputError, match="leads out of"):
        check_version(tmp_path / "m")


@pytest.mark.parametrize(
    ("location", "message"), [("../secret", "leads out"), ("/etc/passwd", "leads out"), ("no", "not there")]
)
def test_weights_outside_of_the_artifact_are_refused(tmp_path, location, message):
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], b"\0" * 16, raw=True)
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    graph = helper.make_graph([], "g", [], [], [tensor])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(OutputError, match=message):
        check_external_data(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(OutputError, match="no ONNX file"):
        check_external_data(tmp_path / "model.onnx")


def test_variants_get_a_router_with_their_measured_times(tmp_path):
    sparse = artifact(tmp_path / "sparse", text=True, times={16: 2.0, 64: 4.0})
    dense = artifact(tmp_path / "dense", text=True, times={16: 1.0, 64: 8.0})
    options = ServingOptions(name="m", variants={"dense": dense})
    done = write_repository(sparse, tmp_path / "r", options)
    assert done.models == ("m_model_compiled", "m_model_dense", "m_model", "m_tokenizer", "m_output", "m")
    settings = json.loads((tmp_path / "r/m_model/1/effc_model.json").read_text())["router"]
    assert settings["times"] == {"compiled": {"16": 2.0, "64": 4.0}, "dense": {"16": 1.0, "64": 8.0}}
    assert settings["limits"] == {"compiled": 64, "dense": 64}
    assert [entry.name for entry in config(tmp_path / "r", "m").output] == ["embedding", "truncated", "variant"]


def judged(path: Path, drop: float, data: str = "texts.jsonl") -> Path:
    """The artifact, with a measured quality."""
    values = json.loads((path / "effc.json").read_text())
    values["verification"] = {
        "data": data,
        "samples": 4,
        "outputs": {},
        "quality_drop": drop,
        "quality_metric": "1 - mean cosine",
    }
    (path / "effc.json").write_text(json.dumps(values))
    return path


def test_a_latency_budget_comes_with_the_variants_quality(tmp_path):
    sparse = artifact(tmp_path / "sparse", times={16: 2.0, 64: 4.0})
    dense = artifact(tmp_path / "dense", times={16: 1.0, 64: 8.0})
    options = ServingOptions(
        name="m", variants={"dense": dense}, latency_budget_ms=5, instances=Instances.parse("gpu:0,1")
    )
    with pytest.raises(UsageError, match="(?s)quality of the variant 'compiled'.*effc verify"):
        plan_artifact(sparse, options)
    judged(sparse, 0.02), judged(dense, 0.0, "other.jsonl")
    with pytest.raises(UsageError, match="different texts: compiled on texts.jsonl, dense on other.jsonl"):
        plan_artifact(sparse, options)
    judged(dense, 0.0)
    write_repository(sparse, tmp_path / "r", options)
    settings = json.loads((tmp_path / "r/m/1/effc_model.json").read_text())["router"]
    assert settings["budget"] == {"milliseconds": 5, "drops": {"compiled": 0.02, "dense": 0.0}, "parallel": 2}


def test_variants_must_fit_and_be_measured(tmp_path):
    main = artifact(tmp_path / "a", times={16: 1.0})
    with pytest.raises(UsageError, match="was not measured"):
        plan_artifact(main, ServingOptions(variants={"other": artifact(tmp_path / "b")}))
    make_artifact(tmp_path / "c", mask=False)
    with pytest.raises(UsageError, match="does not take and give"):
        plan_artifact(main, ServingOptions(variants={"other": tmp_path / "c"}))


@pytest.mark.parametrize(
    "values",
    [
        {"max_batch": 0},
        {"threads": 0},
        {"keep": 0},
        {"batch_delay_us": -1},
        {"backend": "torch"},
        {"pooling": "sum"},
        {"latency_budget_ms": 5.0},
        {"latency_budget_ms": 0.0, "variants": {"a": Path("b")}},
    ],
)
def test_options_out_of_range_are_refused(values):
    with pytest.raises(UsageError):
        ServingOptions(**values)


def test_text_longer_than_the_model_is_not_promised(tmp_path):
    directory = artifact(tmp_path / "a", text=True)
    assert read_manifest(directory).source.max_length == 64
    with pytest.raises(EffcError, match="at most 64 tokens, not 65"):
        plan_artifact(directory, ServingOptions(max_length=65))
