"""The models that turn text into what a graph takes, and what it gives into embeddings or labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.compiler.sentence_transformers import read_modules
from effc.errors import UsageError
from effc.exporters.triton_config import TEXT, EnsembleConfig, EnsembleStep, Instances, ModelConfig, Tensor
from effc.serving.backend.heads import POOLINGS, labels_of
from effc.serving.backend.tokens import TokenizerSettings
from effc.serving.options import ServingOptions
from effc.serving.plan import Opened, PlannedModel, python_files, require_tokenizer

MAX_TEXT_BYTES = 1 << 20
"""Longer texts are refused before they are tokenized."""

_FROM_TEXT = ("input_ids", "attention_mask", "token_type_ids")


def takes_text(opened: Opened) -> bool:
    """Whether all inputs of the graph that a client must give can be made from one text."""
    names = {record.name for record in opened.manifest.inputs}
    return "input_ids" in names and names <= {*_FROM_TEXT, "position_ids"} and opened.tokenizer is not None


def plan_tokenizer(name: str, opened: Opened, options: ServingOptions) -> PlannedModel:
    """The model that turns ``text`` into token ids."""
    names = {record.name for record in opened.manifest.inputs}
    settings = TokenizerSettings(
        # The mask is made in any case: pooling asks for it.
        inputs=tuple(key for key in _FROM_TEXT if key in names or key == "attention_mask"),
        max_length=text_length(opened, options),
        truncate=options.truncate,
        padding=opened.padding,
        masked="attention_mask" in names,
        max_bytes=MAX_TEXT_BYTES,
    )
    outputs = [Tensor(key, "int64", (-1,)) for key in settings.inputs]
    outputs += [Tensor("offsets", "int64", (-1, 2)), Tensor("truncated", "bool", (1,))]
    config = ModelConfig(
        name=name,
        backend="python",
        inputs=[Tensor("text", TEXT, (1,))],
        outputs=outputs,
        max_batch=options.max_batch,
        instances=Instances("cpu"),
    )
    files = python_files("tokens", tokenizer=vars(settings))
    return PlannedModel(config, {**files, "tokenizer.json": require_tokenizer(opened)})


def text_length(opened: Opened, options: ServingOptions) -> int | None:
    """Tokens of a text that are used.

    Raises:
        UsageError: if more are asked for than the model takes.
    """
    limit = opened.manifest.source.max_length
    if options.max_length is not None:
        if limit is not None and options.max_length > limit:
            raise UsageError(f"The model takes at most {limit} tokens, not {options.max_length}.", "Give fewer.")
        return options.max_length
    positions = opened.manifest.positions
    modules = read_modules(opened.path)
    extended = positions is not None and positions.method is not None
    if modules is None or modules.max_length is None or extended:
        return limit
    return modules.max_length if limit is None else min(limit, modules.max_length)


def plan_head(name: str, opened: Opened, options: ServingOptions) -> PlannedModel | None:
    """The model that turns the graph's output into embeddings or labels; None for a task whose output is the result.

    Raises:
        UsageError: if the model's pooling is one that effc does not know, or there is nothing to pool.
    """
    task = opened.manifest.source.task
    if task != "feature-extraction" and (options.pooling or options.normalize is not None):
        raise UsageError(f"A model for {task} gives no embeddings, so there is nothing to pool.", "Leave it out.")
    heads = {"feature-extraction": _embedding, "sequence-classification": _labels, "token-classification": _tags}
    if task not in heads:
        return None
    settings, inputs, outputs = heads[task](opened, options)
    config = ModelConfig(
        name=name,
        backend="python",
        inputs=inputs,
        outputs=outputs,
        max_batch=options.max_batch,
        instances=Instances("cpu"),
    )
    return PlannedModel(config, python_files("heads", head=settings))


def plan_ensemble(
    name: str, tokenizer: PlannedModel, forward: PlannedModel, head: PlannedModel | None, options: ServingOptions
) -> PlannedModel:
    """Text in, result out."""
    taken = {tensor.name for tensor in forward.config.inputs}
    masked = head is not None and any(tensor.name == "attention_mask" for tensor in head.config.inputs)
    extra = [tensor for tensor in forward.config.outputs if tensor.name == "variant"]
    results = [tensor for tensor in forward.config.outputs if tensor.name != "variant"]
    steps: list[EnsembleStep] = []
    if head is not None:
        wanted = next(tensor for tensor in head.config.inputs if tensor.name != "attention_mask")
        source = wanted.name if wanted.name in {tensor.name for tensor in results} else results[0].name
        links = {wanted.name: source, **({"attention_mask": "attention_mask"} if masked else {})}
        steps.append(EnsembleStep(head.config.name, links, _same(head.config.outputs)))
        outputs, results = list(head.config.outputs), [tensor for tensor in results if tensor.name == source]
    else:
        outputs = results
    *made, offsets, truncated = tokenizer.config.outputs
    ids = [tensor for tensor in made if tensor.name in taken]
    beside = [truncated] if head is not None and head.config.outputs[-1].name != "labels" else [offsets, truncated]
    mask = [tensor for tensor in made if masked and tensor.name == "attention_mask" and tensor not in ids]
    first = EnsembleStep(tokenizer.config.name, {"text": "text"}, _same([*ids, *mask, *beside]))
    second = EnsembleStep(forward.config.name, _same(ids), _same([*results, *extra]))
    text = [Tensor("text", TEXT, (1,))]
    return PlannedModel(
        EnsembleConfig(name, text, [*outputs, *beside, *extra], [first, second, *steps], options.max_batch)
    )


def _same(tensors: Sequence[Tensor]) -> dict[str, str]:
    return {tensor.name: tensor.name for tensor in tensors}


def _embedding(opened: Opened, options: ServingOptions) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    modules = read_modules(opened.path)
    pooling = options.pooling or (modules.pooling if modules is not None else "mean")
    if pooling is None:
        raise UsageError(
            "The sentence-transformers files of this model ask for a pooling or a module that effc does not know.",
            f"Choose one: --pooling {'|'.join(POOLINGS)}.",
        )
    normalize = options.normalize
    if normalize is None:
        normalize = modules is not None and modules.normalize
    width = _width(opened, 3)
    settings = {"kind": "embedding", "pooling": pooling, "normalize": normalize}
    inputs = [Tensor("hidden", "float32", (-1, width)), Tensor("attention_mask", "int64", (-1,))]
    return settings, inputs, [Tensor("embedding", "float32", (width,))]


def _labels(opened: Opened, options: ServingOptions) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    width = _width(opened, 2)
    several = opened.config.get("problem_type") == "multi_label_classification"
    settings = {"kind": "labels", "labels": labels_of(opened.config, width), "several": several}
    outputs = [Tensor("scores", "float32", (width,)), Tensor("label", TEXT, (1,))]
    return settings, [Tensor("logits", "float32", (width,))], outputs


def _tags(opened: Opened, options: ServingOptions) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    width = _width(opened, 3)
    settings = {"kind": "tags", "labels": labels_of(opened.config, width)}
    outputs = [Tensor("scores", "float32", (-1,)), Tensor("labels", TEXT, (-1,))]
    return settings, [Tensor("logits", "float32", (-1, width))], outputs


def _width(opened: Opened, dimensions: int) -> int:
    """The last dimension of the graph's first output."""
    record = opened.manifest.outputs[0]
    if len(record.shape) != dimensions or not isinstance(record.shape[-1], int):
        raise UsageError(f"The output '{record.name}' has the shape {record.shape}.", "Ask the graph itself.")
    return record.shape[-1]
