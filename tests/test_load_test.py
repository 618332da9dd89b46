"""The load test, against a small server of the tests' own: what it counts is what happened."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from effc.cli import main
from effc.errors import DataError, EffcError, MissingDependencyError, OutputError, UsageError
from effc.serving.load_client import Client, find_target
from effc.serving.load_plot import load_figure, save_plot
from effc.serving.load_result import Latencies
from effc.serving.load_test import _Measured, _one, load_test

DELAY_S = 0.02
TEXT = {"platform": "ensemble", "input": [{"name": "text", "data_type": "TYPE_STRING"}]}
WRITER = {"platform": "", "input": [{"name": "text_input", "data_type": "TYPE_STRING"}, {"name": "stream"}]}
TENSORS = {
    "platform": "",
    "input": [
        {"name": "input_ids", "data_type": "TYPE_INT64", "dims": ["-1"]},
        {"name": "attention_mask", "data_type": "TYPE_INT64", "dims": ["-1"]},
        {"name": "kind", "data_type": "TYPE_INT64", "dims": ["2"], "optional": True},
    ],
}
# Does what perf_analyzer does with its arguments, without a server: writes the requests that it was given.
FAKE = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
data = json.load(open(flags["--input-data"]))["data"]
if "bad" in flags["-m"]:
    sys.exit("Failed to maintain requested inference load.\\nThread [0] had error: too busy")
count = int(flags["--request-count"])
requests = [{{
    "timestamp": 10**9 + 10**6 * number,
    "request_inputs": {{name: value if isinstance(value, list) else value["content"]
                        for name, value in data[number % len(data)].items()}},
    "response_timestamps": [10**9 + 3 * 10**6 * (number + 1)] if number else [],
}} for number in range(count)]
json.dump({{"experiments": [{{"requests": requests}}], "flags": flags}}, open(flags["--profile-export-file"], "w"))
json.dump({{"flags": flags, "data": data}}, open("{seen}", "w"))
"""


