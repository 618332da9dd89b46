"""Valid inputs for a model: example batches for export and probing, and what of their shape may vary."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from effc.compiler.manifest import TensorRecord
from effc.errors import SourceModelError

if TYPE_CHECKING:
    import torch

    from effc.compiler.source import SourceModel

BATCH, SEQUENCE, TARGET = "batch", "sequence", "target"
_SEQUENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TARGET_INPUTS = ("decoder_input_ids", "decoder_attention_mask")
# One longer than a span of a window of 256, so that the blocked form is what runs.
_PROBE_LENGTHS = (448, 61)


def input_names(source: SourceModel) -> tuple[str, ...]:
    """The inputs that the compiled graph takes, in the order in which they are written down everywhere."""
    if source.task.modality != "text":
        return (source.model.main_input_name,)
    if has_target(source):
        return (*_SEQUENCE_INPUTS[:2], *_TARGET_INPUTS)
    return (*_SEQUENCE_INPUTS,) if _takes_token_types(source) else _SEQUENCE_INPUTS[:2]


def has_target(source: SourceModel) -> bool:
    """Whether the model reads a target text besides its input."""
    return source.task.name == "seq2seq-lm"


def example_inputs(source: SourceModel, batch: int = 2, length: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs that the model accepts, the same for the same seed.

    Text: ``input_ids`` (drawn from the ordinary tokens), ``attention_mask`` of ones and, where the model takes them,
    ``token_type_ids`` (two segments), all int64 ``[batch, length]``; where there is a target text,
    ``decoder_input_ids`` and ``decoder_attention_mask`` of about half that length. Images and audio have the size the
    config fixes, so ``length`` has no effect: ``pixel_values`` ``[batch, channels, height, width]``,
    ``input_features`` ``[batch, mels, frames]``, fp32.

    Raises:
        SourceModelError: if ``length`` exceeds the positions of the model.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    if source.task.modality != "text":
        shape = (batch, *_fixed_shape(source))
        return {source.model.main_input_name: torch.randn(shape, generator=generator)}
    if source.max_length is not None and length > source.max_length:
        raise SourceModelError(
            f"{length} tokens are more than the {source.max_length} positions of the model.", "Choose a shorter length."
        )
    ordinary = torch.tensor(ordinary_tokens(source))
    target = target_length(length)
    values = {
        "decoder_input_ids": ordinary[torch.randint(len(ordinary), (batch, target), generator=generator)],
        "decoder_attention_mask": torch.ones((batch, target), dtype=torch.int64),
        "input_ids": ordinary[torch.randint(len(ordinary), (batch, length), generator=generator)],
        "attention_mask": torch.ones((batch, length), dtype=torch.int64),
        "token_type_ids": (torch.arange(length) >= (length + 1) // 2).long().repeat(batch, 1),
    }
    if getattr(source.config, "type_vocab_size", 1) == 1:
        values["token_type_ids"].zero_()
    return {name: values[name] for name in input_names(source)}


def ragged_inputs(
    source: SourceModel, lengths: Sequence[int], side: Literal["left", "right"] = "right", seed: int = 0
) -> dict[str, torch.Tensor]:
    """One random sequence for each of ``lengths``, padded to the longest on ``side``.

    Padding positions hold the padding token, mask 0 and segment 0. Models without padding (images, audio) get a plain
    batch of ``len(lengths)``.
    """
    import torch

    longest = max(lengths)
    inputs = example_inputs(source, len(lengths), longest, seed)
    if source.task.modality != "text":
        return inputs
    fill = dict.fromkeys(("input_ids", "decoder_input_ids"), padding_token(source))
    real = {SEQUENCE: _real(lengths, side), TARGET: _real([target_length(length) for length in lengths], side)}
    return {
        name: torch.where(real[TARGET if name in _TARGET_INPUTS else SEQUENCE], value, fill.get(name, 0))
        for name, value in inputs.items()
    }


def probe_inputs(source: SourceModel) -> dict[str, torch.Tensor]:
    """Two random padded sequences, for looking at what a model computes."""
    limit = source.max_length or max(_PROBE_LENGTHS)
    return ragged_inputs(source, [min(length, limit) for length in _PROBE_LENGTHS])


def target_length(length: int) -> int:
    """Tokens of the target text that goes with a source text of ``length`` tokens: never as many, but for one."""
    return length // 2 + 1 if length > 2 else 1


def _real(lengths: Sequence[int], side: Literal["left", "right"]) -> torch.Tensor:
    """``[batch, longest]`` bool, False at padding."""
    import torch

    longest = max(lengths)
    position, count = torch.arange(longest), torch.tensor(lengths)[:, None]
    return position >= longest - count if side == "left" else position < count


def token_mask(inputs: Mapping[str, Any]) -> Any | None:
    """The mask of real tokens ``[batch, length]`` of the text that outputs belong to, None where nothing is padded."""
    return inputs.get("decoder_attention_mask", inputs.get("attention_mask"))


def dynamic_axes(inputs: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Which axes of each input may vary: ``batch`` of all, ``sequence`` of token inputs, ``target`` of target texts."""
    lengths = dict.fromkeys(_SEQUENCE_INPUTS, SEQUENCE) | dict.fromkeys(_TARGET_INPUTS, TARGET)
    return {name: {0: BATCH, 1: lengths[name]} if name in lengths else {0: BATCH} for name in inputs}


