"""Verification of real exported artifacts against their source; task metrics against figures worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from tiny_artifacts import manifest_for
from tiny_checkpoints import VOCABULARY, WORDS, save, tokenizer

from effc.compiler import quality, runtime, verify
from effc.compiler.data import Sample, random_batches
from effc.compiler.inputs import dynamic_axes, example_inputs, graph_inputs
from effc.compiler.manifest import TensorRecord
from effc.compiler.metrics import COMPARED_OUTPUTS
from effc.compiler.recipe import ModelSection
from effc.compiler.source import SourceModel, load, locate
from effc.errors import DataError, SourceModelError


class _Named(torch.nn.Module):
    """The model with its inputs in order and its outputs as a tuple."""

    def __init__(self, model: torch.nn.Module, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(result[name] for name in self.outputs)


def make_artifact(source: SourceModel, directory: Path) -> Path:
    """Export the model as it is, with the effc.json of a compile."""
    directory.mkdir()
    batch = example_inputs(source, batch=2, length=7)
    outputs = [name for name in COMPARED_OUTPUTS if source.model(**batch).get(name) is not None]
    axes = dynamic_axes(batch)
    torch.onnx.export(
        _Named(source.model, list(batch), outputs).eval(),
        tuple(batch.values()),
        directory / "model.onnx",
        input_names=list(batch),
        output_names=outputs,
        dynamic_shapes=(tuple(axes[name] for name in batch),),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    manifest = manifest_for(
        directory,
        inputs=graph_inputs(source),
        outputs=[TensorRecord(name=name, dtype="float32", shape=["batch"]) for name in outputs],
        max_length=source.max_length,
    ).model_copy(update={"source": source.record(), "recipe": {}})
    (directory / "effc.json").write_text(manifest.model_dump_json())
    return directory


def spoil(artifact: Path, scale: float) -> None:
    """Change the weights of the compiled model, and its hashes with them."""
    model = onnx.load(artifact / "model.onnx")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 2 and values.dtype == np.float32:
            noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values + scale * values.std() * noise, tensor.name))
    onnx.save(model, artifact / "model.onnx")
    old = runtime.read_manifest(artifact)
    new = manifest_for(artifact, inputs=old.inputs, outputs=old.outputs, max_length=old.source.max_length)
    (artifact / "effc.json").write_text(old.model_copy(update={"files": new.files}).model_dump_json())


class Made:
    """A checkpoint and an artifact made from it."""

    def __init__(self, directory: Path, kind: str, **changes: Any):
        # One layer, because exporting takes most of the time.
        self.checkpoint = save(directory / "source", kind, with_tokenizer=True, num_hidden_layers=1, **changes)
        self.artifact = make_artifact(load(locate(ModelSection(path=str(self.checkpoint)))), directory / "artifact")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Made:
    # A wide initialization, so that predictions differ between texts.
    return Made(tmp_path_factory.mktemp("class"), "BertForSequenceClassification", num_labels=3, initializer_range=0.5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("encoder"), "BertModel")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("decoder"), "LlamaForCausalLM", initializer_range=0.3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts of different lengths, some longer than a batch is cut to."""
    random = np.random.default_rng(0)
    rows = [" ".join(random.choice(WORDS[:-3], random.integers(1, 40))) for _ in range(40)]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(rows))
    return path


