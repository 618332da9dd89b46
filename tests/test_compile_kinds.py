"""Kinds of models through the whole compile: image classifiers, encoders and encoder-decoders with a position bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch

import effc
from effc.compiler.pipeline import Artifact
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.source import SourceModel, load, locate
from effc.passes.attention_settings import AttentionSection

pytestmark = pytest.mark.slow
NO_BENCH = {"enabled": False}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def compiled(directory: Path, kind: str, attention: str, task: str | None = None, **changes: Any) -> Artifact:
    checkpoint = tiny_checkpoints.save(directory / "model", kind, with_tokenizer="ForImage" not in kind, **changes)
    return effc.compile(checkpoint, attention=attention, task=task, output=directory / "out", bench=NO_BENCH)


def rewritten(directory: Path, attention: str, task: str | None = None) -> SourceModel:
    source = load(locate(ModelSection(path=str(directory / "model"), task=task)))
    rewrite(source, AttentionSection(pattern=attention))
    return source


def error(result: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.linalg.norm(result - expected.numpy()) / np.linalg.norm(expected.numpy()))


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "CLIPForImageClassification"])
@pytest.mark.parametrize("attention", ["local:16", "global:1|local:16"])
def test_an_image_classifier_sees_patches_around_each_other_and_the_class_token(kind, attention, tmp_path):
    changes = {"patch_size": 4} if kind.startswith("ViT") else {}
    artifact = compiled(tmp_path, kind, attention, **changes)
    assert artifact.manifest.source.task == "image-classification"
    assert not artifact.unmet
    assert all(layer.rewritten and not layer.causal for layer in artifact.manifest.attention)
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    result = effc.load(artifact.path)(pixel_values=images).logits
    with torch.no_grad():
        expected = rewritten(tmp_path, attention).model(pixel_values=torch.from_numpy(images)).logits
    assert error(result, expected) < 1e-4


@pytest.mark.parametrize("attention", ["local:16", "dense"])
@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_an_encoder_with_a_position_bias(kind, attention, tmp_path):
    artifact = compiled(tmp_path, kind, attention)
    manifest = artifact.manifest
    assert manifest.source.task == "feature-extraction"
    assert not artifact.unmet
    assert {layer.bias for layer in manifest.attention} == {"relative position bias, constant beyond distance 91"}
    ids, mask = tokens([300, 120], 0)
    result = effc.load(artifact.path)(input_ids=ids, attention_mask=mask).last_hidden_state
    with torch.no_grad():
        model = rewritten(tmp_path, attention).model
        expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
    real = mask.astype(bool)
    assert error(result[real], expected[torch.from_numpy(real)]) < 1e-4


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_an_encoder_decoder_as_one_graph(kind, tmp_path):
    extra = {"decoder_start_token_id": 0} if kind.startswith("T5") else {}
    artifact = compiled(tmp_path, kind, "local:8", "seq2seq-lm", **extra)
    manifest = artifact.manifest
    assert not artifact.unmet
    patterns = [(layer.pattern, layer.causal) for layer in manifest.attention]
    assert ("local:8", False) in patterns
    assert ("local:8", True) in patterns
    assert ("dense", False) in patterns
    assert manifest.verification.outputs["logits"].relative_error < 1.0
    ids, mask = tokens([60, 20], 0)
    target_ids, target_mask = tokens([33, 40], 1)
    feed = {"input_ids": ids, "attention_mask": mask}
    feed |= {"decoder_input_ids": target_ids, "decoder_attention_mask": target_mask}
    result = effc.load(artifact.path)(**feed).logits
    with torch.no_grad():
        model = rewritten(tmp_path, "local:8", "seq2seq-lm").model
        expected = model(**{name: torch.from_numpy(value) for name, value in feed.items()}, use_cache=False).logits
    real = target_mask.astype(bool)
    assert error(result[real], expected[torch.from_numpy(real)]) < 1e-4


def tokens(lengths: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    real = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
    return np.random.default_rng(seed).integers(5, 28, real.shape) * real, real.astype(np.int64)
