"""What runs inside a server, without one: merging of requests, text, embeddings, routing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_artifacts import make_artifact
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import effc
from effc.compiler.artifact_files import read_manifest
from effc.compiler.feeds import TensorSpec
from effc.errors import EffcError, OutputError, UsageError
from effc.serving.backend.forward import Forward, ForwardSettings
from effc.serving.backend.heads import classify, embed, labels_of, tag
from effc.serving.backend.route import Budget, Router
from effc.serving.backend.text_stream import TextStream
from effc.serving.backend.tokens import TextEncoder, TokenizerSettings
from effc.serving.backend.version import texts
from effc.serving.backend_files import SERVER_PACKAGES, model_files, modules_of

KINDS = ("forward", "tokens", "heads", "route", "writer", "engine_writer")


def forward(directory: Path, *, mask: bool = True, max_batch: int = 8, pads: bool = True) -> Forward:
    make_artifact(directory, mask=mask)
    manifest = read_manifest(directory)
    settings = ForwardSettings(
        file="model.onnx",
        library=None,
        inputs=tuple(TensorSpec.of_record(record) for record in manifest.inputs),
        outputs=tuple(TensorSpec.of_record(record) for record in manifest.outputs),
        max_length=manifest.source.max_length,
        max_batch=max_batch,
        padding={},
        pads=pads,
    )
    assert ForwardSettings.from_json(settings.to_json()) == settings
    return Forward(directory, settings, 1, ["CPUExecutionProvider"])


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, shape)


class TestForward:
    def test_requests_share_runs_and_get_what_they_would_alone(self, tmp_path):
        model = forward(tmp_path)
        lengths = [5, 40, 6, 41, 7, 5]
        requests = [{"input_ids": ids(1 + n % 2, length, seed=n)} for n, length in enumerate(lengths)]
        together = model.run(requests)
        assert model.runs == 2, "short ones together, long ones together"
        alone = effc.load(tmp_path, native=False)
        for request, answer in zip(requests, together, strict=True):
            expected = alone(**request)
            assert not isinstance(answer, EffcError)
            actual, wanted = answer["last_hidden_state"], expected["last_hidden_state"]
            assert actual.shape == wanted.shape
            # The INT8 product takes its range from the whole batch; a key from the padding would cost far more.
            assert np.linalg.norm(actual - wanted) < 0.03 * np.linalg.norm(wanted)

    def test_only_outputs_that_somebody_wants_leave_the_session(self, tmp_path):
        model = forward(tmp_path)
        requests = [{"input_ids": ids(1, length)} for length in (5, 6, 40)]
        whole, runs = model.run(requests), []
        run = model.session.run
        model.session = SimpleNamespace(run=lambda names, feeds: runs.append(names) or run(names, feeds))
        first, second, third = model.run(requests, [["pooler_output"], ["last_hidden_state"], ["pooler_output"]])
        assert runs == [["last_hidden_state", "pooler_output"], ["pooler_output"]]
        for answer, expected, name in zip(
            (first, second, third), whole, ("pooler_output", "last_hidden_state", "pooler_output"), strict=True
        ):
            np.testing.assert_array_equal(answer[name], expected[name])
        assert set(third) == {"pooler_output"}

    def test_a_part_of_a_graph_does_not_pad(self, tmp_path):
        model = forward(tmp_path, pads=False)
        answers = model.run([{"input_ids": ids(1, length)} for length in (5, 6, 5)])
        assert [answer["last_hidden_state"].shape[1] for answer in answers] == [5, 6, 5]
        assert model.runs == 2, "those of 5 together"

    def test_a_bad_request_does_not_harm_its_neighbours(self, tmp_path):
        model = forward(tmp_path)
        good = {"input_ids": ids(1, 5)}
        bad = [{"input_ids": np.full((1, 5), 50)}, {"input_ids": ids(1, 65)}, {"input_ids": np.zeros((1, 5))},
               {"input_ids": np.zeros((1, 0), np.int64)}, {"input_ids": ids(5)}, {},
               {"input_ids": ids(1, 5), "attention_mask": np.ones((1, 4), np.int64)},
               {"input_ids": ids(1, 5), "token_type_ids": np.full((1, 5), -1)}]  # fmt: skip
        answers = model.run([good, *bad])
        assert not isinstance(answers[0], EffcError)
        assert all(isinstance(answer, UsageError) for answer in answers[1:])

    def test_a_run_has_no_more_rows_than_allowed(self, tmp_path):
        model = forward(tmp_path, max_batch=4)
        model.run([{"input_ids": ids(3, 5)}, {"input_ids": ids(2, 5)}, {"input_ids": ids(1, 5)}])
        assert model.runs == 2

    def test_without_a_mask_only_equal_lengths_share_a_run(self, tmp_path):
        model = forward(tmp_path, mask=False)
        requests = [{"input_ids": ids(1, length)} for length in (5, 6, 5)]
        answers = model.run(requests)
        assert model.runs == 2
        assert [answer["last_hidden_state"].shape[1] for answer in answers] == [5, 6, 5]


class TestText:
    def encoder(self, folder: Path, **changes) -> TextEncoder:
        tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        # As checkpoints bring them: padding to a fixed length and an early cut.
        tokenizer.enable_padding(length=16)
        tokenizer.enable_truncation(2)
        tokenizer.save(str(folder / "tokenizer.json"))
        values = {"inputs": ["input_ids", "attention_mask"], "max_length": 4, "truncate": True, "padding": 7,
                  "masked": True, "max_bytes": 100}  # fmt: skip
        return TextEncoder(folder, TokenizerSettings.from_json({**values, **changes}))

    def test_texts_are_padded_behind_and_cut_where_the_model_ends(self, tmp_path):
        made = self.encoder(tmp_path).encode(["a film", "a good film a good"])
        assert made["input_ids"].tolist() == [[1, 3, 7, 7], [1, 2, 3, 1]]
        assert made["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert made["truncated"].tolist() == [[False], [True]]
        assert made["offsets"][0].tolist() == [[0, 1], [2, 6], [0, 0], [0, 0]]

    def test_long_and_empty_texts_are_refused(self, tmp_path):
        encoder = self.encoder(tmp_path, truncate=False)
        with pytest.raises(UsageError, match="5 tokens; the model takes 4"):
            encoder.encode(["a good film a good"])
        with pytest.raises(UsageError, match="empty"):
            encoder.encode([""])
        with pytest.raises(UsageError, match="takes no mask"):
            self.encoder(tmp_path, masked=False).encode(["a", "a film"])

    def test_bytes_must_be_text_of_a_bounded_length(self):
        assert texts([b"caf\xc3\xa9", "x"], 10) == ["café", "x"]
        with pytest.raises(OutputError, match="not UTF-8"):
            texts([b"\xff"], 10)
        with pytest.raises(OutputError, match="11 bytes; this server takes 10"):
            texts([b"x" * 11], 10)

    @pytest.mark.parametrize("pieces", ["a b c", "x"])
    def test_a_stream_gives_the_whole_text_in_pieces(self, pieces):
        tokenizer = byte_tokenizer()
        text = "Größe: 10 € 🙂!"
        stream = TextStream(tokenizer, ())
        tokens = tokenizer.encode(text).ids
        given = [stream.put(token) for token in tokens] + [stream.end()]
        assert "".join(given) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)

    def test_a_stop_text_ends_the_stream_and_is_not_part_of_it(self):
        tokenizer = byte_tokenizer()
        stream = TextStream(tokenizer, ["STOP"])
        given = ""
        for token in tokenizer.encode("ab ST STOP cd").ids:
            given += stream.put(token)
            assert "STOP"[: len(given) - len("ab ST ")] != given[len("ab ST ") :] or len(given) <= len("ab ST ")
            if stream.stopped:
                break
        assert given + stream.end() == "ab ST "
        stream = TextStream(tokenizer, ["STOP"])
        assert "".join([stream.put(token) for token in tokenizer.encode("ab ST").ids] + [stream.end()]) == "ab ST"


def byte_tokenizer() -> Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class TestHeads:
    hidden = np.array([[[1.0, 0.0], [3.0, 4.0], [100.0, 100.0]], [[0.0, 2.0], [0.0, 4.0], [0.0, 6.0]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]])

    @pytest.mark.parametrize(
        ("pooling", "expected"),
        [("mean", [[2, 2], [0, 4]]), ("cls", [[1, 0], [0, 2]]), ("max", [[3, 4], [0, 6]]), ("last", [[3, 4], [0, 6]])],
    )
    def test_padding_has_no_part_in_an_embedding(self, pooling, expected):
        np.testing.assert_allclose(embed(self.hidden, self.mask, pooling, False), expected)
        normal = embed(self.hidden, self.mask, pooling, True)
        np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, rtol=1e-6)

    def test_labels_exclude_each_other_or_not(self):
        logits = np.array([[0.0, np.log(3.0)]], np.float32)
        scores, best = classify(logits, ["bad", "good"], several=False)
        np.testing.assert_allclose(scores, [[0.25, 0.75]], rtol=1e-6)
        assert best.tolist() == [[b"good"]]
        np.testing.assert_allclose(classify(logits, ["bad", "good"], several=True)[0], [[0.5, 0.75]], rtol=1e-6)

    def test_every_token_gets_its_label(self):
        scores, labels = tag(np.log(np.array([[[1.0, 3.0], [4.0, 1.0]]], np.float32)), ["O", "PER"])
        np.testing.assert_allclose(scores, [[0.75, 0.8]], rtol=1e-6)
        assert labels.tolist() == [[b"PER", b"O"]]

    def test_labels_have_the_configs_names(self):
        assert labels_of({"id2label": {"0": "neg", "1": "pos"}}, 3) == ["neg", "pos", "LABEL_2"]


class TestRouter:
    router = Router({"dense": {128: 1.0, 512: 6.0}, "sparse": {128: 3.0, 512: 4.0}}, {"dense": 512, "sparse": 2048})

    @pytest.mark.parametrize(
        ("length", "variant"), [(1, "dense"), (128, "dense"), (319, "dense"), (321, "sparse"), (600, "sparse")]
    )
    def test_the_variant_that_was_faster_at_a_length_is_chosen(self, length, variant):
        assert self.router.choose(length) == variant

    def test_a_variant_that_cannot_take_a_length_is_not(self):
        router = Router({"short": {16: 1.0, 32: 1.0}, "long": {16: 5.0, 32: 5.0}}, {"short": 32, "long": None})
        assert router.choose(32) == "short"
        assert router.choose(33) == "long"
        assert self.router.choose(5000) == "sparse"

    def test_the_best_variant_that_keeps_the_budget_is_chosen(self):
        times = {"dense": {100: 10.0, 200: 30.0}, "wide": {100: 8.0, 200: 16.0}, "narrow": {100: 5.0, 200: 10.0}}
        drops = {"dense": 0.0, "wide": 0.01, "narrow": 0.05}
        router = Router(times, dict.fromkeys(times), Budget(20.0, drops, parallel=2))
        assert router.choose(100) == "dense"
        assert router.choose(200) == "wide"
        assert router.choose(200, waiting=10.0) == "narrow"
        # Two at a time: the wait is half of what is waiting.
        assert router.choose(100, waiting=20.0) == "dense" and router.choose(100, waiting=21.0) == "wide"
        assert router.choose(100, rows=2) == "dense" and router.choose(100, rows=3) == "narrow"
        # Where nothing keeps it, the fastest comes nearest.
        assert router.choose(400) == "narrow" and router.choose(100, waiting=1000.0) == "narrow"
        assert Router(times, {**dict.fromkeys(times), "narrow": 150}, Budget(1.0, drops)).choose(200) == "wide"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_server_lacks_is_imported(kind):
    """In a process where only what a server has can be imported."""
    modules = sorted(modules_of(f"effc.serving.backend.{kind}_model"))
    program = f"""
import importlib.abc, sys
allowed = set(sys.stdlib_module_names) | {set(SERVER_PACKAGES)!r} | {set(modules)!r} | {{"effc"}}
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        # Engines bring torch with them, which is imported when they are opened.
        absent = ["torch", "transformers", "pydantic", "onnx"]
        absent += ["onnxruntime"] if "{kind}" == "engine_writer" else []
        if name.startswith("effc.") and name not in allowed or name.partition(".")[0] in absent:
            raise ImportError(name)
sys.meta_path.insert(0, Guard())
import types
stub = types.ModuleType("triton_python_backend_utils")
stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
sys.modules["triton_python_backend_utils"] = stub
import effc.serving.backend.{kind}_model
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.py" in model_files(kind)


def test_a_module_that_a_server_lacks_is_told_of():
    with pytest.raises(EffcError, match="imports 'pydantic'"):
        modules_of("effc.compiler.manifest")
