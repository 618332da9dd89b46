"""Reading texts in every format, saying what is wrong with a file, and turning texts into batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import VOCABULARY, save, tokenizer

from effc.compiler.data import (
    FORMATS,
    Sample,
    class_ids,
    padding_tokenizer,
    random_batches,
    read_samples,
    tokenize,
    word_class_ids,
)
from effc.compiler.recipe import ModelSection
from effc.compiler.source import load, locate
from effc.errors import DataError


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


# Reading


def test_plain_text_is_one_sample_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "first\n\n  second line \nthird, käse\n")
    assert read_samples(file) == [Sample("first"), Sample("second line"), Sample("third, käse")]


@pytest.mark.parametrize("column", ["text", "sentence", "sentence1", "content"])
def test_json_lines(tmp_path: Path, column: str) -> None:
    rows = [{column: "one", "label": 1}, {column: "two", "label": "good", "other": [1]}, {column: "three"}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_samples(file) == [Sample("one", 1), Sample("two", "good"), Sample("three")]


def test_json_list(tmp_path: Path) -> None:
    rows = [{"sentence1": "one", "sentence2": "uno", "label": 0}, {"sentence1": "two", "sentence2": "tres", "label": 1}]
    expected = [Sample("one", 0, "uno"), Sample("two", 1, "tres")]
    assert read_samples(write(tmp_path / "a.json", json.dumps(rows))) == expected
    assert read_samples(write(tmp_path / "b.json", json.dumps({"data": rows}))) == expected
    assert read_samples(write(tmp_path / "c.json", '["one", "two"]')) == [Sample("one"), Sample("two")]


def test_tables_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    long = "word " * 40_000
    file = write(tmp_path / "a.csv", f'\ufefftext,label,source\n"say ""yes"", \nthen no",1,x\n{long},0,y\n')
    assert read_samples(file) == [Sample('say "yes", \nthen no', "1"), Sample(long, "0")]
    assert read_samples(write(tmp_path / "a.tsv", "content\tlabel\na,b\tgood\n")) == [Sample("a,b", "good")]


def test_words_with_a_label_each(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"tokens": ["a", "film"], "ner_tags": [0, 1]}')
    assert read_samples(file) == [Sample("a film", (0, 1), words=("a", "film"))]


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", "two"], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "one")
    assert read_samples(tmp_path / "one") == [Sample("one", 0), Sample("two", 1)]
    splits = {"train": datasets.Dataset.from_dict({"text": ["no"]}), "test": datasets.Dataset.from_dict(rows)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    assert read_samples(tmp_path / "splits") == [Sample("one", 0), Sample("two", 1)]


def test_a_limit_takes_a_random_choice_in_file_order(tmp_path: Path) -> None:
    # Sorted by label, as many files are: the first samples alone would all be of one class.
    rows = [{"text": f"text {number}", "label": number // 500} for number in range(1000)]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    chosen = read_samples(file, 100, seed=1)
    assert len(set(chosen)) == 100
    assert 30 < sum(sample.label == 0 for sample in chosen) < 70
    numbers = [int(sample.text.split()[1]) for sample in chosen]
    assert numbers == sorted(numbers)
    assert read_samples(file, 100, seed=1) == chosen != read_samples(file, 100, seed=2)
    assert len(read_samples(file, 5000)) == 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no texts"),
        ("a.txt", "\n \n", "holds no texts"),
        ("a.jsonl", "", "holds no texts"),
        ("a.csv", "text,label\n", "holds no texts"),
        ("a.csv", "review,stars\nfine,5\n", "columns are 'review', 'stars'.*text, sentence, sentence1, content"),
        ("a.jsonl", '{"title": "x"}', "columns are 'title'.*text, sentence"),
        ("a.jsonl", '{"text": "fine"}\n{"text": 3}', "row 2 .*is int, not text"),
        ("a.jsonl", '{"text": "fine"}\n{"text": ', "Line 2 of .*is not JSON"),
        ("a.jsonl", "[1, 2]", "Row 1 .*is no object but list"),
        ("a.json", '{"text": "fine"}', "does not hold a list"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "is not JSON.*named .jsonl"),
        ("a.xlsx", "text", "format.*" + FORMATS[0]),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        read_samples(write(tmp_path / name, content))
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_missing_binary_and_foreign_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        read_samples(tmp_path / "nowhere.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_samples(tmp_path / "a.txt")
    with pytest.raises(DataError, match="save_to_disk"):
        read_samples(tmp_path)


# Labels


def test_labels_by_number_name_and_text() -> None:
    names = {0: "Negative", 1: "Positive"}
    samples = [Sample("a", 1), Sample("b", "negative"), Sample("c", "POSITIVE"), Sample("d", "0")]
    assert class_ids(samples, names) == [1, 0, 1, 0]


@pytest.mark.parametrize("label", [2, -1, "neutral", "2", (0, 1)])
def test_labels_that_the_model_does_not_know(label: Any) -> None:
    with pytest.raises(DataError, match=r"The label .*0 \(Negative\), 1 \(Positive\)"):
        class_ids([Sample("a", 0), Sample("b", label)], {0: "Negative", 1: "Positive"})


def test_labels_must_be_complete() -> None:
    with pytest.raises(DataError, match="Label all of them"):
        class_ids([Sample("a", 0), Sample("b")], {0: "x", 1: "y"})
    with pytest.raises(DataError, match="Sample 1 has 2 words and 1 labels"):
        word_class_ids([Sample("a b", (0,), words=("a", "b"))], {0: "x"})
    assert word_class_ids([Sample("a b", ("y", 0), words=("a", "b"))], {0: "x", 1: "Y"}) == [[1, 0]]


# Batches


SAMPLES = [Sample("the film was good"), Sample("bad"), Sample("a great plot and great acting but very dull story")]


def test_batches_are_what_the_tokenizer_makes_of_the_texts() -> None:
    first, second = tokenize(SAMPLES, tokenizer(), max_length=8, batch_size=2)
    assert set(first) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(array.dtype == np.int64 for array in first.values())
    words = [[VOCABULARY[token] for token in row] for row in first["input_ids"]]
    assert words[0] == ["[CLS]", "the", "film", "was", "good", "[SEP]"]
    assert words[1] == ["[CLS]", "bad", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert first["attention_mask"].sum(axis=1).tolist() == [6, 3]
    # Truncated, with the closing token in place.
    assert second["input_ids"].shape == (1, 8)
    assert VOCABULARY[second["input_ids"][0, -1]] == "[SEP]"


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers() -> None:
    left = tokenizer()
    left.padding_side = "left"
    (batch,) = tokenize(SAMPLES, left, max_length=None)
    assert (batch["attention_mask"][:, 0] == 1).all()
    assert left.padding_side == "left"


def test_pairs_get_segments() -> None:
    (batch,) = tokenize([Sample("the film", pair="was good"), Sample("bad", pair="")], tokenizer(), 64)
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_batches_hold_the_inputs_of_the_model() -> None:
    (batch,) = tokenize(SAMPLES, tokenizer(), 64, input_names=("input_ids", "attention_mask"))
    assert list(batch) == ["input_ids", "attention_mask"]
    plain = tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    (batch,) = tokenize(SAMPLES, plain, 64, input_names=("input_ids", "attention_mask", "token_type_ids"))
    assert not batch["token_type_ids"].any()
    with pytest.raises(DataError, match="'pixel_values'"):
        next(tokenize(SAMPLES, tokenizer(), 64, input_names=("pixel_values",)))


def test_torch_tensors() -> None:
    (batch,) = tokenize(SAMPLES, tokenizer(), 64, return_tensors="pt")
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.int64 for value in batch.values())


def test_a_tokenizer_without_padding_token_is_lent_one() -> None:
    plain = tokenizer()
    plain.pad_token = None
    plain.eos_token = "[SEP]"
    (batch,) = tokenize(SAMPLES, plain, 64)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == VOCABULARY.index("[SEP]")).all()
    assert plain.pad_token is None


def test_without_a_tokenizer_there_are_no_batches() -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        next(tokenize(SAMPLES, None, 64))
    from transformers import WhisperFeatureExtractor

    with pytest.raises(DataError, match="images or audio"):
        padding_tokenizer(WhisperFeatureExtractor())


def test_random_batches(tmp_path: Path) -> None:
    source = load(locate(ModelSection(path=str(save(tmp_path, "BertModel")))))
    batches = list(random_batches(source, count=10, length=32, batch_size=4, seed=5))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    lengths = np.concatenate([batch["attention_mask"].sum(axis=1) for batch in batches])
    assert lengths.max() == 32
    assert 16 <= lengths.min() < 32
    again = list(random_batches(source, count=10, length=32, batch_size=4, seed=5))
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert not np.array_equal(batches[0]["input_ids"], batches[1]["input_ids"])