def labelled(path: Path, texts: Path, labels: list[Any]) -> Path:
    rows = [{"text": text, "label": label} for text, label in zip(texts.read_text().splitlines(), labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def spoiled(made: Made, directory: Path, scale: float) -> Path:
    artifact = shutil.copytree(made.artifact, directory / "spoiled")
    spoil(artifact, scale)
    return artifact


def predictions(made: Made, texts: Path) -> list[int]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made.checkpoint).eval()
    encoded = tokenizer()(texts.read_text().splitlines(), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**encoded).logits.argmax(-1).tolist()


# Whole artifacts


def test_a_faithful_artifact_loses_nothing(encoder: Made, texts: Path) -> None:
    seen: list[tuple[int, int]] = []
    record = verify.verify(
        encoder.artifact, data=texts, samples=20, max_length=24, batch_size=8, progress=lambda *at: seen.append(at)
    )
    assert (record.samples, record.data) == (20, str(texts))
    assert set(record.outputs) == {"last_hidden_state", "pooler_output"}
    for deviation in record.outputs.values():
        # Not zero: two runtimes never round alike, so zero would mean that one model was compared with itself.
        assert 0 < deviation.relative_error < 1e-5
        assert deviation.cosine == pytest.approx(1, abs=1e-6)
    assert record.quality_metric == "1 - mean cosine of pooled embeddings"
    assert abs(record.quality_drop) < 1e-6
    assert record.details["max_length"] == 24
    assert seen == [(8, 20), (16, 20), (20, 20)]
    assert type(record).model_validate_json(record.model_dump_json()) == record


def test_damage_shows_and_grows(encoder: Made, texts: Path, tmp_path: Path) -> None:
    drops, errors = [], []
    for scale in (0.02, 0.2, 1.0):
        (tmp_path / str(scale)).mkdir()
        record = verify.verify(spoiled(encoder, tmp_path / str(scale), scale), data=texts)
        drops.append(record.quality_drop)
        errors.append(record.outputs["last_hidden_state"].relative_error)
    assert 0 < drops[0] < drops[1] < drops[2]
    assert 1e-3 < errors[0] < errors[1] < errors[2]


def test_samples_do_not_depend_on_the_batch_size(encoder: Made, texts: Path, tmp_path: Path) -> None:
    artifact = spoiled(encoder, tmp_path, 0.2)
    one, many = (verify.verify(artifact, data=texts, samples=12, batch_size=size) for size in (1, 12))
    assert one.details["tokens"] == many.details["tokens"]
    # Padding is there in one and not in the other, and must not count.
    for name in one.outputs:
        assert one.outputs[name].relative_error == pytest.approx(many.outputs[name].relative_error, rel=1e-3)
    assert one.quality_drop == pytest.approx(many.quality_drop, rel=1e-3)


def test_random_tokens_without_data(encoder: Made) -> None:
    record = verify.verify(encoder.artifact)
    assert (record.data, record.samples) == ("random tokens", 16)
    assert record.outputs["last_hidden_state"].relative_error < 1e-5
    assert verify.verify(encoder.artifact, seed=1).outputs != record.outputs


def test_the_recipe_says_what_to_verify_with(encoder: Made, texts: Path, tmp_path: Path) -> None:
    settings = {"verify": {"data": str(texts), "samples": 5, "max_length": 10}}
    artifact = shutil.copytree(encoder.artifact, tmp_path / "artifact")
    manifest = runtime.read_manifest(artifact).model_copy(update={"recipe": settings})
    (artifact / "effc.json").write_text(manifest.model_dump_json())
    record = verify.verify(artifact)
    assert (record.data, record.samples, record.details["max_length"]) == (str(texts), 5, 10)
    assert verify.verify(runtime.load(artifact), samples=3).samples == 3


def test_accuracy_with_labels(classifier: Made, texts: Path, tmp_path: Path) -> None:
    right = predictions(classifier, texts)
    assert len(set(right)) > 1
    # Labels that the source model gets right in three of four cases.
    labels = [f"LABEL_{(label + (number % 4 == 0)) % 3}" for number, label in enumerate(right)]
    data = labelled(tmp_path / "a.jsonl", texts, labels)
    record = verify.verify(classifier.artifact, data=data, samples=40)
    assert record.task_metric
    assert (record.task_metric["name"], record.task_metric["source"]) == ("accuracy", 0.75)
    assert record.task_metric["compiled"] == 0.75
    assert (record.quality_metric, record.quality_drop) == ("accuracy lost", 0)
    assert record.outputs["logits"].top1_agreement == 1
    worse = verify.verify(spoiled(classifier, tmp_path, 2.0), data=data, samples=40)
    assert worse.task_metric
    assert worse.task_metric["source"] == 0.75
    assert worse.quality_drop == pytest.approx(0.75 - worse.task_metric["compiled"])
    assert worse.outputs["logits"].top1_agreement != 1


def test_agreement_without_labels(classifier: Made, texts: Path, tmp_path: Path) -> None:
    record = verify.verify(spoiled(classifier, tmp_path, 2.0), data=texts, samples=40)
    assert record.task_metric is None
    assert record.quality_metric == "share of predictions that changed"
    agreement = record.outputs["logits"].top1_agreement
    assert agreement is not None
    assert record.quality_drop == pytest.approx(1 - agreement)
    assert record.quality_drop > 0


def test_perplexity_is_that_of_transformers(decoder: Made, texts: Path) -> None:
    record = verify.verify(decoder.artifact, data=texts, samples=40, batch_size=7)
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder.checkpoint).eval()
    loss = tokens = 0.0
    for text in texts.read_text().splitlines():
        ids = tokenizer()(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert record.task_metric
    assert record.task_metric["tokens"] == tokens
    assert record.task_metric["source"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert record.quality_metric == "relative increase of perplexity"
    assert abs(record.quality_drop) < 1e-4


def test_source_that_moved_or_changed(encoder: Made, tmp_path: Path) -> None:
    moved = shutil.copytree(encoder.checkpoint, tmp_path / "moved")
    artifact = shutil.copytree(encoder.artifact, tmp_path / "artifact")
    manifest = runtime.read_manifest(artifact)
    gone = manifest.source.model_copy(update={"path": str(tmp_path / "gone")})
    (artifact / "effc.json").write_text(manifest.model_copy(update={"source": gone}).model_dump_json())
    with pytest.raises(SourceModelError, match="no longer at .*--source PATH"):
        verify.verify(artifact)
    assert verify.verify(artifact, source=moved).quality_drop < 1e-6
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SourceModelError, match="not the one that this artifact was compiled from"):
        verify.verify(artifact, source=moved)


def test_data_that_does_not_fit(classifier: Made, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        verify.verify(classifier.artifact, data=tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"label '7'.*LABEL_0"):
        verify.verify(classifier.artifact, data=labelled(tmp_path / "a.jsonl", texts, [7] * 40))


def test_code_of_a_checkpoint_is_never_run_for_an_artifact_alone(encoder: Made, tmp_path: Path) -> None:
    # An artifact from someone else may name a model with code, and a recipe that trusts it.
    checkpoint = shutil.copytree(encoder.checkpoint, tmp_path / "source")
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    artifact = shutil.copytree(encoder.artifact, tmp_path / "artifact")
    manifest = runtime.read_manifest(artifact)
    source = manifest.source.model_copy(update={"path": str(checkpoint)})
    changed = manifest.model_copy(update={"source": source, "recipe": {"model": {"trust_remote_code": True}}})
    (artifact / "effc.json").write_text(changed.model_dump_json())
    with pytest.raises(SourceModelError, match="--trust-remote-code"):
        verify.verify(artifact)
    assert not (tmp_path / "ran").exists()


# Comparing and scoring


def fixed(logits: np.ndarray) -> Any:
    return lambda batch: {"logits": logits[: len(batch["input_ids"])]}


def tokens(ids: list[list[int]]) -> dict[str, np.ndarray]:
    array = np.array(ids)
    return {"input_ids": array, "attention_mask": (array != 0).astype(np.int64)}


def one_hot(classes: Any, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[np.array(classes)]


def test_compare_counts_samples_and_real_tokens() -> None:
    batches: list[Mapping[str, np.ndarray]] = [tokens([[5, 6, 0], [7, 0, 0]]), tokens([[5, 6, 7]])]
    logits = one_hot([[0, 1, 2], [0, 1, 2]], 3)
    other = logits.copy()
    # A changed token that is padding in the first batch, and real in the second.
    other[0, 2] = [1, 0, 0]
    result = verify.compare(fixed(logits), fixed(other), batches, quality.TokenClassQuality())
    assert (result.samples, result.tokens) == (3, 6)
    assert result.outputs["logits"].top1_agreement == pytest.approx(5 / 6)
    assert result.score.drop == pytest.approx(1 / 6)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "WhisperForConditionalGeneration"])
def test_images_and_audio_are_compared_without_a_mask(tmp_path: Path, kind: str) -> None:
    source = load(locate(ModelSection(path=str(save(tmp_path, kind)))))
    run = verify.torch_runner(source)
    batches = list(random_batches(source, count=5, length=1, batch_size=2))
    same = verify.compare(run, run, batches, verify.choose_quality(source, None, None))
    assert (same.samples, same.tokens) == (5, 0)
    assert same.score.drop == pytest.approx(0, abs=1e-12)
    assert all(deviation.relative_error == 0 for deviation in same.outputs.values())
    other = verify.compare(
        run,
        lambda batch: {name: -value for name, value in run(batch).items()},
        batches,
        verify.choose_quality(source, None, None),
    )
    assert other.score.drop >= 1


def test_class_scores() -> None:
    score = quality.ClassQuality([0, 0, 1, 1])
    score.update({}, {"logits": one_hot([0, 0, 1, 0], 2)}, {"logits": one_hot([0, 1, 1, 0], 2)})
    result = score.score()
    assert result.metric
    assert (result.metric["source"], result.metric["compiled"], result.drop) == (0.75, 0.5, 0.25)
    # Class 0: precision 2/3, recall 1; class 1: precision 1, recall 1/2.
    assert result.metric["macro_f1"]["source"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_a_model_that_returns_nan_is_never_right() -> None:
    nan = np.full((2, 2), np.nan)
    score = quality.ClassQuality([0, 0])
    score.update({}, {"logits": one_hot([0, 0], 2)}, {"logits": nan})
    assert score.score().drop == 1
    agreement = quality.ClassQuality()
    agreement.update({}, {"logits": nan}, {"logits": nan})
    assert agreement.score().drop == 1
    perplexity = quality.PerplexityQuality()
    batch = tokens([[1, 1, 1]])
    perplexity.update(batch, {"logits": one_hot([[1, 1, 1]], 2)}, {"logits": np.full((1, 3, 2), np.nan)})
    assert perplexity.score().drop == math.inf


def test_perplexity_of_known_predictions() -> None:
    score = quality.PerplexityQuality()
    batch = tokens([[1, 2, 3, 0], [1, 2, 0, 0]])
    # Even odds over four tokens: perplexity 4. Padding holds nonsense that must not count.
    even = np.zeros((2, 4, 4), dtype=np.float32)
    sure = one_hot([[2, 3, 0, 0], [2, 0, 0, 0]], 4) * 50
    even[:, 3], sure[:, 3] = np.nan, np.nan
    score.update(batch, {"logits": even}, {"logits": sure})
    result = score.score()
    assert result.metric == {
        "name": "perplexity",
        "source": pytest.approx(4),
        "compiled": pytest.approx(1),
        "tokens": 3,
    }
    assert result.drop == pytest.approx(-0.75)


def test_masked_tokens_are_chosen_by_the_seed_and_scored() -> None:
    ids = [[2, *range(5, 25), 3], [2, 9, 3, *[0] * 19]]
    chosen = []
    for seed in (0, 0, 1):
        score = quality.MaskedQuality(mask_token=4, special=[0, 2, 3, 4], seed=seed)
        batch = score.prepare(tokens(ids))
        masked = batch["input_ids"] == 4
        # 15 percent of twenty, and at least one of a text of one token; never padding or special tokens.
        assert masked.sum(axis=1).tolist() == [3, 1]
        assert masked[1, 1]
        chosen.append(masked)
        half = np.array(ids)
        half[0] = 0
        score.update(batch, {"logits": one_hot(ids, 32)}, {"logits": one_hot(half, 32)})
        result = score.score()
        assert result.metric
        assert (result.metric["source"], result.metric["compiled"], result.drop) == (1.0, 0.25, 0.75)
    assert np.array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])