def graph_inputs(source: SourceModel) -> list[TensorRecord]:
    """Name, type, symbolic shape and largest value of every input of the compiled graph."""
    inputs = example_inputs(source, batch=1, length=min(3, source.max_length or 3))
    axes = dynamic_axes(inputs)
    maximum = {
        "input_ids": _vocabulary(source) - 1 if source.task.modality == "text" else None,
        "attention_mask": 1,
        "decoder_input_ids": _vocabulary(source) - 1 if has_target(source) else None,
        "decoder_attention_mask": 1,
        "token_type_ids": (getattr(source.config, "type_vocab_size", 0) or 1) - 1,
    }
    return [
        TensorRecord(
            name=name,
            dtype=str(value.dtype).removeprefix("torch."),
            shape=[axes[name].get(axis, size) for axis, size in enumerate(value.shape)],
            maximum=maximum.get(name),
        )
        for name, value in inputs.items()
    ]


def padding_token(source: SourceModel) -> int:
    """The id to fill padding with. Any will do where the model defines none, since the mask hides it."""
    for owner in (source.processor, source.config):
        value = getattr(owner, "pad_token_id", None)
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def ordinary_tokens(source: SourceModel) -> list[int]:
    """All token ids but the special ones, such as padding, which some models treat in a way of their own."""
    size = _vocabulary(source)
    special = set(getattr(source.processor, "all_special_ids", ()))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"):
        value = getattr(source.config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    # A tokenizer may know fewer tokens than the table, which is often rounded up with rows that were never trained.
    known = len(source.processor) if source.processor is not None else size
    return [token for token in range(min(size, known)) if token not in special] or list(range(size))


def _vocabulary(source: SourceModel) -> int:
    """Rows of the embedding table."""
    table: Any = source.model.get_input_embeddings()
    return int(table.weight.shape[0])


def _takes_token_types(source: SourceModel) -> bool:
    """Whether segments are an input: the model must accept them, and its tokenizer, if there is one, produce them."""
    if "token_type_ids" not in inspect.signature(source.model.forward).parameters:
        return False
    segments = getattr(source.config, "type_vocab_size", 0) or 0
    if source.processor is None:
        return segments > 1
    return segments > 0 and "token_type_ids" in source.processor.model_input_names


def _fixed_shape(source: SourceModel) -> tuple[int, ...]:
    """The shape of one image or one stretch of audio, without the batch."""
    config = source.config
    if source.task.modality == "images":
        # A composite config's image classifier runs the vision part alone.
        config = getattr(config, "vision_config", None) or config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        return config.num_channels, height, width
    # The convolutions before the encoder halve the frames once.
    return config.num_mel_bins, 2 * config.max_source_positions
