"""Compiles that prune: what is recorded, compared and left untouched, and checkpoints that load again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import tiny_checkpoints
import torch
from click.testing import CliRunner
from transformers import AutoModelForMaskedLM, AutoTokenizer

import effc
from effc.cli import main
from effc.compiler.compress import Compression, Probe, run_torch
from effc.compiler.exported import export_key
from effc.compiler.inputs import ragged_inputs
from effc.compiler.pruned_checkpoint import save_checkpoint
from effc.compiler.recipe import ModelSection, build_recipe
from effc.compiler.report_command import command_line
from effc.compiler.source import load, locate
from effc.compiler.twin import dense_twin
from effc.errors import DataError, PreconditionError, SourceModelError
from effc.passes.prune_masks import masks_of
from effc.passes.prune_two_four import is_two_four

TEXTS = ["the film was very good", "a dull plot and bad acting but great story i loved it", "not a good plot"] * 3
# All tokens of the texts but those of the last.
CORPUS = "\n".join(TEXTS[:2])
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    (folder / "corpus.txt").write_text(CORPUS)
    return SimpleNamespace(texts=str(folder / "texts.txt"), corpus=str(folder / "corpus.txt"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoints.save_lively(tmp_path_factory.mktemp("model"), "BertForSequenceClassification", **SIZES)


@pytest.fixture(scope="module")
def compiled(checkpoint, files, tmp_path_factory):
    return effc.compile(
        checkpoint,
        prune=["ffn:0.25", f"vocab:{files.corpus}", "heads:0.5"],
        low_rank=0.9,
        quantization={"calibration": {"data": files.texts}},
        checkpoint={"enabled": True},
        verify={"data": files.texts},
        bench={"lengths": [16], "rounds": 1},
        output=tmp_path_factory.mktemp("out") / "artifact",
    )


def test_the_steps_run_in_their_order_and_each_is_measured(compiled):
    records = {record.name: record for record in compiled.manifest.passes}
    assert list(records)[:4] == ["prune-vocab", "prune-heads", "prune-ffn", "low-rank"]
    errors = [records[name].probe["logits"].relative_error for name in list(records)[:4]]
    assert errors[0] < 1e-5 and min(errors[1:]) > 1e-3
    assert records["fuse-onnxruntime"].probe["logits"].relative_error == pytest.approx(errors[-1], rel=1e-2)
    assert records["prune-heads"].metrics["heads"] == {
        f"bert.encoder.layer.{layer}.attention.self": "2 of 4" for layer in (0, 1)
    }
    assert records["prune-ffn"].metrics["calibration"].endswith("texts.txt")


def test_the_record_and_the_report_say_what_is_left(compiled):
    done, source = compiled.manifest.compression, compiled.manifest.source
    assert done.parameters < source.parameters and done.nonzero == done.parameters
    assert done.vocabulary.tokens < done.vocabulary.source_tokens == 32
    ids = json.loads((compiled.path / done.vocabulary.file).read_text())["source_ids"]
    assert len(ids) == done.vocabulary.tokens == compiled.manifest.inputs[0].maximum + 1
    assert done.vocabulary.file in compiled.manifest.files
    report = (compiled.path / "report.html").read_text()
    assert f"{done.parameters / source.parameters:.1%}" in report and "effc.load_checkpoint" in report
    shown = CliRunner().invoke(main, ["inspect", str(compiled.path)])
    assert "Weights: " in shown.output and "effc.load_checkpoint" in shown.output


def test_the_dense_twin_is_the_untouched_model(compiled, checkpoint):
    twin = ir.load(str(dense_twin(compiled.manifest)))
    shapes = [tuple(value.shape) for value in twin.graph.initializers.values() if value.shape is not None]
    assert (32, 64) in shapes and {(64, 128), (128, 64)} & set(shapes)
    own = ir.load(str(compiled.path / "model.onnx"))
    mine = [tuple(value.shape) for value in own.graph.initializers.values() if value.shape is not None]
    assert not {(64, 128), (128, 64)} & set(mine)
    untouched = effc.compile(checkpoint, output=compiled.path.parent / "untouched", bench={"enabled": False})
    assert untouched.manifest.export_key == compiled.manifest.twin_key != compiled.manifest.export_key


def test_texts_with_lost_tokens_are_verified_with_the_artifacts_own_tokenizer(compiled):
    verification = compiled.manifest.verification
    assert verification.samples == len(TEXTS)
    assert verification.details["texts_cut_otherwise"] == 3
    assert verification.outputs["logits"].relative_error > 1e-3
    again = effc.verify(compiled.path, source=compiled.manifest.source.path)
    assert again.quality_drop == verification.quality_drop


def test_the_checkpoint_is_the_model_that_runs(compiled):
    tokenizer = AutoTokenizer.from_pretrained(compiled.path / "checkpoint")
    batch = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    model = effc.load_checkpoint(compiled.path)
    assert not model.training and compiled.manifest.checkpoint.plain is False
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    found = effc.load(compiled.path)(**{name: value.numpy() for name, value in batch.items()}).logits
    assert np.allclose(found, expected, atol=1e-4)


def test_the_command_in_the_report_gives_the_recipe(compiled):
    command = command_line(compiled.manifest.recipe, "model")
    for flag in ("--prune=heads:0.5", "--prune=ffn:0.25", "--low-rank=0.9", "--checkpoint"):
        assert flag in command


def test_zeros_reach_the_graph_along_k_and_survive_int8(checkpoint, files, tmp_path):
    flags = ["--prune=2:4", "--quant=int8", "--calibration", files.texts, "--no-bench", "--json"]
    result = CliRunner().invoke(main, ["compile", str(checkpoint), "-o", str(tmp_path / "out"), *flags])
    assert result.exit_code == 0, result.output
    manifest = effc.load(tmp_path / "out").manifest
    assert manifest.compression.nonzero < manifest.compression.parameters
    assert "no speed" in manifest.compression.notes[0]
    graph = ir.load(str(tmp_path / "out" / "model.onnx")).graph
    checked = 0
    for value in graph.initializers.values():
        array = value.const_value.numpy()
        # Layers of the transformer: [K, N] with K of 64 or 128; embeddings and the head stay whole.
        if array.ndim == 2 and array.dtype == np.int8 and array.shape[0] in (64, 128) and array.shape[1] in (64, 128):
            checked += is_two_four(torch.from_numpy(array.T.astype(np.float32)))
    assert checked == 12


def pruned(kind, folder, prune, low_rank=None, data=None, **changes):
    checkpoint = tiny_checkpoints.save(folder / "model", kind, with_tokenizer=True, **changes)
    source = load(locate(ModelSection(path=str(checkpoint))))
    inputs = ragged_inputs(source, [20, 9])
    recipe = build_recipe({"prune": prune, "low_rank": low_rank, "verify": {"data": data}})
    compression = Compression(source, recipe, Probe(inputs, run_torch(source, inputs)))
    for step in compression.steps:
        compression.run(step)
    (folder / "out").mkdir()
    return source, compression, save_checkpoint(source, folder / "out", compression.probe.inputs)


@pytest.mark.parametrize(
    ("kind", "prune", "low_rank", "plain"),
    [
        ("BertForMaskedLM", ["layers:0.5", "ffn:0.25", "vocab"], None, True),
        ("BertModel", ["heads:0.5"], None, False),
        ("LlamaForCausalLM", ["heads:0.5", "ffn:0.25", "vocab", "2:4"], None, True),
        ("GPT2LMHeadModel", ["ffn:0.25"], "0.8", False),
        ("T5EncoderModel", ["heads:0.5", "ffn:0.25"], None, True),
        ("ViTForImageClassification", ["heads:0.5", "layers:0.5"], None, True),
        ("ViTForImageClassification", [{"method": "ffn", "share": 0.3, "uniform": False}], "0.8", False),
    ],
)
def test_checkpoints_load_in_transformers_where_the_config_can_say_their_shape(
    kind, prune, low_rank, plain, files, tmp_path
):
    sizes = {
        "Llama": SIZES | {"num_key_value_heads": 2},
        "GPT2L": {"n_embd": 64, "n_head": 4},
        "T5Enc": {"num_heads": 4},
    }
    changes = sizes.get(kind[:5], SIZES)
    prune = [f"vocab:{files.corpus}" if step == "vocab" else step for step in prune]
    data = None if "ViT" in kind else files.texts
    source, compression, record = pruned(kind, tmp_path, prune, low_rank, data, **changes)
    assert (record.plain, record.reason is None) == (plain, plain)
    model = effc.load_checkpoint(tmp_path / "out")
    inputs = compression.probe.inputs
    with torch.no_grad():
        found, expected = model(**inputs)[0], run_torch(source, inputs)
    assert np.allclose(found.numpy(), next(iter(expected.values())), atol=1e-5)
    assert bool(masks_of(model)) == ("2:4" in prune)
    # A pruned checkpoint can be compiled like any other.
    again = load(locate(ModelSection(path=str(tmp_path / "out" / "checkpoint"))))
    assert sum(parameter.numel() for parameter in again.model.parameters()) == sum(
        parameter.numel() for parameter in source.model.parameters()
    )
    if kind == "BertForMaskedLM":
        assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "checkpoint").config.num_hidden_layers == 1


def test_changed_weights_change_the_cache_key(tmp_path, files):
    keys = set()
    for number, prune in enumerate(([], ["heads:0.5"], ["magnitude:0.5"], ["magnitude:0.6"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, _, _ = pruned("BertModel", folder, prune, data=files.texts, **SIZES)
        keys.add(export_key(source, []))
    assert len(keys) == 4


def test_damaged_checkpoints_are_refused(tmp_path, files):
    pruned("BertModel", tmp_path, ["heads:0.5"], data=files.texts, **SIZES)
    structure = tmp_path / "out" / "checkpoint" / "effc_structure.json"
    text = structure.read_text()
    structure.write_text(text.replace("query.weight", "query.wait"))
    with pytest.raises(SourceModelError, match="do not fit"):
        effc.load_checkpoint(tmp_path / "out")
    structure.write_text(text[:20])
    with pytest.raises(SourceModelError, match="cannot be read"):
        effc.load_checkpoint(tmp_path / "out")
    with pytest.raises(SourceModelError, match="--checkpoint"):
        effc.load_checkpoint(tmp_path)


def test_what_is_missing_is_said_before_anything_is_changed(tmp_path, files):
    with pytest.raises(DataError, match="--calibration"):
        pruned("BertModel", tmp_path, ["layers:0.5"], **SIZES)
    with pytest.raises(DataError, match="no data file"):
        effc.compile(tmp_path / "model", prune="vocab:/nowhere.txt", output=tmp_path / "o")
    tiny_checkpoints.save(tmp_path / "bart", "BartModel")
    with pytest.raises(PreconditionError, match="no class for BartEncoder alone"):
        effc.compile(tmp_path / "bart", output=tmp_path / "o", checkpoint={"enabled": True})
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_pruned_causal_model_generates(tmp_path, files):
    sizes = SIZES | {"num_key_value_heads": 2}
    checkpoint = tiny_checkpoints.save_lively(tmp_path / "model", "LlamaForCausalLM", **sizes)
    done = effc.compile(
        checkpoint,
        prune=[f"vocab:{files.corpus}", "heads:0.5", "ffn:0.25", "2:4"],
        low_rank=0.8,
        verify={"data": files.texts},
        bench={"enabled": False},
        output=tmp_path / "out",
    )
    assert done.manifest.generation is not None
    assert done.manifest.verification.task_metric["name"] == "perplexity"
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    ids = tokenizer("the film", return_tensors="np")["input_ids"]
    tokens = effc.load(done.path).generate(ids, max_new_tokens=4)
    assert np.asarray(tokens).max() < len(tokenizer)
