"""Remove tokens that a corpus never uses: tokenizer, embeddings and output head are renumbered together.

Every text of the corpus is tokenized as before, and the model computes the same on it; only the probabilities of tokens
that are gone are missing from a language model's output. Other texts are written in smaller pieces where a token of
theirs is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from effc.errors import PassFailedError, PreconditionError
from effc.passes.base import Pass, PassResult
from effc.passes.prune_config import inner_configs
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_tokenizer import needed_tokens, pruned_state, rebuild, tokenizer_state, used_tokens

# Texts of the corpus that are tokenized by both tokenizers and compared.
_COMPARED = 256
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


class PruneVocabulary(Pass[PreTrainedModel, PreTrainedModel]):
    """Leave the tokens of a corpus, and those that a tokenizer cannot do without.

    Args:
        settings: the entry of the recipe's ``prune`` list.
        tokenizer: the model's; it stays as it is.
        texts: the corpus.

    Attributes:
        tokenizer: the pruned one, once it has run.
        kept: the old ids of its tokens, in the order of the new ones.
    """

    name: ClassVar[str] = "prune-vocab"
    version: ClassVar[int] = 1

    def __init__(self, settings: PruneStep, tokenizer: Any | None, texts: Sequence[str]) -> None:
        self.settings: PruneStep = settings
        self.tokenizer = tokenizer
        self.kept: list[int] = []
        self._used: set[int] = set()
        self._before, self._texts = tokenizer, list(texts)

    def requires(self, model: PreTrainedModel) -> None:
        """There must be a fast tokenizer and an embedding table that belongs to it.

        Raises:
            PreconditionError: saying what is missing.
        """
        if model.main_input_name != "input_ids" or self._before is None:
            what = "reads no text" if model.main_input_name != "input_ids" else "has no tokenizer"
            raise PreconditionError(f"{type(model).__name__} {what}.", "Leave vocab out of --prune.")
        tokenizer_state(self._before)
        if _rows(model) < len(self._before):
            raise PreconditionError(
                f"The tokenizer knows {len(self._before)} tokens and the model {_rows(model)}.",
                "Use the tokenizer that belongs to the model.",
            )

    def choose(self, model: PreTrainedModel) -> list[int]:
        """The old ids of the tokens that stay; changes nothing yet."""
        self.requires(model)
        self._used = used_tokens(self._before, self._texts)
        special = {number for number in _special_ids(model) if 0 <= number < _rows(model)}
        self.kept = sorted(needed_tokens(tokenizer_state(self._before), self._used | special) | special)
        _check_padding(model, self.new_ids)
        return self.kept

    @property
    def new_ids(self) -> dict[int, int]:
        """New ids by old ones."""
        return {old: number for number, old in enumerate(self.kept)}

    def run(self, model: PreTrainedModel) -> PassResult[PreTrainedModel]:
        """Renumber model and tokenizer; the model in place."""
        if not self.kept:
            self.choose(model)
        before, rows, new = sum(parameter.numel() for parameter in model.parameters()), _rows(model), self.new_ids
        assert self._before is not None
        self.tokenizer = rebuild(self._before, pruned_state(tokenizer_state(self._before), self.kept), new)
        changed = _prune_tables(model, rows, torch.tensor(self.kept))
        for config in (model.config, *inner_configs(model), getattr(model, "generation_config", None)):
            if config is not None:
                _renumber_config(config, rows, len(self.kept), new)
        metrics = {
            "parameters_before": before,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens_before": rows,
            "tokens": len(self.kept),
            "tokens_in_corpus": len(self._used),
            "texts": len(self._texts),
        }
        return PassResult(model, len(self.kept) < rows, changed, metrics=metrics)

    def ensures(self, model: PreTrainedModel) -> None:
        """The corpus must be tokenized as before, and the tables must have a row for every token.

        Raises:
            PassFailedError: if not.
        """
        assert self.tokenizer is not None and self._before is not None
        if _rows(model) != len(self.kept) or len(self.tokenizer) > len(self.kept):
            raise PassFailedError(
                f"The pruned tokenizer has {len(self.tokenizer)} tokens for {_rows(model)} rows.", "Report this model."
            )
        new = self.new_ids
        step = max(1, len(self._texts) // _COMPARED)
        for text in self._texts[::step][:_COMPARED]:
            expected = [new[old] for old in self._before(text, truncation=False, verbose=False)["input_ids"]]
            if self.tokenizer(text, truncation=False, verbose=False)["input_ids"] != expected:
                raise PassFailedError(
                    f"The pruned tokenizer reads a text of the corpus otherwise than before: {text[:60]!r}.",
                    "Leave vocab out of --prune, and report this model.",
                )


def _rows(model: PreTrainedModel) -> int:
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def _special_ids(model: PreTrainedModel) -> set[int]:
    """Token ids that configs speak of."""
    found: set[int] = set()
    for config in (model.config, *inner_configs(model), getattr(model, "generation_config", None)):
        for key, value in ({} if config is None else config.to_dict()).items():
            if key.endswith("_token_id") and value is not None:
                found.update(value if isinstance(value, list) else [value])
    return {number for number in found if isinstance(number, int)}


def _check_padding(model: PreTrainedModel, new: dict[int, int]) -> None:
    """RoBERTa and its kin count positions from the padding token's id on, which therefore must stay."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            old = module.padding_idx
            if new.get(old) != old:
                raise PreconditionError(
                    f"{type(model).__name__} counts positions from its padding token {old}, which would be renumbered.",
                    "Leave vocab out of --prune.",
                )


