"""Tokens that a corpus never uses: tokenizer, embeddings, head and config are renumbered together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_checkpoints
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from effc.compiler.data import Sample, tokenize
from effc.compiler.verify_vocabulary import OwnTokens, split_texts
from effc.errors import PassFailedError, PreconditionError
from effc.passes import prune_vocabulary
from effc.passes.prune_settings import PruneStep
from effc.passes.prune_tokenizer import needed_tokens, pruned_state, rebuild, tokenizer_state, used_tokens
from effc.passes.prune_vocabulary import PruneVocabulary

STORY = (
    "it was a dark and stormy night and the rain fell in torrents except at occasional intervals when it was checked "
    "by a violent gust of wind which swept up the streets rattling along the housetops and fiercely agitating the "
    "scanty flame of the lamps that struggled against the darkness"
)
WORDS = STORY.split()
CORPUS = [" ".join(WORDS[:20]), " ".join(WORDS[10:25]), "The rain, and the wind!"]
OTHERS = ["struggled housetops", "naïve café 日本", "x\ty\nz", "🙂"]


def byte_level_bpe(size=400):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY, *CORPUS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([STORY, *CORPUS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def wordpiece():
    return tiny_checkpoints.tokenizer()


KINDS = {"bpe": byte_level_bpe, "unigram": unigram, "wordpiece": wordpiece}
every_kind = pytest.mark.parametrize("kind", KINDS)


def pruned(tokenizer, texts):
    state = tokenizer_state(tokenizer)
    kept = sorted(needed_tokens(state, used_tokens(tokenizer, texts)))
    new = {old: number for number, old in enumerate(kept)}
    return rebuild(tokenizer, pruned_state(state, kept), new), kept, new


@every_kind
def test_a_corpus_is_read_as_before(kind):
    before = KINDS[kind]()
    texts = CORPUS if kind != "wordpiece" else ["the film was good", "i loved the story"]
    after, kept, new = pruned(before, texts)
    assert len(kept) == len(after) < len(before)
    for text in texts:
        assert after(text)["input_ids"] == [new[old] for old in before(text)["input_ids"]]
    assert after.special_tokens_map == before.special_tokens_map
    assert after.model_max_length == before.model_max_length


@every_kind
def test_any_other_text_still_has_tokens_and_the_same_meaning(kind):
    before = KINDS[kind]()
    after, kept, _ = pruned(before, CORPUS[:1] if kind != "wordpiece" else ["the film"])
    for text in [*OTHERS, STORY]:
        ids = after(text)["input_ids"]
        assert ids and max(ids) < len(kept)
        if kind == "bpe":
            assert after.decode(ids, skip_special_tokens=True) == text
    if kind == "wordpiece":
        assert after.unk_token_id in after("loved")["input_ids"], "a word without pieces is unknown, not an error"


def test_merged_tokens_keep_the_parts_they_are_made_of():
    tokenizer = byte_level_bpe()
    state = tokenizer_state(tokenizer)
    ids = tokenizer("darkness struggled")["input_ids"]
    kept = needed_tokens(state, ids)
    names = {number: token for token, number in state["model"]["vocab"].items()}
    merges = {tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in state["model"]["merges"]}
    known = {names[number] for number in kept}
    for token in known:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        if cuts and not token.startswith("<"):
            assert any(cut in merges and set(cut) <= known for cut in cuts), token
    assert {names[i] for i in range(3, 259)} <= known, "all bytes stay"


def test_the_chat_template_keeps_its_tokens():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{% for m in messages %}rattling {{ m['role'] }} {{ m['content'] }}{% endfor %}"
    assert set(tokenizer("rattling", add_special_tokens=False)["input_ids"]) <= used_tokens(tokenizer, ["rain"])


def model_of(kind, tokenizer, **changes):
    made = tiny_checkpoints.model(kind, vocab_size=len(tokenizer) + 5, **changes)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return made.requires_grad_(False)


@pytest.mark.parametrize(
    "kind", ["BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BartModel"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_says_the_same_of_the_corpus(kind, tied):
    tokenizer = byte_level_bpe()
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
    changes = special if kind.startswith(("T5", "Bart")) else {key: special[key] for key in list(special)[:3]}
    model = model_of(kind, tokenizer, tie_word_embeddings=tied, **changes)
    inputs = tokenizer(CORPUS[:2], return_tensors="pt", padding=True)
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    made = PruneVocabulary(PruneStep(method="vocab", corpus="c"), tokenizer, CORPUS)
    extra = {} if not kind.startswith(("T5", "Bart")) else {"decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs, **extra)[0]
    result = made.run(model)
    made.ensures(model)
    new = made.tokenizer(CORPUS[:2], return_tensors="pt", padding=True)
    own = {"input_ids": new["input_ids"], "attention_mask": new["attention_mask"]}
    own |= {"decoder_input_ids": own["input_ids"]} if extra else {}
    with torch.no_grad():
        found = model(**own)[0]
    expected = expected if expected.shape == found.shape else expected[..., made.kept]
    assert torch.allclose(expected, found, atol=1e-5)
    assert model.config.vocab_size == len(made.kept) == len(made.tokenizer)
    assert result.metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {key: getattr(model.config, key) for key in changes} == {
        key: made.new_ids[old] for key, old in changes.items()
    }
    head = model.get_output_embeddings()
    if head is not None:
        assert head.weight.shape[0] == len(made.kept)
        assert (head.weight is model.get_input_embeddings().weight) == (
            tied if not kind.startswith("T5") else head.weight is model.get_input_embeddings().weight
        )


def test_a_tokenizer_that_reads_the_corpus_otherwise_is_not_let_through(monkeypatch):
    tokenizer = byte_level_bpe()
    model = model_of("LlamaForCausalLM", tokenizer)
    right = prune_vocabulary.needed_tokens
    monkeypatch.setattr(prune_vocabulary, "needed_tokens", lambda state, used: set(sorted(right(state, used))[:-30]))
    made = PruneVocabulary(PruneStep(method="vocab", corpus="c"), tokenizer, CORPUS)
    made._before = tokenizer
    with pytest.raises((PassFailedError, KeyError)):
        made.run(model)
        made.ensures(model)


def test_models_and_tokenizers_that_do_not_fit_are_refused():
    tokenizer = byte_level_bpe()
    step = PruneStep(method="vocab", corpus="c")
    with pytest.raises(PreconditionError, match="reads no text"):
        PruneVocabulary(step, tokenizer, CORPUS).run(tiny_checkpoints.model("ViTModel"))
    with pytest.raises(PreconditionError, match="tokenizer knows"):
        PruneVocabulary(step, tokenizer, CORPUS).run(tiny_checkpoints.model("BertModel"))
    with pytest.raises(PreconditionError, match="no tokenizer"):
        PruneVocabulary(step, None, CORPUS).run(tiny_checkpoints.model("BertModel"))


def test_positions_that_count_from_the_padding_token_stay_right():
    tokenizer = byte_level_bpe()
    model = model_of("RobertaForMaskedLM", tokenizer, pad_token_id=350, max_position_embeddings=400)
    with pytest.raises(PreconditionError, match="counts positions from its padding token"):
        PruneVocabulary(PruneStep(method="vocab", corpus="c"), tokenizer, CORPUS[:1]).run(model)


def test_comparison_finds_the_texts_that_both_read_alike():
    before = byte_level_bpe()
    after, kept, new = pruned(before, CORPUS[:1])
    source = type("Source", (), {"processor": before})()
    same, others = split_texts([Sample(text) for text in (CORPUS[0], STORY)], source, after, kept, 64)
    assert [sample.text for sample in same] == CORPUS[:1] and [sample.text for sample in others] == [STORY]
    batch = next(tokenize([*same, *others], before, 64))
    own = OwnTokens(kept, tokenize([*same, *others], after, 64))
    given = own.inputs(batch, batch)
    assert own.same_rows(batch, given) == [0]
    length = int(batch["attention_mask"][0].sum())
    assert given["input_ids"][0, :length].tolist() == [new[old] for old in batch["input_ids"][0, :length]]
    hidden = {"last_hidden_state": np.arange(2 * batch["input_ids"].shape[1])[:, None].reshape(2, -1, 1)}
    mine = {"last_hidden_state": np.zeros((2, given["input_ids"].shape[1], 1))}
    ((expected, actual, mask),) = own.comparable("last_hidden_state", batch, given, hidden, mine)
    assert expected.shape == actual.shape == (length, 1) and mask is None


def test_a_saved_tokenizer_loads_again(tmp_path):
    after, kept, _ = pruned(byte_level_bpe(), CORPUS)
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(STORY)["input_ids"] == after(STORY)["input_ids"] and len(again) == len(kept)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
