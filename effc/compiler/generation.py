"""Writing text with a compiled causal model, token by token. numpy and ONNX Runtime only.

The prompt runs through the graph once; then every step runs one token of each sequence against the caches
(:mod:`effc.compiler.generation_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from effc.compiler.generation_memory import Memory
from effc.compiler.sampling import Sampler, SamplingSettings
from effc.errors import EffcError, UsageError
from effc.suggest import did_you_mean

if TYPE_CHECKING:
    from effc.compiler.manifest import GenerationRecord, Manifest

# Where the model's positions have no bound, a text must end somewhere.
_NEW_TOKENS = 256
_OPTIONS = ("max_new_tokens", "eos_token_id", "pad_token_id")

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Streamer(Protocol):
    """What transformers' streamers are: told the prompt, then each step's tokens ``[batch]``, then the end."""

    def put(self, value: Any) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, padded on the left.

    Attributes:
        tokens: ``[batch, length]``.
        mask: ``[batch, length]``, False for padding.
    """

    tokens: Tokens
    mask: Mask


class Generator:
    """The generating graph of one artifact. May be used from several threads at once.

    Args:
        session: of the graph.
        record: what ``effc.json`` says of it.
        max_length: positions of the model; None if nothing bounds them.
    """

    def __init__(self, session: onnxruntime.InferenceSession, record: GenerationRecord, max_length: int | None):
        self.record = record
        self._session, self._max_length = session, max_length
        self._inputs = {argument.name for argument in session.get_inputs()}
        self._outputs = [argument.name for argument in session.get_outputs()]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        sampling: SamplingSettings | None = None,
    ) -> Iterator[Tokens]:
        """Yield the next token of every sequence, ``[batch]``, until all have ended.

        A sequence that has ended gets the padding token while others go on.

        Args:
            prompt: see :func:`align_left_padded`.
            max_new_tokens: at most so many; up to 256 within the model's positions when None.
            eos_token_id: what ends a sequence; the model's own when None, nothing if an empty list.
            pad_token_id: what follows the end; the model's own when None.
            sampling: how tokens are chosen; the most likely one when None.

        Raises:
            UsageError: at once, if the text would be longer than the model's positions or a value is out of range.
        """
        length = prompt.tokens.shape[1]
        count = self._count(length, max_new_tokens)
        ends = self.record.eos_token_ids if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()
        padding = self.record.pad_token_id if pad_token_id is None else pad_token_id
        return self._tokens(prompt, count, ends, padding, Sampler(sampling or SamplingSettings()))

    def _tokens(
        self, prompt: Prompt, count: int, ends: Sequence[int], padding: int, sampler: Sampler
    ) -> Iterator[Tokens]:
        memory = Memory(self.record, prompt.tokens, prompt.mask)
        logits = self.prefill(memory)
        ended = np.zeros(len(prompt.tokens), dtype=bool)
        for number in range(count):
            chosen = np.where(ended, padding, sampler.choose(logits, memory.tokens, memory.mask))
            ended |= np.isin(chosen, ends)
            yield chosen
            if ended.all() or number + 1 == count:
                return
            logits = self.step(memory, chosen)

    def prefill(self, memory: Memory) -> NDArray[np.float32]:
        """Run the prompt; logits of what follows it, ``[batch, vocabulary]``."""
        if memory.tokens.shape[1] == 1:
            return self._run_step(memory, memory.last_feeds())
        outputs = self.run(memory.tokens, memory.mask, _positions(memory.mask), memory.prompt_feeds())
        memory.keep_prompt(outputs)
        return _last(outputs)

    def step(self, memory: Memory, tokens: Tokens) -> NDArray[np.float32]:
        """Run one more token of each sequence, ``[batch]``; logits of what follows it, ``[batch, vocabulary]``."""
        return self._run_step(memory, memory.step_feeds(tokens))

    def _run_step(self, memory: Memory, feeds: dict[str, Any]) -> NDArray[np.float32]:
        places = memory.mask.sum(axis=1, keepdims=True, dtype=np.int64) - 1
        outputs = self.run(memory.tokens[:, -1:], np.ones_like(memory.mask[:, -1:]), places, feeds)
        memory.keep_step(outputs)
        return _last(outputs)

    def run(self, tokens: Tokens, mask: Mask, positions: Tokens, caches: dict[str, Any]) -> dict[str, Any]:
        """Run the graph once; its outputs by name.

        Args:
            tokens, mask, positions: ``[batch, length]``; left out where the graph does not take them.
            caches: all that the graph takes beside them.

        Raises:
            EffcError: if ONNX Runtime fails.
        """
        feeds = self._feeds(tokens, mask, positions, caches)
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own.
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise EffcError(
                f"ONNX Runtime failed on {tokens.shape[1]} tokens of {len(tokens)} sequences: {first}.",
                "If memory ran out, give fewer or shorter prompts.",
            ) from error

    def _feeds(self, tokens: Tokens, mask: Mask, positions: Tokens, caches: dict[str, Any]) -> dict[str, NDArray[Any]]:
        feeds = _all_feeds(tokens, mask, positions, caches)
        return {name: np.ascontiguousarray(value) for name, value in feeds.items() if name in self._inputs}

    def _count(self, length: int, wanted: int | None) -> int:
        """How many tokens to write.

        Raises:
            UsageError: if there is no room for them.
        """
        if wanted is not None and wanted < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {wanted}.", "Leave it out for up to 256.")
        if self._max_length is None:
            return wanted or _NEW_TOKENS
        room = self._max_length - length
        if room < 1:
            raise UsageError(
                f"The prompt has {length} tokens, and the model has {self._max_length} positions in all.",
                f"Keep at most {self._max_length - 1} tokens of it.",
            )
        if wanted is not None and wanted > room:
            raise UsageError(
                f"{length} tokens of prompt and {wanted} new ones are more than the {self._max_length} positions of "
                "the model.",
                f"Ask for at most {room} new tokens, or shorten the prompt.",
            )
        return wanted or min(_NEW_TOKENS, room)


