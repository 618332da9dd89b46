"""One small random model per architecture family that effc's attention hook must reach, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 100
PAD = 1
# The models' own windows: total width as effc writes it, ``local:8``.
OWN_WINDOW = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 600,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}


_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    # A bias that is constant beyond a few tokens, and one that differs within every window that is tested.
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
}


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        name: as shown in test ids.
        make: builds the random model.
        causal: whether its attention looks back only.
        own: the pattern of each layer before any rewrite.
        heads: query and key-value heads.
        reads: the kind of input.
        bias: whether its self-attention adds a bias by distance.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    causal: bool = False
    own: tuple[str, ...] = ("dense", "dense")
    heads: tuple[int, int] = (4, 4)
    reads: Literal["text", "text pair", "images", "audio"] = "text"
    bias: bool = False

    @property
    def kinds(self) -> list[Literal["bidirectional", "causal", "cross"]]:
        """Of each attention module as they run: of a text pair, two in the encoder and two of one decoder layer."""
        if self.reads == "text pair":
            return ["bidirectional", "bidirectional", "causal", "cross"]
        return ["causal" if self.causal else "bidirectional"] * len(self.own)

    def model(self, implementation: str = "sdpa") -> PreTrainedModel:
        """The model in eval mode with transformers' own attention; the same weights on every call."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            # Initial weights are so small that all tokens look alike, and no mask would show in the outputs.
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
        model.set_attn_implementation(implementation)
        return model.train(False)

    def inputs(
        self, lengths: Sequence[int], side: Literal["left", "right"] = "right", seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """One sequence of each length, padded on ``side``; images and audio have one size and no padding."""
        generator = torch.Generator().manual_seed(seed)
        if self.reads == "images":
            return {"pixel_values": torch.randn(len(lengths), 3, 32, 32, generator=generator)}
        if self.reads == "audio":
            return {"input_features": torch.randn(len(lengths), 8, 160, generator=generator)}
        result = _padded(lengths, side, generator)
        if self.reads == "text pair":
            target = _padded([length // 2 + 1 for length in lengths], side, generator)
            result |= {f"decoder_{name}": tensor for name, tensor in target.items()}
        return result


def _padded(
    lengths: Sequence[int], side: Literal["left", "right"], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    tokens = torch.randint(4, VOCABULARY, (len(lengths), longest), generator=generator)
    position, count = torch.arange(longest), torch.tensor(lengths)[:, None]
    real = position >= longest - count if side == "left" else position < count
    return {"input_ids": tokens.where(real, PAD), "attention_mask": real.long()}


def _of(model: str, config: str, **values: Any) -> Callable[[], PreTrainedModel]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**values))


def _encoder_of(model: str, config: str, **values: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        encoder: PreTrainedModel = _of(model, config, **values)().get_encoder()
        encoder.config.is_encoder_decoder = False
        return encoder

    return make


_SLIDING = f"local:{OWN_WINDOW}"
_BERT_LIKE = _SIZES | {"type_vocab_size": 2}

FAMILIES = {
    family.name: family
    for family in (
        Family("bert", _of("BertModel", "BertConfig", **_BERT_LIKE)),
        Family("roberta", _of("RobertaModel", "RobertaConfig", **(_SIZES | {"type_vocab_size": 1}))),
        Family(
            "distilbert",
            _of(
                "DistilBertModel",
                "DistilBertConfig",
                vocab_size=VOCABULARY,
                dim=32,
                n_layers=2,
                n_heads=4,
                hidden_dim=48,
                max_position_embeddings=600,
                pad_token_id=PAD,
            ),
        ),
        Family("electra", _of("ElectraModel", "ElectraConfig", **(_BERT_LIKE | {"embedding_size": 16}))),
        Family(
            "modernbert",
            _of(
                "ModernBertModel",
                "ModernBertConfig",
                **_SIZES,
                cls_token_id=2,
                sep_token_id=3,
                local_attention=OWN_WINDOW,
                layer_types=["full_attention", "sliding_attention"],
            ),
            own=("dense", _SLIDING),
        ),
        Family(
            "vit",
            _of(
                "ViTModel",
                "ViTConfig",
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=32,
                patch_size=4,
            ),
            reads="images",
        ),
        Family("llama", _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED), causal=True, heads=(4, 2)),
        Family("qwen3", _of("Qwen3Model", "Qwen3Config", **_GROUPED, head_dim=16), causal=True, heads=(4, 2)),
        Family(
            "gemma3",
            _of(
                "Gemma3TextModel",
                "Gemma3TextConfig",
                **(_GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": OWN_WINDOW}),
                layer_types=["sliding_attention", "full_attention"],
            ),
            causal=True,
            own=(_SLIDING, "dense"),
            heads=(4, 2),
        ),
        Family(
            "mistral",
            _of("MistralModel", "MistralConfig", **_GROUPED, sliding_window=OWN_WINDOW),
            causal=True,
            own=(_SLIDING, _SLIDING),
            heads=(4, 2),
        ),
        Family(
            "gpt2",
            _of(
                "GPT2Model",
                "GPT2Config",
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=600,
                bos_token_id=2,
                eos_token_id=3,
            ),
            causal=True,
        ),
        Family("phi3", _of("Phi3Model", "Phi3Config", **_GROUPED), causal=True, heads=(4, 2)),
        Family(
            "opt",
            _of(
                "OPTModel",
                "OPTConfig",
                **{name: value for name, value in _SIZES.items() if name != "intermediate_size"},
                ffn_dim=48,
                word_embed_proj_dim=32,
            ),
            causal=True,
        ),
        Family(
            "clip-vision",
            _of(
                "CLIPVisionModel",
                "CLIPVisionConfig",
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=32,
                patch_size=4,
            ),
            reads="images",
        ),
        Family(
            "olmo3",
            _of(
                "Olmo3Model",
                "Olmo3Config",
                **_GROUPED,
                sliding_window=OWN_WINDOW,
                layer_types=["sliding_attention", "full_attention"],
            ),
            causal=True,
            own=(_SLIDING, "dense"),
            heads=(4, 2),
        ),
        Family("t5-encoder", _encoder_of("T5Model", "T5Config", **_T5), bias=True),
        Family("t5", _of("T5Model", "T5Config", **_T5), own=("dense",) * 4, reads="text pair", bias=True),
        Family(
            "bart",
            _of("BartModel", "BartConfig", **_SEQ2SEQ, max_position_embeddings=600),
            own=("dense",) * 4,
            reads="text pair",
        ),
        Family("bart-encoder", _encoder_of("BartModel", "BartConfig", **_SEQ2SEQ, max_position_embeddings=600)),
        Family(
            "whisper-encoder",
            _encoder_of("WhisperModel", "WhisperConfig", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=80),
            reads="audio",
        ),
    )
}

# Architectures whose attention cannot be rewritten, by the name that the refusal must give.
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "MPNetModel": _of("MPNetModel", "MPNetConfig", **_SIZES),
    "DebertaV2Model": _of("DebertaV2Model", "DebertaV2Config", **_SIZES),
    "BloomModel": _of("BloomModel", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
}


def gemma2() -> PreTrainedModel:
    """Gemma 2, which caps the scores of every layer."""
    sizes = _GROUPED | {"head_dim": 16, "sliding_window": OWN_WINDOW}
    return _of("Gemma2Model", "Gemma2Config", **sizes)().train(False)