class Handler(BaseHTTPRequestHandler):
    """As Triton's HTTP endpoints answer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        model = self.path.split("/")[3]
        if model in self.server.models:
            self._send(200, self.server.models[model])
        else:
            self._send(404, {"error": f"unknown model {model}"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v2/repository/index":
            self._send(200, [{"name": name} for name in self.server.models])
            return
        if self.path == "/v2/models/embed_tokenizer/infer":
            words = body["inputs"][0]["data"][0].split()
            outputs = {"input_ids": [7] * len(words), "attention_mask": [1] * len(words), "truncated": [False]}
            entries = [{"name": name, "shape": [1, len(data)], "data": data} for name, data in outputs.items()]
            self._send(200, {"outputs": entries})
            return
        with self.server.lock:
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
            self.server.seen.append(body)
            number = len(self.server.seen)
        time.sleep(DELAY_S)
        end = time.monotonic() + 20
        while self.server.most < self.server.hold_until and time.monotonic() < end:
            time.sleep(0.005)
        with self.server.lock:
            self.server.active -= 1
        if self.server.fail_every and number % self.server.fail_every == 0:
            self._send(503, {"error": "too busy"})
        elif self.path.endswith("generate_stream"):
            parts = [{"token_ids": [1, 2]}, {"token_ids": 3}, {"token_ids": []}]
            self._raw(200, "".join(f"data: {json.dumps(part)}\n\n" for part in parts).encode())
        else:
            self._send(200, {"embedding": [0.0]})

    def _send(self, status: int, value: object) -> None:
        self._raw(status, json.dumps(value).encode())

    def _raw(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.models, made.seen, made.fail_every = {"embed": TEXT, "embed_model": TENSORS}, [], 0
    made.lock, made.active, made.most, made.hold_until = threading.Lock(), 0, 0, 0
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_closed_loop_keeps_its_clients_busy(server):
    result = load_test(server.url, requests=30, concurrency=3)
    assert (result.model, result.mode, result.requests, result.failed) == ("embed", "closed", 30, 0)
    assert len(server.seen) == len(result.samples) == 30 and server.most == 3
    assert result.latency is not None and 1000 * DELAY_S <= result.latency.p50 <= result.latency.p99
    assert result.throughput == pytest.approx(30 / result.seconds)
    words = {len(body["text"].split()) for body in server.seen}
    assert words == {8, 32, 128, 256}, "texts of real lengths"


def test_an_open_loop_does_not_wait_for_answers(server):
    server.hold_until = 12
    result = load_test(server.url, requests=24, rate=400)
    assert result.mode == "open" and result.failed == 0
    assert server.most >= 12, "more at once than a closed loop of 4 would send"


def test_a_latency_counts_from_when_the_request_was_due(server):
    measured = _Measured(threading.Lock(), [], [], Counter())
    client = Client(find_target(server.url, None, 1), 10)
    _one(client, "a text", time.perf_counter() - 0.5, measured)
    sent = time.perf_counter()
    _one(client, "a text", None, measured)
    took = time.perf_counter() - sent
    (_, late), (_, prompt) = measured.samples
    assert late >= 0.5 + DELAY_S and DELAY_S <= prompt <= took
    client.close()


def test_errors_are_counted_and_left_out_of_the_times(server):
    server.fail_every = 5
    result = load_test(server.url, requests=20, concurrency=2)
    assert result.failed == 4 and result.errors == {"too busy": 4} and len(result.samples) == 16


def test_written_tokens_and_the_first_of_them_are_measured(server):
    server.models = {"writer": WRITER}
    result = load_test(server.url, requests=6, max_tokens=9)
    assert result.first_token is not None and not result.errors
    assert result.tokens_per_s == pytest.approx(18 / result.seconds)
    assert all(body["max_tokens"] == 9 and body["stream"] for body in server.seen)


def test_texts_come_from_the_file(server, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo words\n")
    load_test(server.url, requests=20, data=str(file))
    assert {body["text"] for body in server.seen} == {"one", "two words"}
    with pytest.raises(DataError):
        load_test(server.url, data=str(tmp_path / "none.txt"))


def test_what_cannot_be_measured_is_told(server):
    for arguments, message in (
        ({"model": "none"}, "no model 'none'"),
        ({"model": "embed_model", "perf_analyzer": False}, "takes no text"),
        ({"perf_analyzer": True}, "Name one with --model"),
        ({"requests": 0}, "at least 1"),
        ({"rate": 0.0}, "above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            load_test(server.url, **arguments)
    server.models = {"a": TEXT, "b": TEXT}
    with pytest.raises(UsageError, match="2 models take text: a, b"):
        load_test(server.url)
    with pytest.raises(UsageError, match="no address"):
        load_test("ftp://x")
    with pytest.raises(EffcError, match="No server answers"):
        load_test("http://127.0.0.1:1")


def test_tensors_are_measured_by_perf_analyzer_with_what_the_tokenizer_gives(server, tmp_path, monkeypatch):
    seen = tmp_path / "seen.json"
    program = tmp_path / "perf_analyzer"
    program.write_text(FAKE.format(python=sys.executable, seen=seen))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "texts.txt").write_text("one\ntwo words\n")
    server.models["embed_tokenizer"] = {"input": [{"name": "text", "data_type": "TYPE_STRING"}]}
    asked = {"data": str(tmp_path / "texts.txt"), "requests": 6, "concurrency": 9}
    result = load_test(server.url, model="embed_model", **asked)
    assert (result.tool, result.mode, result.requests, result.failed) == ("perf_analyzer", "closed", 6, 1)
    assert result.errors == {"no answer": 1}
    # Answered 3 ms after one another, asked 1 ms after one another.
    assert [round(1000 * seconds) for _, seconds in result.samples] == [5, 7, 9, 11, 13]
    assert {length for length, _ in result.samples} <= {1, 2}
    assert result.throughput == pytest.approx(5 / 0.017)
    told = json.loads(seen.read_text())
    assert told["flags"]["--concurrency-range"] == "6" and told["flags"]["-u"] == server.url.removeprefix("http://")
    two = {"content": [7, 7], "shape": [2]}, {"content": [1, 1], "shape": [2]}
    assert dict(zip(("input_ids", "attention_mask"), two, strict=True)) in told["data"]
    # Without a tokenizer: zeros of the texts' lengths, and nothing is hidden.
    del server.models["embed_tokenizer"]
    assert load_test(server.url, model="embed_model", rate=5.0, **asked).mode == "open"
    told = json.loads(seen.read_text())
    assert told["flags"]["--request-rate-range"] == "5" and told["flags"]["--request-distribution"] == "poisson"
    zeros = {"content": [0, 0], "shape": [2]}, {"content": [1, 1], "shape": [2]}
    assert dict(zip(("input_ids", "attention_mask"), zeros, strict=True)) in told["data"]
    # A model that takes text is measured by it when that is asked for.
    load_test(server.url, model="embed", perf_analyzer=True, **asked)
    assert {"text": ["two words"]} in json.loads(seen.read_text())["data"]
    server.models |= {"bad": TENSORS, "stream": {**WRITER, "model_transaction_policy": {"decoupled": True}}}
    with pytest.raises(EffcError, match="perf_analyzer failed: .*had error: too busy"):
        load_test(server.url, model="bad", **asked)
    with pytest.raises(UsageError, match="streams its answers"):
        load_test(server.url, model="stream", perf_analyzer=True, **asked)


def test_without_perf_analyzer_it_is_told_how_to_get_it(server, monkeypatch):
    monkeypatch.setattr("effc.serving.load_perf.find_perf_analyzer", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"(?s)not on this machine.*effc serve --install-server"):
        load_test(server.url, model="embed_model")


def test_percentiles():
    latencies = Latencies.of(np.arange(1, 101) / 1000)
    assert (latencies.p50, latencies.maximum) == (pytest.approx(50.5), pytest.approx(100))
    assert latencies.p99 == pytest.approx(99.01)


def test_the_command_shows_and_draws(server, tmp_path, capsys):
    picture = tmp_path / "load.svg"
    with pytest.raises(SystemExit) as ended:
        main(["load-test", server.url, "--requests", "8", "--save", str(picture), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 8
    assert b"<svg" in picture.read_bytes()
    server.fail_every = 1
    with pytest.raises(SystemExit) as ended:
        main(["load-test", server.url, "--requests", "3"])
    assert ended.value.code == 1
    assert "3 x too busy" in capsys.readouterr().out


def test_a_plot_has_a_point_per_answer(server, tmp_path):
    result = load_test(server.url, requests=10)
    left, _ = load_figure(result).axes
    assert len(left.collections[0].get_offsets()) == 10
    with pytest.raises(UsageError, match="ends in"):
        save_plot(result, tmp_path / "load.txt")
    server.fail_every = 1
    with pytest.raises(OutputError, match="No request was answered"):
        save_plot(load_test(server.url, requests=2), tmp_path / "load.png")
