"""Reading texts in every format, saying what is wrong with a file, and turning texts into batches."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import VOCABULARY, save, tokenizer

from effc.compiler.calibration_data import CalibrationData
from effc.compiler.data import (
    FORMATS,
    Sample,
    class_ids,
    padding_tokenizer,
    random_batches,
    read_samples,
    samples_of,
    tokenize,
    word_class_ids,
)
from effc.compiler.recipe import ModelSection, build_recipe
from effc.compiler.source import load, locate
from effc.errors import DataError, MissingDependencyError


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


# Streaming, data sets of the hub, iterables


def test_a_limit_holds_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import effc.compiler.data as data

    alive = 0

    def rows(path: object, seed: int) -> Iterator[dict[str, str]]:
        for number in range(100_000):
            yield {"text": f"text {number}"}

    real = data._drawn

    def watched(samples: Any, count: int, seed: int) -> list[Sample]:
        nonlocal alive
        assert iter(samples) is samples, "rows were read before any was drawn"
        alive = count
        return real(samples, count, seed)

    monkeypatch.setattr(data, "read_rows", rows)
    monkeypatch.setattr(data, "_drawn", watched)
    chosen = read_samples(tmp_path / "any", 50)
    assert alive == 50 and len(set(chosen)) == 50
    places = [int(sample.text.split()[1]) for sample in chosen]
    assert places == sorted(places) and 20_000 < np.median(places) < 80_000


def test_iterables_of_texts_and_rows() -> None:
    items: list[Any] = ["one", {"text": "two", "label": 1}, Sample("three"), " "]
    assert samples_of(iter(items)) == [Sample("one"), Sample("two", 1), Sample("three")]
    assert samples_of((f"text {number}" for number in itertools.count()), 2) == [Sample("text 0"), Sample("text 1")]
    with pytest.raises(DataError, match="no object but int"):
        samples_of([3])
    with pytest.raises(DataError, match="holds no texts"):
        samples_of([])


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []
    rows = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(40)]}).to_iterable_dataset()

    def load_dataset(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist on the Hub")
        return rows if split else {"train": rows, "extra": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chosen = read_samples("hf:some/name@config:train", 5)
    assert len(set(chosen)) == 5 and read_samples("hf:some/name@config:train", 5) == chosen
    assert len(read_samples("hf:other")) == 40
    assert asked[0] == ("some/name", "config", "train", True) and asked[-1] == ("other", None, None, True)
    with pytest.raises(DataError, match=r"'hf:gone' cannot be read.*doesn't exist.*hf:NAME@CONFIG:SPLIT"):
        read_samples("hf:gone")


def test_the_package_for_data_sets_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"effc\[data\]"):
        read_samples("hf:anything")


# Calibration


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(locate(ModelSection(path=str(save(tmp_path_factory.mktemp("b"), "BertModel", with_tokenizer=True)))))


def calibrated(source: Any, given: Any = None, **calibration: Any) -> Any:
    recipe = build_recipe({"quantization": {"mode": "int8", "calibration": calibration}})
    return CalibrationData(recipe, given).batches(source)


def test_calibration_texts_become_inputs(bert: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\n".join(["the film was good", "bad", "a great plot"] * 10))
    assert calibrated(bert) is None
    batches = calibrated(bert, data=str(file), samples=5, max_length=16)
    assert sum(len(batch["input_ids"]) for batch in batches) == 5
    assert set(batches[0]) == {"input_ids", "attention_mask", "token_type_ids"}
    again = calibrated(bert, data=str(file), samples=5, max_length=16)
    assert np.array_equal(batches[0]["input_ids"], again[0]["input_ids"])
    from_iterable = calibrated(bert, (text for text in ["the film was good", "bad"]), max_length=16)
    assert from_iterable[0]["input_ids"].shape == (2, 6)


def test_packed_samples_are_full(bert: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\n".join(["the film was good", "bad", "a great plot"] * 10))
    batches = calibrated(bert, data=str(file), samples=4, max_length=12, packed=True)
    assert len(batches) == 4
    assert all(batch["input_ids"].shape == (1, 12) and batch["attention_mask"].all() for batch in batches)
    separators = sum(int((batch["input_ids"] == VOCABULARY.index("[SEP]")).sum()) for batch in batches)
    assert 8 <= separators <= 16
    with pytest.raises(DataError, match=r"hold \d+ tokens together, less than one packed sample of 60"):
        calibrated(bert, ["bad"], max_length=60, packed=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": None}, "lacks the model input 'attention_mask'"),
        ({"input_ids": np.full((2, 5), 999)}, "values up to 999, and the model knows 0 to 31"),
        ({"input_ids": np.ones((2, 5), np.float32)}, "is float32"),
        ({"input_ids": np.ones(5, np.int64)}, r"int64 \[5\], and the model takes int64 \['batch', 'sequence'\]"),
        ({"input_ids": np.ones((1, 70), np.int64)}, "70 tokens, and the model takes 64"),
    ],
)
def test_inputs_that_do_not_fit_the_model(bert: Any, changes: dict[str, Any], message: str) -> None:
    plain = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    plain["token_type_ids"][:] = 0
    assert calibrated(bert, [plain])
    with pytest.raises(DataError, match=f"(?s){message}"):
        calibrated(bert, [{name: value for name, value in {**plain, **changes}.items() if value is not None}])
