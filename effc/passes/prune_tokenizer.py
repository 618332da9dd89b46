"""Take tokens out of a fast tokenizer so that every text that needs none of them is tokenized as before.

For WordPiece, Unigram and WordLevel it is enough to take the entries away: what they leave is still the best choice. In
BPE a token is made by merging smaller ones, so those stay, too; a merge that no kept token is made by never happened in
a text of kept tokens. Single characters, bytes and all special tokens stay, so that any text that could be written in
tokens still can.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from effc.errors import PreconditionError

_TOKENIZER_FILE, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# Other forms of the vocabulary, which would contradict the pruned one.
_OTHER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "*.model")
_BATCH = 64
_KINDS = ("WordPiece", "WordLevel", "BPE", "Unigram")


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """All of a fast tokenizer, as its ``tokenizer.json`` holds it.

    Raises:
        PreconditionError: if it is no fast tokenizer, or of a kind that effc cannot prune.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PreconditionError(
            f"{type(tokenizer).__name__} is no fast tokenizer, so its vocabulary cannot be pruned.",
            "Use a checkpoint with a tokenizer.json, or leave vocab out of --prune.",
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    if state["model"]["type"] not in _KINDS:
        raise PreconditionError(
            f"A tokenizer of the kind {state['model']['type']} cannot be pruned.", "Leave vocab out of --prune."
        )
    return state


def used_tokens(tokenizer: Any, texts: Sequence[str]) -> set[int]:
    """The ids that occur in texts, and in the tokenizer's own chat template."""
    found: set[int] = set()
    for start in range(0, len(texts), _BATCH):
        for ids in tokenizer(list(texts[start : start + _BATCH]), truncation=False, verbose=False)["input_ids"]:
            found.update(ids)
    if getattr(tokenizer, "chat_template", None):
        found.update(_template_tokens(tokenizer))
    return found


def needed_tokens(state: Mapping[str, Any], used: Iterable[int]) -> set[int]:
    """``used``, and what else a tokenizer needs: special tokens, characters and bytes, and parts of merged tokens."""
    model = state["model"]
    ids = vocabulary(state)
    names = {number: token for token, number in ids.items()}
    kept = {number for number in used if number in names}
    kept |= {entry["id"] for entry in state.get("added_tokens", ())}
    unknown = model.get("unk_token") if model["type"] != "Unigram" else None
    if unknown in ids:
        kept.add(ids[unknown])
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    kept |= {number for token, number in ids.items() if _is_atom(token, prefix, suffix)}
    if model["type"] == "BPE":
        kept |= _parts(model, {names[number] for number in kept if number in names}, ids, prefix, suffix)
    return kept


def vocabulary(state: Mapping[str, Any]) -> dict[str, int]:
    """Token to id, without tokens that were added to the model's own."""
    model = state["model"]
    if model["type"] == "Unigram":
        return {entry[0]: number for number, entry in enumerate(model["vocab"])}
    return dict(model["vocab"])


def pruned_state(state: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The tokenizer with the ids ``kept`` alone, renumbered in that order."""
    result = copy.deepcopy(dict(state))
    new = {old: number for number, old in enumerate(kept)}
    model = result["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        tokens = sorted(((new[old], token) for token, old in model["vocab"].items() if old in new))
        model["vocab"] = {token: number for number, token in tokens}
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        known = model["vocab"]
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(part in known for part in _pair(merge)) and _merged(*_pair(merge), prefix) in known
        ]
    for entry in result.get("added_tokens", ()):
        entry["id"] = new[entry["id"]]
    _renumber(result.get("post_processor"), new)
    if result.get("padding"):
        result["padding"]["pad_id"] = new[result["padding"]["pad_id"]]
    return result


def rebuild(tokenizer: Any, state: Mapping[str, Any], new: Mapping[int, int]) -> Any:
    """A tokenizer like ``tokenizer``, of another state; ``new`` maps old ids to new ones."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        tokenizer.save_pretrained(directory)
        for pattern in _OTHER_FILES:
            for file in directory.glob(pattern):
                file.unlink()
        (directory / _TOKENIZER_FILE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        path = directory / _CONFIG_FILE
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if "added_tokens_decoder" in config:
                entries = {int(old): entry for old, entry in config["added_tokens_decoder"].items()}
                config["added_tokens_decoder"] = {str(new[old]): entry for old, entry in entries.items() if old in new}
            path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(directory)


def _is_atom(token: str, prefix: str, suffix: str) -> bool:
    """Whether a token is a single character, in any place of a word, or a byte."""
    if len(token) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">")):
        return True
    bare = token.removeprefix(prefix) if prefix else token
    bare = bare.removesuffix(suffix) if suffix else bare
    return len(bare) == 1


def _parts(
    model: Mapping[str, Any], tokens: Collection[str], ids: Mapping[str, int], prefix: str, suffix: str
) -> set[int]:
    """The ids of all tokens that occur while ``tokens`` are merged from characters."""
    ranks = {_pair(merge): number for number, merge in enumerate(model["merges"])}
    found: set[int] = set()
    for token in tokens:
        for part in _derivation(token, ranks, prefix, suffix):
            if part in ids:
                found.add(ids[part])
    return found


def _derivation(token: str, ranks: Mapping[tuple[str, str], int], prefix: str, suffix: str) -> list[str]:
    """Every part that byte-pair encoding makes on the way to ``token``."""
    bare = token.removesuffix(suffix) if suffix else token
    bare = bare.removeprefix(prefix) if prefix else bare
    if not bare:
        return []
    starts_inside = bool(prefix) and token.startswith(prefix)
    parts = [(prefix if prefix and (number or starts_inside) else "") + letter for number, letter in enumerate(bare)]
    if suffix and token.endswith(suffix):
        parts[-1] += suffix
    seen = list(parts)
    while len(parts) > 1:
        pairs = [(ranks.get(pair, -1), place) for place, pair in enumerate(pairwise(parts))]
        rank, place = min(((rank, place) for rank, place in pairs if rank >= 0), default=(-1, -1))
        if rank < 0:
            break
        parts[place : place + 2] = [_merged(parts[place], parts[place + 1], prefix)]
        seen.append(parts[place])
    return seen


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _merged(first: str, second: str, prefix: str) -> str:
    return first + (second.removeprefix(prefix) if prefix else second)


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Ids inside a post-processor, which puts special tokens around a text."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, new)
    for entry in processor["special_tokens"].values() if "special_tokens" in processor else ():
        entry["ids"] = [new[old] for old in entry["ids"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            processor[key] = [processor[key][0], new[processor[key][1]]]


def _template_tokens(tokenizer: Any) -> set[int]:
    found: set[int] = set()
    roles = (("system", "user", "assistant"), ("user", "assistant"), ("user",))
    for turns in roles:
        messages = [{"role": role, "content": " "} for role in turns]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            # Templates refuse roles and orders with errors of their own.
            continue
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found