def test_word_labels_count_the_first_token_of_each_word(tmp_path: Path) -> None:
    source = load(locate(ModelSection(path=str(save(tmp_path, "BertForTokenClassification", with_tokenizer=True)))))
    samples = [Sample("a films", (1, 0), words=("a", "films")), Sample("bad", (1,), words=("bad",))]
    score = verify.choose_quality(source, samples, 64)
    # [CLS] a film ##s [SEP]: the piece ##s has no label of its own.
    ids = tokenizer()([list(sample.words or ()) for sample in samples], is_split_into_words=True, padding=True)
    assert VOCABULARY[ids["input_ids"][0][3]] == "##s"
    batch = {name: np.array(value) for name, value in ids.items()}
    right, wrong = [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]], [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    score.update(batch, {"logits": one_hot(right, 2)}, {"logits": one_hot(wrong, 2)})
    result = score.score()
    assert result.metric
    assert (result.metric["labels"], result.metric["source"]) == (3, 1.0)
    assert result.drop == pytest.approx(1 / 3)


def test_the_metric_fits_the_task(encoder: Made, classifier: Made, decoder: Made) -> None:
    def chosen(made: Made, samples: list[Sample] | None) -> type[quality.Quality]:
        source = load(locate(ModelSection(path=str(made.checkpoint))))
        return type(verify.choose_quality(source, samples, 64))

    text = [Sample("good")]
    assert chosen(encoder, text) is quality.EmbeddingQuality
    assert chosen(classifier, None) is quality.ClassQuality
    assert chosen(decoder, text) is quality.PerplexityQuality
    # Nothing can be predicted about random tokens.
    assert chosen(decoder, None) is quality.CosineQuality


def test_masked_language_models_and_regression(tmp_path: Path) -> None:
    masked = load(locate(ModelSection(path=str(save(tmp_path / "m", "BertForMaskedLM", with_tokenizer=True)))))
    assert isinstance(verify.choose_quality(masked, [Sample("good")], 64), quality.MaskedQuality)
    path = save(tmp_path / "r", "BertForSequenceClassification", with_tokenizer=True, num_labels=1)
    regression = load(locate(ModelSection(path=str(path))))
    assert isinstance(verify.choose_quality(regression, [Sample("good")], 64), quality.RegressionQuality)
    with pytest.raises(DataError, match="predicts a number"):
        verify.choose_quality(regression, [Sample("good", 0)], 64)
