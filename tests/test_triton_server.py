"""Repositories that effc writes, on a real Triton server. Run with `make serving`."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_checkpoints
from malformed_requests import CRASHES_24_10, malformed_bodies
from test_triton_repository import artifact as tiny_artifact
from test_triton_repository import content, judged

import effc
from effc.errors import EffcError, UsageError
from effc.exporters.triton_config import Instances
from effc.plugins.native import library_path
from effc.serving.load_test import load_test
from effc.serving.options import ServingOptions
from effc.serving.packaged import install_packaged_server
from effc.serving.repository import check_repository, write_repository
from effc.serving.repository_record import wants_cache
from effc.serving.repository_version import use_version
from effc.serving.server import Ports, Server

grpc = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.server

TEXTS = [
    "a good film",
    "the plot was dull and the acting was bad but i loved it",
    "great acting , great story , not very good plot and very dull film of a very bad story",
]


@dataclass
class Served:
    """The server of this file, and the artifacts behind its models."""

    server: Server
    repository: Path
    artifacts: dict[str, Path]

    def post(self, path: str, body: Any) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.server.http}/v2/models/{path}", raw)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def infer(self, model: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """By gRPC."""
        with grpc.InferenceServerClient(self.server.grpc) as client:
            inputs = []
            for name, array in arrays.items():
                inputs.append(grpc.InferInput(name, array.shape, "BYTES" if array.dtype == object else "INT64"))
                inputs[-1].set_data_from_numpy(array)
            result = client.infer(model, inputs)
            return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def metric(self, name: str, **labels: str) -> float:
        with urllib.request.urlopen(self.server.metrics) as response:
            lines = response.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items())
        )


@pytest.fixture(scope="module")
def program():
    return install_packaged_server()


@pytest.fixture(scope="module")
def served(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    compiled = {"tagger": ("BertForTokenClassification", "local:8"), "writer": ("LlamaForCausalLM", "local:8|sinks:2")}
    artifacts = {}
    for name, (kind, attention) in compiled.items():
        labels = {"id2label": {number: f"TAG-{number}" for number in range(5)}} if name == "tagger" else {}
        checkpoint = tiny_checkpoints.save_lively(folder / f"{name}-model", kind, **labels)
        artifacts[name] = effc.compile(
            checkpoint, attention=attention, output=folder / name, bench={"enabled": False}
        ).path
    minilm = tiny_checkpoints.minilm()
    if minilm is None:
        pytest.skip("the package with MiniLM is not installed")
    artifacts["minilm"] = effc.compile(
        minilm, attention="local:64", quantization="int8", output=folder / "minilm", bench={"enabled": False}
    ).path
    artifacts["routed"] = tiny_artifact(folder / "sparse", text=True, times={8: 2.0, 64: 4.0})
    dense = tiny_artifact(folder / "dense", text=True, times={8: 1.0, 64: 8.0})
    artifacts["budgeted"] = judged(tiny_artifact(folder / "fast", text=True, times={8: 1.0, 64: 1.0}), 0.02)
    good = judged(tiny_artifact(folder / "good", text=True, times={8: 2.0, 64: 900.0}), 0.0)
    chosen = {
        "routed": {"variants": {"dense": dense}},
        # Far from what a loaded machine needs for one request after the other.
        "budgeted": {"variants": {"good": good}, "latency_budget_ms": 500.0},
        "staged": {"stages": 2},
    }
    artifacts["staged"] = artifacts["tagger"]
    repository = folder / "repository"
    for name, path in artifacts.items():
        write_repository(path, repository, ServingOptions(name=name, max_batch=4, threads=1, **chosen.get(name, {})))
    with Server(repository, program) as server:
        yield Served(server, repository, artifacts)
    assert server.stop() == 0
    assert check_repository(repository) == list(artifacts)


def expected(path: Path, text: str, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(path)([text], return_tensors="np", **options)
    return effc.load(path)(**encoded), encoded


def settled(measure: Callable[[], float], seconds: float = 0.6) -> float:
    """What is measured once it does not change any more."""
    found, end = measure(), time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(seconds)
        found, before = measure(), found
        if found == before:
            return found
    raise AssertionError(f"{found} still changes")


class TestEncoder:
    def test_http_and_grpc_give_what_effc_load_gives(self, served):
        result, encoded = expected(served.artifacts["minilm"], TEXTS[2])
        arrays = {name: np.asarray(array, np.int64) for name, array in encoded.items()}
        by_grpc = served.infer("minilm_model", **arrays)
        np.testing.assert_allclose(by_grpc["last_hidden_state"], result.last_hidden_state, atol=1e-4)
        body = {"inputs": [{"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.tolist()}
                           for name, array in arrays.items()]}  # fmt: skip
        outputs = {entry["name"]: entry for entry in served.post("minilm_model/infer", body)["outputs"]}
        found = np.reshape(outputs["last_hidden_state"]["data"], outputs["last_hidden_state"]["shape"])
        np.testing.assert_allclose(found, result.last_hidden_state, atol=1e-4)
        # Masks and the like may be left out.
        np.testing.assert_allclose(
            served.infer("minilm_model", input_ids=arrays["input_ids"])["last_hidden_state"], found, atol=1e-4
        )

    def test_effcs_native_kernels_run_in_the_server(self, served):
        directory = served.repository / "minilm_model" / "1"
        assert (directory / "libeffc_cpu.so").is_file() == (library_path() is not None)
        assert "native kernels cannot be loaded" not in served.server.log(10_000)

    def test_text_becomes_the_embedding_of_sentence_transformers_files(self, served):
        for text in TEXTS:
            result, encoded = expected(served.artifacts["minilm"], text)
            mean = result.last_hidden_state.mean(axis=1)
            answer = served.post("minilm/generate", {"text": text})
            np.testing.assert_allclose(answer["embedding"], (mean / np.linalg.norm(mean))[0], atol=1e-4)
            assert answer["truncated"] is False and encoded["attention_mask"].all()

    def test_long_texts_are_cut_where_the_model_was_made_to_end(self, served):
        text = " ".join(TEXTS * 30)
        result, encoded = expected(served.artifacts["minilm"], text, truncation=True, max_length=256)
        assert encoded["input_ids"].shape == (1, 256)
        mean = result.last_hidden_state.mean(axis=1)
        answer = served.post("minilm/generate", {"text": text})
        np.testing.assert_allclose(answer["embedding"], (mean / np.linalg.norm(mean))[0], atol=1e-4)
        assert answer["truncated"] is True


class TestTagger:
    def test_every_token_gets_its_label_and_place(self, served):
        result, _ = expected(served.artifacts["tagger"], TEXTS[1])
        names = [f"TAG-{index}" for index in result.logits[0].argmax(axis=-1)]
        answer = served.infer("tagger", text=np.array([[TEXTS[1].encode()]], dtype=object))
        assert [label.decode() for label in answer["labels"][0]] == names
        powers = np.exp(result.logits[0] - result.logits[0].max(axis=-1, keepdims=True))
        scores = (powers / powers.sum(axis=-1, keepdims=True)).max(axis=-1)
        np.testing.assert_allclose(answer["scores"][0], scores, atol=1e-4)
        first, second = answer["offsets"][0][1:3]
        assert (TEXTS[1][slice(*first)], TEXTS[1][slice(*second)]) == ("the", "plot")

    def test_requests_of_different_lengths_share_runs_and_change_nothing(self, served):
        model = effc.load(served.artifacts["tagger"])
        random = np.random.default_rng(0)
        requests = [random.integers(5, 20, (1, length)) for length in random.integers(10, 16, 60)]
        before = settled(lambda: served.metric("effc_runs", model="tagger_model"))
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda ids: served.infer("tagger_model", input_ids=ids)["logits"], requests))
        for ids, answer in zip(requests, answers, strict=True):
            np.testing.assert_allclose(answer, model(input_ids=ids).logits, atol=1e-4)
        assert 0 < settled(lambda: served.metric("effc_runs", model="tagger_model")) - before < len(requests)

    def test_10_000_malformed_requests_are_refused_and_harm_nothing(self, served):
        ids = np.array([[2, 9, 5, 3]])
        before = served.infer("tagger_model", input_ids=ids)["logits"]
        pid, answered = served.server.pid, []

        def send(body: bytes) -> None:
            try:
                served.post("tagger_model/infer", body)
                answered.append(body)
            except urllib.error.HTTPError as error:
                assert error.code in (400, 413, 500), body[:300]
                assert json.loads(error.read())["error"]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send, malformed_bodies(10_000, seed=0)))
        assert not answered, answered[0][:300]
        np.testing.assert_array_equal(served.infer("tagger_model", input_ids=ids)["logits"], before)
        assert served.server.pid == pid
        served.server.wait_ready()

    @pytest.mark.parametrize("text", [b"\xff\xfe", b"x" * (2 << 20)])
    def test_text_that_is_none_is_refused(self, served, text):
        with pytest.raises(Exception, match=r"not UTF-8|1,048,576"):
            served.infer("tagger", text=np.array([[text]], dtype=object))


class TestStages:
    def test_stages_give_what_the_whole_gives(self, served):
        ids, mask = np.array([[2, 9, 5, 3, 7], [4, 8, 6, 0, 0]]), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        stages = [f"staged_model_stage_{number}" for number in range(2)]
        before = [served.metric("nv_inference_request_success", model=name) for name in stages]
        answer = served.infer("staged_model", **given)
        np.testing.assert_allclose(answer["logits"], effc.load(served.artifacts["staged"])(**given).logits, atol=1e-4)
        after = [served.metric("nv_inference_request_success", model=name) for name in stages]
        assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1]
        text = np.array([[TEXTS[1].encode()]], dtype=object)
        whole, parts = served.infer("tagger", text=text), served.infer("staged", text=text)
        assert parts["labels"].tolist() == whole["labels"].tolist()
        np.testing.assert_allclose(parts["scores"], whole["scores"], atol=1e-4)
        with pytest.raises(Exception, match="this model takes 0 to 31"):
            served.infer("staged_model", **{**given, "input_ids": ids + 40})


class TestWriter:
    def stream(self, served, text: str, **parameters: Any) -> tuple[list[int], str, list[dict[str, Any]]]:
        body = json.dumps({"text_input": text, "stream": True, **parameters}).encode()
        request = urllib.request.Request(f"http://{served.server.http}/v2/models/writer/generate_stream", body)
        with urllib.request.urlopen(request, timeout=60) as response:
            parts = [json.loads(line[5:]) for line in response if line.startswith(b"data:")]
        tokens = [part["token_ids"] for part in parts]
        flat = [token for part in tokens for token in (part if isinstance(part, list) else [part])]
        return flat, "".join(part["text_output"] for part in parts), parts

    def reference(self, served, text: str, count: int, **options: Any) -> list[int]:
        from transformers import AutoTokenizer

        path = served.artifacts["writer"]
        ids = AutoTokenizer.from_pretrained(path)([text], return_tensors="np")["input_ids"]
        return (
            effc.load(path).generate(ids, max_new_tokens=count, eos_token_id=[], **options)[0, ids.shape[1] :].tolist()
        )

    def test_tokens_are_those_of_effc_load_one_response_each(self, served):
        tokens, text, parts = self.stream(served, TEXTS[0], max_tokens=20, ignore_eos=True)
        assert tokens == self.reference(served, TEXTS[0], 20)
        assert len(parts) == 21 and parts[-1]["finish_reason"] == "length"
        whole = served.post("writer/generate", {"text_input": TEXTS[0], "max_tokens": 20, "ignore_eos": True})
        assert whole["token_ids"] == tokens and whole["text_output"] == text

    def test_texts_that_are_written_together_are_what_they_are_alone(self, served):
        counts = [5, 30, 12, 25, 18, 8, 22, 15]
        prompts = [TEXTS[number % 3] for number in range(8)]
        steps = served.metric("effc_decode_steps", model="writer")
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(self.stream, served, text, max_tokens=count, ignore_eos=True)
                    for text, count in zip(prompts, counts, strict=True)]  # fmt: skip
            results = [job.result()[0] for job in jobs]
        for text, count, tokens in zip(prompts, counts, results, strict=True):
            assert tokens == self.reference(served, text, count)
        assert served.metric("effc_decode_steps", model="writer") - steps < sum(counts)

    def test_drawn_tokens_follow_the_seed(self, served):
        values = {"temperature": 1.3, "top_k": 10, "seed": 5}
        tokens, _, _ = self.stream(served, TEXTS[0], max_tokens=15, ignore_eos=True, **values)
        assert tokens == self.reference(served, TEXTS[0], 15, **values)

    def test_vllms_tensors_are_understood(self, served):
        parameters = json.dumps({"max_tokens": 6, "ignore_eos": True}).encode()
        with grpc.InferenceServerClient(served.server.grpc) as client:
            found: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: found.put(error or result))
            kinds = {"text_input": "BYTES", "sampling_parameters": "BYTES", "exclude_input_in_output": "BOOL"}
            inputs = [grpc.InferInput(name, [1], kind) for name, kind in kinds.items()]
            inputs[0].set_data_from_numpy(np.array([TEXTS[0].encode()], dtype=object))
            inputs[1].set_data_from_numpy(np.array([parameters], dtype=object))
            inputs[2].set_data_from_numpy(np.array([False]))
            client.async_stream_infer("writer", inputs)
            answer = found.get(timeout=30)
        assert answer.as_numpy("text_output")[0].decode().startswith(TEXTS[0])
        assert answer.as_numpy("token_ids").tolist() == self.reference(served, TEXTS[0], 6)

    def test_cancelled_texts_are_cut_short_and_make_room(self, served):
        before = served.metric("effc_tokens", model="writer")
        first: queue.Queue[Any] = queue.Queue()
        with grpc.InferenceServerClient(served.server.grpc) as client:
            client.start_stream(lambda result, error: first.put(error or result))
            text, stream = grpc.InferInput("text_input", [1], "BYTES"), grpc.InferInput("stream", [1], "BOOL")
            text.set_data_from_numpy(np.array([TEXTS[0].encode()], dtype=object))
            stream.set_data_from_numpy(np.array([True]))
            # More than are written at once, so that there is enough left to be cut.
            for _ in range(60):
                client.async_stream_infer("writer", [text, stream], parameters={"max_tokens": 50, "ignore_eos": True})
            first.get(timeout=30)
            client.stop_stream(cancel_requests=True)
        grown = settled(lambda: served.metric("effc_tokens", model="writer") - before)
        assert 0 < grown < 60 * 50 / 2
        assert served.metric("nv_inference_pending_request_count", model="writer") == 0
        tokens, _, _ = self.stream(served, TEXTS[1], max_tokens=4, ignore_eos=True)
        assert tokens == self.reference(served, TEXTS[1], 4)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"text_input": "", "max_tokens": 500}, "positions of the model"),
            ({"text_input": "a", "temprature": 1}, "Did you mean 'temperature'"),
            ({"text_input": "a", "max_tokens": 0}, "at least 1"),
            ({"text_input": "a", "sampling_parameters": "{"}, "no JSON"),
            ({"text_input": "a", "sampling_parameters": "[]"}, "JSON object"),
            ({"text_input": "a " * 100}, "positions of the model"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, served, body, message):
        with pytest.raises(urllib.error.HTTPError) as refused:
            served.post("writer/generate", body)
        assert message in json.loads(refused.value.read())["error"]


class TestRouter:
    def test_each_request_goes_to_the_variant_of_its_length(self, served):
        before = {name: served.metric("effc_routed", variant=name) for name in ("dense", "compiled")}
        for length, variant in ((4, "dense"), (16, "dense"), (40, "compiled"), (64, "compiled")):
            ids = np.random.default_rng(length).integers(0, 50, (2, length))
            answer = served.infer("routed_model", input_ids=ids)
            assert answer["variant"].tolist() == [[variant.encode()]] * 2
            result = effc.load(served.artifacts["routed"])(input_ids=ids)
            np.testing.assert_allclose(answer["last_hidden_state"], result.last_hidden_state, atol=1e-4)
        after = {name: served.metric("effc_routed", variant=name) for name in before}
        assert {name: after[name] - before[name] for name in before} == {"dense": 2, "compiled": 2}
        with pytest.raises(Exception, match="at most 64 tokens"):
            served.infer("routed_model", input_ids=np.zeros((1, 65), np.int64))

    @pytest.mark.parametrize(("rows", "length", "variant"), [(1, 8, "good"), (1, 60, "compiled"), (3, 30, "compiled")])
    def test_a_latency_budget_takes_the_best_that_keeps_it(self, served, rows, length, variant):
        answer = served.infer("budgeted_model", input_ids=np.ones((rows, length), np.int64))
        assert answer["variant"].tolist() == [[variant.encode()]] * rows

    @pytest.mark.parametrize("model", ["minilm", "writer"])
    def test_a_load_test_by_grpc(self, served, model, tmp_path):
        (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
        url, data = f"grpc://{served.server.grpc}", str(tmp_path / "texts.txt")
        result = load_test(url, model=model, data=data, requests=12, concurrency=3, max_tokens=5)
        assert result.failed == 0 and len(result.samples) == 12
        assert (result.first_token is not None) == (model == "writer")
        assert round(result.tokens_per_s * result.seconds) == (60 if model == "writer" else 0)

    def test_a_load_test_by_grpc_says_what_is_wrong(self, served):
        with pytest.raises(UsageError, match="no model 'nothing'"):
            load_test(f"grpc://{served.server.grpc}", model="nothing")
        with pytest.raises(UsageError, match="'minilm_model' takes no text"):
            load_test(f"grpc://{served.server.grpc}", model="minilm_model", perf_analyzer=False)
        with pytest.raises(EffcError, match="No server answers by gRPC"):
            load_test("grpc://127.0.0.1:1")

    def test_a_load_test_of_tensors_by_perf_analyzer(self, served, tmp_path):
        (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
        for url in (f"http://{served.server.http}", f"grpc://{served.server.grpc}"):
            asked = {"data": str(tmp_path / "texts.txt"), "requests": 12, "concurrency": 3}
            result = load_test(url, model="tagger_model", **asked)
            assert (result.tool, result.requests, result.failed) == ("perf_analyzer", 12, 0)
            # The tokens of the texts, as the server's tokenizer counts them.
            counts = {served.infer("tagger_tokenizer", text=np.array([[text.encode()]], dtype=object))["input_ids"].size
                      for text in TEXTS}  # fmt: skip
            assert {length for length, _ in result.samples} <= counts and len(result.samples) == 12
            assert result.latency is not None and 0 < result.latency.p50 <= result.latency.p99
        # A model of texts as well, if that is asked for.
        result = load_test(url, model="tagger", perf_analyzer=True, **asked)
        assert (result.tool, result.failed, len(result.samples)) == ("perf_analyzer", 0, 12)

    def test_2_000_requests_of_mixed_lengths_have_no_error(self, served):
        result = load_test(f"http://{served.server.http}", model="routed", requests=2000, concurrency=8)
        assert result.failed == 0 and len(result.samples) == 2000
        assert served.metric("nv_inference_request_success", model="routed_model_compiled") > 100
        assert served.metric("nv_inference_request_success", model="routed_model_dense") > 100


def test_a_killed_server_comes_back_with_an_unchanged_repository(program, tmp_path):
    repository = tmp_path / "r"
    for _ in range(2):
        write_repository(tiny_artifact(tmp_path / "a", text=True), repository, ServingOptions(name="m", threads=1))
    use_version(repository, "m", 1)
    before = content(repository)
    ports = Ports.free()
    with Server(repository, program, ports=ports) as server:
        results: list[Any] = []
        thread = threading.Thread(
            target=lambda: results.append(load_test(f"http://{server.http}", requests=3000, concurrency=4))
        )
        thread.start()
        time.sleep(2)
        server.kill()
        with Server(repository, program, ports=ports) as again:
            thread.join(120)
            [result] = results
            assert 0 < result.failed < result.requests
            answer = load_test(f"http://{again.http}", requests=20)
            assert answer.failed == 0
            for version, there in ((1, True), (2, False)):
                url = f"http://{again.http}/v2/models/m/versions/{version}/ready"
                try:
                    assert (urllib.request.urlopen(url).status == 200) == there
                except urllib.error.HTTPError:
                    assert not there
    assert content(repository) == before


def test_repeated_requests_are_answered_from_the_cache_and_copies_share_the_work(program, tmp_path):
    options = ServingOptions(name="m", instances=Instances("cpu", 2), response_cache=True, max_batch=1)
    write_repository(tiny_artifact(tmp_path / "a"), tmp_path / "r", options)
    with Server(tmp_path / "r", program, cache=wants_cache(tmp_path / "r")) as server:
        served = Served(server, tmp_path / "r", {})
        ids = np.array([[4, 5, 6]])
        first, second = (served.infer("m", input_ids=ids) for _ in range(2))
        np.testing.assert_array_equal(first["last_hidden_state"], second["last_hidden_state"])
        assert served.metric("nv_cache_num_hits_per_model", model="m") == 1
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: served.infer("m", input_ids=ids + number), range(1, 30)))
        stubs = [entry for entry in psutil.Process(server.pid).children(recursive=True) if "stub" in entry.name()]
        assert len(stubs) == 2


def test_a_request_that_triton_never_answers_harms_no_other(program, tmp_path):
    write_repository(tiny_artifact(tmp_path / "a"), tmp_path / "r", ServingOptions(name="m", threads=1))
    with Server(tmp_path / "r", program) as server, grpc.InferenceServerClient(server.grpc) as client:
        empty = grpc.InferInput("input_ids", [0, 0], "INT64")
        empty.set_data_from_numpy(np.zeros((0, 0), np.int64))
        with pytest.raises(grpc.InferenceServerException, match="Deadline Exceeded"):
            client.infer("m", [empty], client_timeout=1)
        body = json.dumps({"inputs": [{"name": "input_ids", "shape": [0, 0], "datatype": "INT64", "data": []}]})
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"http://{server.http}/v2/models/m/infer", body.encode(), timeout=1)
        served = Served(server, tmp_path / "r", {})
        for length in range(1, 20):
            assert served.infer("m", input_ids=np.ones((1, length), np.int64))["last_hidden_state"].shape[1] == length
        # A server that waits for its last answer would wait for these two.
        server.kill()


def test_a_damaged_file_keeps_a_model_from_being_loaded(program, tmp_path):
    write_repository(tiny_artifact(tmp_path / "a"), tmp_path / "r", ServingOptions(name="m"))
    file = tmp_path / "r/m/1/model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(EffcError, match=r"model\.onnx' was changed: its SHA-256"), Server(tmp_path / "r", program):
        pass


def test_the_command_serves_and_stops_in_order(program, tmp_path):
    ports = Ports.free()
    command = [sys.executable, "-m", "effc.cli", "serve", str(tiny_artifact(tmp_path / "tiny", text=True))]
    command += ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    log = tmp_path / "log"
    with log.open("w") as output:
        # Shells start programs in the background like this.
        ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
        process = subprocess.Popen(ignoring, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        end = time.monotonic() + 90
        while "is ready" not in log.read_text() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        shown = log.read_text()
        assert "tiny is ready" in shown, shown
        [curl] = re.findall(r"^curl .*", shown, re.MULTILINE)
        answer = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
        assert len(json.loads(answer.stdout)["embedding"]) == 16
        [python] = re.findall(r"^import json.*?^print.*?$", shown, re.MULTILINE | re.DOTALL)
        answer = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True)
        assert len(answer.stdout.strip("[]\n").split(",")) == 8
        url = f"http://127.0.0.1:{ports.http}/v2"
        with pytest.raises(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{url}/models/tiny_model/infer", CRASHES_24_10), timeout=30)
        while "ready again" not in log.read_text() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        assert urllib.request.urlopen(f"{url}/health/ready", timeout=10).status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{ports.http}/v2/health/live", timeout=2)
