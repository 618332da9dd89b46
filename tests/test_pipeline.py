"""The spine end to end on tiny real checkpoints: compile, load, plain ONNX Runtime, cache, failure, requirements."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny_checkpoints
import torch
from transformers import AutoModel, AutoTokenizer

import effc
from effc.compiler import artifact as artifact_module
from effc.compiler import cache as cache_module
from effc.errors import DataError, OutputError, PassFailedError, PreconditionError, RequirementError, UsageError

TEXTS = ["the film was very good", "a dull plot and bad acting but great story i loved it"]
NO_BENCH = {"enabled": False}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny_checkpoints.save(folder, "BertModel", with_tokenizer=True, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def compiled(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "artifact"
    return effc.compile(
        checkpoint,
        attention="local:8",
        quantization="int8",
        output=output,
        bench={"lengths": [16, 48], "rounds": 1},
    )


def test_artifact_holds_everything(compiled):
    names = {path.name for path in compiled.path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "effc.json", "report.html", "config.json", "tokenizer.json"} <= names
    values = json.loads((compiled.path / "effc.json").read_text())
    assert [record["name"] for record in values["passes"]] == [
        "rewrite-attention",
        "export",
        "fuse-onnxruntime",
        "quantize-int8",
    ]
    assert all(layer["rewritten"] and layer["pattern"] == "local:8" for layer in values["attention"])
    assert values["benchmark"]["speedup"].keys() == {"16", "48"}
    assert values["verification"]["outputs"]["last_hidden_state"]["cosine"] > 0.5
    assert not [name for name in compiled.path.parent.iterdir() if name != compiled.path]


def test_result_is_close_to_the_source_where_the_window_covers_all(compiled, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(compiled.path)
    short = ["good film", "bad"]
    result = effc.load(compiled.path)(**tokenizer(short, return_tensors="np", padding=True))
    with torch.no_grad():
        batch = tokenizer(short, return_tensors="pt", padding=True)
        reference = AutoModel.from_pretrained(checkpoint)(**batch).last_hidden_state
    real = batch["attention_mask"].bool().numpy()
    difference = (result.last_hidden_state - reference.numpy())[real]
    assert np.linalg.norm(difference) / np.linalg.norm(reference.numpy()[real]) < 0.1


def test_runs_in_plain_onnxruntime_without_effc(compiled):
    code = (
        "import sys, numpy, onnxruntime\n"
        "sys.modules['effc'] = None\n"
        f"session = onnxruntime.InferenceSession({str(compiled.path / 'model.onnx')!r})\n"
        "ids = numpy.arange(5, 25, dtype=numpy.int64)[None]\n"
        "feed = {i.name: numpy.zeros_like(ids) for i in session.get_inputs()}\n"
        "feed |= {'input_ids': ids, 'attention_mask': numpy.ones_like(ids)}\n"
        "assert numpy.isfinite(session.run(None, feed)[0]).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_second_compile_reuses_the_export_and_two_models_never_share_one(compiled, checkpoint, tmp_path):
    again = effc.compile(checkpoint, attention="local:8", output=tmp_path / "fp32", bench=NO_BENCH)
    export = next(record for record in again.manifest.passes if record.name == "export")
    assert export.cached
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    changed = effc.compile(other, attention="local:8", output=tmp_path / "changed", bench=NO_BENCH)
    assert not next(record for record in changed.manifest.passes if record.name == "export").cached
    assert changed.manifest.export_key != again.manifest.export_key


def test_fp32_graph_equals_torch_with_the_same_pattern(checkpoint, tmp_path):
    done = effc.compile(checkpoint, attention="local:8", output=tmp_path / "fp32", bench=NO_BENCH)
    by_name = {record.name: record for record in done.manifest.passes}
    torch_error = by_name["rewrite-attention"].probe["last_hidden_state"].relative_error
    graph_error = by_name["fuse-onnxruntime"].probe["last_hidden_state"].relative_error
    assert torch_error > 1e-3, "a window of 8 must change something"
    assert graph_error == pytest.approx(torch_error, rel=1e-3)


def test_static_quantization_from_calibration_data(checkpoint, tmp_path):
    data = tmp_path / "calibration.txt"
    data.write_text("\n".join(TEXTS * 4))
    quantization = {"mode": "int8", "calibration": {"data": str(data), "samples": 8}}
    done = effc.compile(
        checkpoint, attention="local:8", quantization=quantization, output=tmp_path / "out", bench=NO_BENCH
    )
    assert done.manifest.passes[-1].metrics["form"] == "static"
    quantization["calibration"]["data"] = str(tmp_path / "none.txt")
    with pytest.raises(DataError):
        effc.compile(checkpoint, quantization=quantization, output=tmp_path / "x", bench=NO_BENCH)


def test_causal_language_model(tmp_path):
    source = tiny_checkpoints.save(tmp_path / "llama", "LlamaForCausalLM")
    done = effc.compile(source, attention="local:6", output=tmp_path / "out", bench=NO_BENCH)
    assert done.manifest.source.task == "causal-lm"
    assert all(layer.causal and layer.kv_heads == 1 for layer in done.manifest.attention)
    ids = np.random.default_rng(0).integers(5, 25, (2, 40))
    logits = effc.load(done.path)(input_ids=ids).logits
    shorter = effc.load(done.path)(input_ids=ids[:, :30]).logits
    np.testing.assert_allclose(logits[:, :30], shorter, atol=1e-4)


def test_unsupported_architectures_are_refused_by_name(tmp_path):
    for kind, word in (("MPNetModel", "MPNetModel"), ("BloomModel", "BloomModel")):
        source = tiny_checkpoints.save(tmp_path / kind, kind)
        with pytest.raises(PreconditionError, match=word):
            effc.compile(source, attention="local:8", output=tmp_path / "out", bench=NO_BENCH)
        assert not (tmp_path / "out").exists()


def test_output_must_be_empty_and_a_failure_leaves_it_unharmed(compiled, checkpoint, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="--overwrite"):
        effc.compile(checkpoint, output=compiled.path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not an artifact"):
        effc.compile(checkpoint, output=foreign, overwrite=True)
    before = (compiled.path / "effc.json").read_bytes()

    def broken(*_):
        raise RuntimeError("a planted fault")

    monkeypatch.setattr("effc.passes.quantize_int8.QuantizeInt8.run", broken)
    with pytest.raises(PassFailedError, match=r"quantize-int8.* failed after rewrite-attention, export, fuse"):
        effc.compile(
            checkpoint, attention="local:8", quantization="int8", output=compiled.path, overwrite=True, bench=NO_BENCH
        )
    assert (compiled.path / "effc.json").read_bytes() == before
    assert not [path for path in compiled.path.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_and_interrupt_leave_nothing(checkpoint, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("effc.compiler.pipeline.write_manifest", fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="disk is full" if isinstance(error, OSError) else None):
        effc.compile(checkpoint, attention="local:8", output=tmp_path / "out", bench=NO_BENCH)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_an_artifact(checkpoint, tmp_path):
    for pattern in ("local:8", "local:4"):
        done = effc.compile(checkpoint, attention=pattern, output=tmp_path / "out", overwrite=True, bench=NO_BENCH)
    assert {layer.pattern for layer in done.manifest.attention} == {"local:4"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_requirements(checkpoint, tmp_path):
    require = {"max_quality_drop": 0.0}
    done = effc.compile(checkpoint, attention="local:2", output=tmp_path / "out", bench=NO_BENCH, require=require)
    assert any("quality drop" in sentence for sentence in done.unmet)
    with pytest.raises(RequirementError):
        effc.compile(
            checkpoint,
            attention="local:2",
            output=tmp_path / "out2",
            bench=NO_BENCH,
            require=require,
            check=True,
        )
    assert (tmp_path / "out2" / "effc.json").exists()


def test_exclusions(checkpoint, tmp_path):
    attention = {"pattern": "local:8", "exclude": ["encoder.layer.0.*"]}
    done = effc.compile(checkpoint, attention=attention, output=tmp_path / "out", bench=NO_BENCH)
    assert [layer.pattern for layer in done.manifest.attention] == ["dense", "local:8"]
    assert done.manifest.attention[0].reason == "excluded by the recipe"
    attention["exclude"] = ["encoder.layr.0.*"]
    with pytest.raises(PreconditionError, match="matches no attention module"):
        effc.compile(checkpoint, attention=attention, output=tmp_path / "x", bench=NO_BENCH)


def test_dense_twin_equals_the_source(compiled, checkpoint):
    from effc.compiler.twin import dense_twin

    session = onnxruntime.InferenceSession(dense_twin(compiled.manifest))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint)
    for texts in (TEXTS, TEXTS[:1]):
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            reference = model(**batch).last_hidden_state.numpy()
        result = session.run(["last_hidden_state"], {i.name: batch[i.name].numpy() for i in session.get_inputs()})[0]
        real = batch["attention_mask"].bool().numpy()
        np.testing.assert_allclose(result[real], reference[real], atol=1e-4)


def test_twin_is_made_again_when_the_cache_is_gone(compiled, tmp_path, monkeypatch):
    from effc.compiler.twin import dense_twin

    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "fresh"))
    path = dense_twin(compiled.manifest)
    assert path.is_file()
    assert path.is_relative_to(tmp_path / "fresh")


def test_cache_prunes_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path))
    monkeypatch.setattr(cache_module, "_LIMIT_BYTES", 25)

    def make(directory: Path) -> None:
        (directory / "file").write_bytes(b"x" * 10)

    for age, key in enumerate(["c", "b", "a"]):
        entry, hit = cache_module.cached("kind", key, make)
        assert not hit
        if entry.exists():
            os.utime(entry, (1000 + age, 1000 + age))
    assert cache_module.cached("kind", "a", make)[1]
    assert not (tmp_path / "kind" / "c").exists()


def test_default_output_is_named_after_the_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = effc.compile(checkpoint, attention="local:8", bench=NO_BENCH)
    assert done.path == Path(f"{checkpoint.name}.effc")
    assert (tmp_path / done.path / "effc.json").is_file()


@pytest.mark.parametrize("error", [28, 30])
def test_unusable_cache_names_the_remedy(tmp_path, monkeypatch, error):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path))

    def make(_):
        raise OSError(error, os.strerror(error))

    with pytest.raises(OutputError, match="EFFC_CACHE"):
        cache_module.cached("kind", "a", make)
    assert list((tmp_path / "kind").iterdir()) == []


def test_recipe_values_and_unknown_sections(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'bench'"):
        effc.compile(checkpoint, output=tmp_path / "x", bensh={"enabled": False})
    assert artifact_module.REPORT_NAME == "report.html"