def _prune_tables(model: PreTrainedModel, rows: int, kept: torch.Tensor) -> list[str]:
    """Take rows out of every table that has one per token; weights that were shared stay shared."""
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shared = {id(table.weight)} | ({id(head.weight)} if head is not None else set())
    if head is not None and head.weight.shape[0] != rows:
        raise PreconditionError(
            f"The head of {type(model).__name__} has {head.weight.shape[0]} rows and its embeddings {rows}.",
            "Leave vocab out of --prune.",
        )
    if head is not None and head._parameters.get("bias") is not None:
        shared.add(id(head.bias))
    made: dict[int, nn.Parameter] = {}
    changed = []
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or parameter.shape[0] != rows:
                continue
            own_table = isinstance(module, nn.Embedding) and key == "weight" and _reads_tokens(name)
            if id(parameter) in shared or own_table or (key == "bias" and "predictions" in name):
                if id(parameter) not in made:
                    values = parameter.data[kept].clone()
                    made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                module.register_parameter(key, made[id(parameter)])
                changed.append(f"{name}.{key}".lstrip("."))
                _resize(module, rows, kept)
        if vars(module).get("vocab_size") == rows:
            vars(module)["vocab_size"] = len(kept)
        buffer = module._buffers.get("final_logits_bias")
        if buffer is not None and buffer.shape[-1] == rows:
            module.register_buffer("final_logits_bias", buffer[..., kept].clone())
    return changed


def _reads_tokens(name: str) -> bool:
    return name.endswith(("word_embeddings", "embed_tokens", "tok_embeddings", "shared", "wte", "embed_in"))


def _resize(module: nn.Module, rows: int, kept: torch.Tensor) -> None:
    for key in ("num_embeddings", "out_features", "vocab_size"):
        if vars(module).get(key) == rows:
            setattr(module, key, len(kept))
    padding = vars(module).get("padding_idx")
    if padding is not None:
        vars(module)["padding_idx"] = int((kept == padding).nonzero()[0])


def _renumber_config(config: Any, rows: int, size: int, new: dict[int, int]) -> None:
    for key, value in list(config.to_dict().items()):
        if key == "vocab_size" and value == rows and isinstance(config, PreTrainedConfig):
            config.vocab_size = size
        elif key.endswith("_token_id") and value is not None:
            setattr(config, key, [new[old] for old in value] if isinstance(value, list) else new.get(value, value))
        elif key in _LISTS and isinstance(value, list) and all(isinstance(old, int) for old in value):
            setattr(config, key, [new[old] for old in value if old in new])
