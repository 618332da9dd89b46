"""Measure a compiled artifact's quality against the source model it was made from, which is loaded anew, untouched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effc.compiler.data import (
    Sample,
    class_ids,
    encode,
    padding_tokenizer,
    random_batches,
    read_samples,
    tokenize,
    word_class_ids,
)
from effc.compiler.inputs import input_names, token_mask
from effc.compiler.manifest import OutputDeviation, SourceRecord, VerifyRecord
from effc.compiler.metrics import COMPARED_OUTPUTS, DeviationSum, shared_outputs
from effc.compiler.quality import (
    ClassQuality,
    CosineQuality,
    EmbeddingQuality,
    MaskedQuality,
    PerplexityQuality,
    Quality,
    RegressionQuality,
    Score,
    TokenClassQuality,
)
from effc.compiler.recipe import ModelSection, VerifySection
from effc.compiler.source import Located, SourceModel, load, locate
from effc.compiler.vocabulary import load_vocabulary
from effc.errors import DataError, SourceModelError

if TYPE_CHECKING:
    from effc.compiler.compiled_model import CompiledModel
    from effc.compiler.verify_vocabulary import OwnTokens

Array = NDArray[Any]
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Progress = Callable[[int, int], None]

# Logits of both models are in memory together; a batch of them is kept below this.
_LOGITS_BYTES = 256 << 20
_BATCH = 8


@dataclass(frozen=True)
class Comparison:
    """Two models on the same batches.

    Attributes:
        outputs: deviation per output.
        score: the task metric of both and the quality lost.
        samples, tokens: how much was compared; tokens are 0 for images and audio.
        seconds: computing time of the reference and of the candidate, wall clock.
    """

    outputs: dict[str, OutputDeviation]
    score: Score
    samples: int
    tokens: int
    seconds: tuple[float, float]


def verify(
    artifact: str | Path | CompiledModel,
    *,
    data: str | Path | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    source: str | Path | None = None,
    trust_remote_code: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyRecord:
    """Run the artifact and its source model on the same samples and compare them.

    Args:
        artifact: the directory, or the model that :func:`effc.load` returned.
        data: file with texts, see :func:`effc.compiler.data.read_samples`. The one that the recipe names if None;
            random tokens if that names none.
        samples: how many to compare at most; as in the recipe if None.
        max_length: tokens per sample; as in the recipe if None, and never more than the model's positions.
        source: where the source model is, if it was moved since the compile.
        trust_remote_code: run model code that the source checkpoint brings along. Never taken from the artifact.
        batch_size: samples per run; chosen to bound memory if None.
        seed: chooses samples, random tokens and masked tokens.
        progress: called with (samples done, samples in all).

    Raises:
        OutputError: if ``artifact`` is none.
        SourceModelError: if the source model is missing, or is another than the artifact was compiled from.
        DataError: if the data is missing or does not fit the model.
    """
    from transformers import AutoTokenizer

    from effc.compiler.compiled_model import CompiledModel
    from effc.compiler.runtime import load as load_artifact
    from effc.compiler.verify_vocabulary import POSITIONAL, OwnTokens, split_texts, with_left_tokens

    compiled = artifact if isinstance(artifact, CompiledModel) else load_artifact(artifact, engine=False)
    manifest = compiled.manifest
    settings = VerifySection.model_validate(manifest.recipe.get("verify", {}))
    data = data if data is not None else settings.data
    count = samples if samples is not None else settings.samples
    located = _original(manifest.source, source, trust_remote_code)
    # Before the weights are loaded, so that a mistake in the file shows at once.
    texts = None if data is None else read_samples(data, count, seed)
    model = load(located)
    limit = max_length if max_length is not None else settings.max_length
    limit = limit if model.max_length is None else min(limit, model.max_length)
    batch_size = batch_size or _batch_size(model, limit)
    quality = choose_quality(model, texts, limit, seed)
    source_ids = load_vocabulary(compiled.path, manifest)
    tokenizer, own, same, read_otherwise = None, None, None, None
    if source_ids is not None and texts is not None:
        tokenizer = AutoTokenizer.from_pretrained(compiled.path)
        same, others = split_texts(texts, model, tokenizer, source_ids, limit)
        read_otherwise = len(others)
        if isinstance(quality, POSITIONAL):
            # Where no text is left as it was, random tokens of the new vocabulary are.
            texts, data = (same, data) if same else (None, None)
            quality = choose_quality(model, texts, limit, seed)
    batches: Iterable[Mapping[str, Array]]
    if texts is None:
        batches, total = random_batches(model, count, limit, batch_size, seed), count
        if source_ids is not None:
            batches, own = with_left_tokens(batches, model, source_ids), OwnTokens(source_ids)
    else:
        names = input_names(model)
        batches, total = tokenize(texts, model.processor, limit, batch_size, "np", names), len(texts)
        if source_ids is not None:
            own = OwnTokens(source_ids, tokenize(texts, tokenizer, limit, batch_size, "np", names))
    result = compare(torch_runner(model), _compiled_runner(compiled), batches, quality, progress, total, own)
    from effc.compiler.verify_extended import reaches_beyond, verify_extended

    extended = None
    if reaches_beyond(manifest, model):
        extended = verify_extended(model, compiled, texts if same is None else same or None, seed, source_ids)
    return VerifyRecord(
        data=f"random {'tokens' if model.task.modality == 'text' else model.task.modality}"
        if data is None
        else str(data),
        samples=result.samples,
        outputs=result.outputs,
        task_metric=result.score.metric,
        quality_drop=result.score.drop,
        quality_metric=result.score.drop_name,
        details={
            "tokens": result.tokens,
            "max_length": limit if model.task.modality == "text" else None,
            "batch_size": batch_size,
            "seed": seed,
            **({} if read_otherwise is None else {"texts_cut_otherwise": read_otherwise}),
            "source": str(located.path),
            "seconds_source": round(result.seconds[0], 3),
            "seconds_compiled": round(result.seconds[1], 3),
        },
        extended=extended,
    )


def compare(
    reference: Runner,
    candidate: Runner,
    batches: Iterable[Mapping[str, Array]],
    quality: Quality,
    progress: Progress | None = None,
    total: int = 0,
    own: OwnTokens | None = None,
) -> Comparison:
    """Run two models on the same batches; only real tokens count.

    Args:
        reference, candidate: from inputs by name to outputs by name.
        batches: inputs by name, in the order of the samples that ``quality`` has labels of.
        quality: the task metric, see :func:`choose_quality`.
        progress: called with (samples done, ``total``).
        own: the candidate's inputs, where its vocabulary is another.

    Raises:
        ValueError: if the two share no output, or an output's shape differs.
    """
    sums: dict[str, DeviationSum] = {}
    done = tokens = 0
    seconds = [0.0, 0.0]
    for batch in batches:
        original = batch
        batch = quality.prepare(batch)
        given = batch if own is None else own.inputs(original, batch)
        start = time.perf_counter()
        expected = reference(batch)
        middle = time.perf_counter()
        actual = candidate(given)
        seconds[0] += middle - start
        seconds[1] += time.perf_counter() - middle
        mask = token_mask(batch)
        for name in shared_outputs(expected, actual):
            parts = [(expected[name], actual[name], mask)]
            for part in parts if own is None else own.comparable(name, original, given, expected, actual):
                sums.setdefault(name, DeviationSum(logits=name == "logits")).update(*part)
        if own is not None:
            expected, actual = own.for_quality(quality, expected, actual)
        quality.update(batch, expected, actual, given)
        done += len(next(iter(batch.values())))
        tokens += 0 if mask is None else int((mask != 0).sum())
        if progress:
            progress(done, total)
    outputs = {name: deviation.result() for name, deviation in sums.items()}
    return Comparison(outputs, quality.score(), done, tokens, (seconds[0], seconds[1]))


def choose_quality(source: SourceModel, samples: list[Sample] | None, max_length: int | None, seed: int = 0) -> Quality:
    """The task metric that fits the model's task and the samples (None: random inputs).

    Raises:
        DataError: if the labels do not match the model, or only some samples have one.
    """
    task, config = source.task.name, source.config
    if task.endswith("feature-extraction"):
        return EmbeddingQuality()
    labelled = samples is not None and any(sample.label is not None for sample in samples)
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    if task in ("sequence-classification", "image-classification"):
        if config.num_labels == 1:
            if labelled:
                raise DataError(
                    "The model predicts a number, not a class, and effc has no metric for labels of that kind.",
                    "Remove the labels; source and compiled model are then compared with each other.",
                )
            return RegressionQuality()
        return ClassQuality(class_ids(samples, names) if samples and labelled else None)
    if task == "token-classification":
        return TokenClassQuality(_token_labels(source, samples, names, max_length) if samples and labelled else None)
    if samples is None or task == "seq2seq-lm":
        return CosineQuality()
    if task == "causal-lm":
        return PerplexityQuality()
    mask_token = getattr(source.processor, "mask_token_id", None)
    if source.processor is None or mask_token is None:
        return CosineQuality()
    return MaskedQuality(mask_token, source.processor.all_special_ids, seed)


def torch_runner(source: SourceModel) -> Runner:
    """The source model as a function on numpy arrays, returning the outputs that are compared."""
    import inspect

    import torch

    # A cache would only be thrown away.
    extra = {"use_cache": False} if "use_cache" in inspect.signature(source.model.forward).parameters else {}

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}
        with torch.inference_mode():
            outputs = source.model(**tensors, **extra, return_dict=True)
        return {name: outputs[name].numpy() for name in COMPARED_OUTPUTS if outputs.get(name) is not None}

    return run


def _compiled_runner(compiled: CompiledModel) -> Runner:
    return lambda batch: compiled(**batch)


def _original(record: SourceRecord, moved_to: str | Path | None, trust_remote_code: bool) -> Located:
    """Find the model that the artifact was compiled from, and make sure that it is that one."""
    path = record.path if moved_to is None else str(moved_to)
    if moved_to is None and record.kind != "hub" and not Path(path).exists():
        raise SourceModelError(
            f"The model that this artifact was compiled from is no longer at '{path}'.",
            "Say where it is now with --source PATH.",
        )
    revision = record.revision if moved_to is None else None
    located = locate(ModelSection(path=path, revision=revision, task=record.task, trust_remote_code=trust_remote_code))
    if located.fingerprint != record.fingerprint:
        raise SourceModelError(
            f"The model at '{path}' is not the one that this artifact was compiled from, or was changed since: its "
            f"fingerprint is {located.fingerprint[:12]}, not {record.fingerprint[:12]}.",
            "Give the original with --source PATH, or compile again.",
        )
    return located


def _batch_size(model: SourceModel, length: int) -> int:
    """As many samples as keep the logits of a language model in bounds."""
    if not model.task.name.endswith("-lm"):
        return _BATCH
    return max(1, min(_BATCH, _LOGITS_BYTES // (4 * length * int(model.config.vocab_size))))


def _token_labels(
    source: SourceModel, samples: list[Sample], names: Mapping[int, str], max_length: int | None
) -> list[list[int]]:
    """For every token position the class of its word, -100 for all but the first token of a word."""
    labels = word_class_ids(samples, names)
    tokenizer = padding_tokenizer(source.processor)
    if not tokenizer.is_fast:
        raise DataError(
            "The model's tokenizer does not tell which token belongs to which word, so word labels cannot be used.",
            "Give the data without labels.",
        )
    result = []
    for sample, classes in zip(samples, labels, strict=True):
        words = encode([sample], tokenizer, max_length).word_ids(0)
        first = [word is not None and (i == 0 or words[i - 1] != word) for i, word in enumerate(words)]
        result.append([classes[word] if new else -100 for word, new in zip(words, first, strict=True)])
    return result
