"""From a prompt to text, with the tokenizer that lies in the artifact."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.compiler.compiled_model import CompiledModel
from effc.errors import MissingDependencyError, OutputError, UsageError

# Bytes that do not make a character yet are shown as this.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Written:
    """A finished text.

    Attributes:
        text: without the prompt.
        prompt_tokens, new_tokens: how many.
        first_token_s: seconds from the start to the first token, which takes in the whole prompt.
        tokens_per_s: of the tokens behind the first; None if there are none.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    tokens_per_s: float | None


def write_text(
    model: CompiledModel,
    prompt: str,
    *,
    chat: bool = False,
    told: Callable[[str], Any] | None = None,
    **options: Any,
) -> Written:
    """Write on from ``prompt``.

    Args:
        chat: the prompt is what a user says, to be put into the tokenizer's chat template.
        told: called with each piece of text as soon as it is there.
        **options: as for :meth:`CompiledModel.stream`.

    Raises:
        UsageError: if the prompt is empty, or the artifact cannot generate.
        OutputError: if the artifact has no tokenizer.
        MissingDependencyError: if transformers is not installed.
    """
    model.generator()
    tokenizer = _tokenizer(model)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("The tokenizer of this artifact has no chat template.", "Leave --chat out.")
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        encoded = tokenizer(prompt)["input_ids"]
    ids = np.array([encoded], dtype=np.int64)
    if ids.size == 0:
        raise UsageError("The prompt is empty.", "Give some text.")
    start = time.perf_counter()
    first = start
    tokens: list[int] = []
    shown = ""
    for step in model.stream(ids, **options):
        if not tokens:
            first = time.perf_counter()
        tokens.append(int(step[0]))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith(_UNFINISHED):
            if told is not None:
                told(text[len(shown) :])
            shown = text
    end = time.perf_counter()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if told is not None and len(text) > len(shown):
        told(text[len(shown) :])
    speed = (len(tokens) - 1) / (end - first) if len(tokens) > 1 else None
    return Written(text, ids.shape[1], len(tokens), first - start, speed)


def _tokenizer(model: CompiledModel) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            "The tokenizer needs the package transformers.", "Install it: pip install transformers."
        ) from None
    try:
        return AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OutputError(
            f"'{model.path}' holds no tokenizer that can be loaded: {first}.",
            "Compile a checkpoint that has one, or use effc.load(...).generate with token ids.",
        ) from None