def example_step(record: GenerationRecord) -> dict[str, NDArray[Any]]:
    """Feeds for one token with nothing before it; positions and mask are there even if the graph does not take them."""
    tokens, mask = np.zeros((1, 1), np.int64), np.ones((1, 1), dtype=bool)
    return _all_feeds(tokens, mask, _positions(mask), Memory(record, tokens, mask).last_feeds())


def align_left_padded(tokens: Tokens, mask: Mask | None) -> Prompt:
    """Put padding in front of each prompt, wherever it was: behind it, it would part the prompt from its reply.

    Args:
        tokens: ``[batch, length]``.
        mask: ``[batch, length]``, False for padding; None if there is none.

    Raises:
        UsageError: if a prompt is nothing but padding.
    """
    if mask is None or mask.all():
        return Prompt(tokens, np.ones(tokens.shape, dtype=bool))
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise UsageError(f"Prompt {empty[0]} of the batch is nothing but padding.", "Leave it out.")
    # Stable, so that both padding and tokens keep their order.
    order = np.argsort(mask, axis=1, kind="stable")
    return Prompt(np.take_along_axis(tokens, order, axis=1), np.take_along_axis(mask, order, axis=1))


def generation_record(manifest: Manifest) -> GenerationRecord:
    """What an artifact says of its generating graph.

    Raises:
        UsageError: if it has none; says why.
    """
    if manifest.generation is not None:
        return manifest.generation
    if manifest.source.task != "causal-lm":
        raise UsageError(
            f"This artifact is for {manifest.source.task}, so it writes no text.",
            "Compile a causal language model, such as Llama, Qwen or GPT-2.",
        )
    reasons = [skip.reason for record in manifest.passes if record.name == "generation" for skip in record.skipped]
    if reasons:
        raise UsageError(
            f"This artifact cannot generate: {reasons[0]}", "Use another --attn, or run it token by token."
        )
    if manifest.engines is not None and manifest.engines.writes:
        raise UsageError(
            "This artifact writes text with engines, and has no graph for it that a CPU could run.",
            "Load it where the GPU is: effc.load(...).generate(...), or compile with --target=onnxruntime.",
        )
    raise UsageError(
        "This artifact was compiled without its generating graph.", "Compile it again without --no-generation."
    )


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], SamplingSettings]:
    """Arguments of :meth:`Generator.stream`, and how tokens are chosen.

    Raises:
        UsageError: on an unknown option, naming the nearest known one, or a value out of range.
    """
    sampling = [field.name for field in fields(SamplingSettings)]
    for name in options:
        if name not in (*_OPTIONS, *sampling):
            raise UsageError(f"There is no option '{name}'.", did_you_mean(name, [*_OPTIONS, *sampling]))
    chosen = SamplingSettings(**{name: value for name, value in options.items() if name in sampling})
    return {name: value for name, value in options.items() if name in _OPTIONS}, chosen


def tell(streamer: Streamer | Callable[[Any], Any] | None, value: Any) -> None:
    """Hand tokens to a streamer of transformers, or to a function."""
    put: Any = getattr(streamer, "put", streamer)
    if put is not None:
        put(value)


def _all_feeds(tokens: Tokens, mask: Mask, positions: Tokens, caches: Mapping[str, Any]) -> dict[str, Any]:
    return {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "position_ids": positions, **caches}


def _last(outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    return np.asarray(outputs["logits"][:, -1], dtype=np.float32)


def _positions(mask: Mask) -> Tokens:
    """Each token's place among those that are no padding."""
    return np.asarray(np.maximum(mask.cumsum(axis=1, dtype=np.int64) - 1, 0))
