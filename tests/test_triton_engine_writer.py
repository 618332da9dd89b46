"""Repositories of models that write text with engines: what is written, what is refused, and a real server on them.

In the real server the engines' graphs are computed behind stand-ins for torch with CUDA and for TensorRT; all else is
what a server with a GPU runs.
"""

from __future__ import annotations

import json
import queue
import shutil
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_artifacts import STANDIN, change, compile_plain, stand_in, with_engines
from test_triton_repository import artifact as tiny_artifact

import effc
from effc.cli import main
from effc.compiler import engine_choice
from effc.errors import EffcError, MissingDependencyError, OutputError, UsageError
from effc.exporters.triton_config import Instances, parse_config
from effc.serving.backend.version import write_hashes
from effc.serving.deployment import plan_artifact
from effc.serving.kubernetes import manifest, read_values
from effc.serving.options import ServingOptions
from effc.serving.packaged import ServerProgram, install_packaged_server
from effc.serving.repository import check_repository, write_repository
from effc.serving.server import Server

grpc = pytest.importorskip("tritonclient.grpc")

TEXTS = ["a good film", "the plot was dull and the acting was bad but i loved it", "great acting"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return compile_plain(tmp_path_factory.mktemp("writer"), "local:4")


@pytest.fixture(scope="module")
def both(plain) -> Path:
    """Engines for sm_86 and sm_89."""
    return with_engines(plain, "both", shapes=("1x32", "4x48"))


@pytest.fixture(scope="module")
def ada(plain) -> Path:
    return with_engines(plain, "ada", shapes=("1x32", "4x48"), archs=("sm_89",))


@pytest.fixture(scope="module")
def ampere(plain) -> Path:
    return with_engines(plain, "ampere", shapes=("1x32", "4x48"), archs=("sm_86",))


def settings(repository: Path, model: str = "m", version: int = 1) -> dict[str, Any]:
    return json.loads((repository / model / str(version) / "effc_model.json").read_text())


def test_one_decoupled_model_holds_engines_library_and_tokenizer(both, tmp_path):
    options = ServingOptions(name="m", instances=Instances.parse("gpu:0,1"), max_batch=4, server_tensorrt="10.9.0")
    done = write_repository(both, tmp_path / "r", options)
    assert done.models == ("m",) and done.notes == () and check_repository(tmp_path / "r") == ["m"]
    message = parse_config((tmp_path / "r/m/config.pbtxt").read_text())
    assert message.backend == "python" and message.model_transaction_policy.decoupled
    [group] = message.instance_group
    assert group.kind == group.KIND_GPU and list(group.gpus) == [0, 1]
    assert {entry.name for entry in message.input} >= {"text_input", "stream", "sampling_parameters"}
    files = {path.name for path in (tmp_path / "r/m/1").iterdir()}
    plans = {f"{graph}.{arch}.plan" for graph in ("prefill", "decode") for arch in ("sm_86", "sm_89")}
    assert files >= {*plans, "libeffc_tensorrt.sm_86.so", "tokenizer.json", "model.py"}
    assert not any(name.endswith(".onnx") for name in files)
    hashed = json.loads((tmp_path / "r/m/1/effc_files.json").read_text())
    assert hashed.keys() >= plans | {"libeffc_tensorrt.sm_86.so"}
    [record] = settings(tmp_path / "r")["engines"]
    assert record["pads"] and record["plugin"] == "libeffc_tensorrt.sm_86.so"


def test_the_repository_says_what_its_models_import(both, tmp_path):
    write_repository(both, tmp_path / "r", ServingOptions(name="m"))
    wanted = (tmp_path / "r/requirements.txt").read_text().split()
    assert wanted == ["numpy", "tensorrt==10.9.0.34", "tokenizers", "torch"]
    script = (tmp_path / "r/launch.sh").read_text()
    assert "--gpus all" in script and "pip install -r /models/requirements.txt" in script
    assert "EFFC_REGISTER_PLUGINS" not in script and "backend-config=tensorrt" not in script
    write_repository(tiny_artifact(tmp_path / "tiny"), tmp_path / "r", ServingOptions(name="n"))
    assert "onnxruntime" in (tmp_path / "r/requirements.txt").read_text().split()
    write_repository(tmp_path / "tiny", tmp_path / "cpu")
    assert (tmp_path / "cpu/requirements.txt").read_text().split() == ["numpy", "onnxruntime", "tokenizers"]
    assert "--gpus" not in (tmp_path / "cpu/launch.sh").read_text()
    write_repository(tmp_path / "tiny", tmp_path / "cpu", ServingOptions(name="n", instances=Instances("gpu")))
    assert (tmp_path / "cpu/requirements.txt").read_text().split() == ["numpy", "onnxruntime-gpu", "tokenizers"]
    pod = manifest(read_values("s3://bucket/models"))
    assert 'pip install --target "$EFFC_PACKAGES" --quiet -r /models/requirements.txt' in pod


def test_engines_of_several_artifacts_keep_their_own_library(ada, ampere, tmp_path):
    write_repository(ada, tmp_path / "r", ServingOptions(name="m", engines=(ampere,)))
    records = settings(tmp_path / "r")["engines"]
    assert [[engine["arch"] for engine in record["engines"]] for record in records] == [["sm_89"] * 2, ["sm_86"] * 2]
    for record, arch in zip(records, ("sm_89", "sm_86"), strict=True):
        assert (tmp_path / "r/m/1" / record["plugin"]).read_bytes() == f"library {arch}".encode()
        for engine in record["engines"]:
            source = (ada if arch == "sm_89" else ampere) / f"engines/{engine['graph']}.{arch}.plan"
            assert (tmp_path / "r/m/1" / engine["file"]).read_bytes() == source.read_bytes()


def test_engines_of_tensorrt_rtx_are_served_as_well(both, tmp_path):
    rtx = change(both, tmp_path / "rtx", flavour="tensorrt_rtx", version="1.7.1.116")
    write_repository(rtx, tmp_path / "r", ServingOptions(name="m", server_tensorrt="1.7.1"))
    assert "tensorrt-rtx==1.7.1.116" in (tmp_path / "r/requirements.txt").read_text().split()
    assert settings(tmp_path / "r")["engines"][0]["flavour"] == "tensorrt_rtx"
    with pytest.raises(UsageError, match=r"TensorRT-RTX 1.7.1.116, and the server has 1.6.0.*tensorrt-rtx==1.7.1.116"):
        plan_artifact(rtx, ServingOptions(server_tensorrt="1.6.0"))


def test_engines_that_do_not_fit_each_other_are_refused(both, ada, ampere, tmp_path):
    other = change(ampere, tmp_path / "other", version="10.8.0.1")
    short = json.loads((ampere / "effc.json").read_text())["engines"]["engines"]
    for engine in short:
        engine["profiles"] = engine["profiles"][:1]
    short = change(ampere, tmp_path / "short", engines=short)
    for added, message in (
        (ada, "Two artifacts hold an engine for sm_89"),
        (other, "have other TensorRT"),
        (short, "have other profiles"),
        (tiny_artifact(tmp_path / "tiny"), "has no engines that write text"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_artifact(ada, ServingOptions(engines=(added,)))
    with pytest.raises(UsageError, match="no engine of its forward graph"):
        from effc.serving.engines import engine_set

        engine_set(both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_tensorrt": "10.8.0"}, "built with TensorRT 10.9.0.34, and the server has 10.8.0"),
        ({"cuda_graphs": ("1x16",)}, "--cuda-graphs means nothing for a model that writes text"),
        ({"pooling": "mean"}, "--pooling means nothing"),
        ({"max_length": 16}, "--max-length means nothing"),
        ({"response_cache": True}, "--response-cache means nothing"),
        ({"instances": Instances("cpu")}, "--instances cpu means nothing where TensorRT engines run"),
        ({"threads": 2}, "--threads means nothing"),
        ({"stages": 2}, "--stages means nothing"),
        ({"variants": {"a": Path("b")}}, "--variant means nothing"),
    ],
)
def test_options_that_mean_nothing_are_refused(both, options, message):
    with pytest.raises(UsageError, match=message):
        plan_artifact(both, ServingOptions(**options))


def test_what_bounds_a_run_is_said(both, tmp_path):
    [note] = plan_artifact(both, ServingOptions(name="m", max_batch=8)).notes
    assert "at most 4 texts in one run" in note and "--shapes 8xLENGTH" in note
    values = json.loads((both / "effc.json").read_text())["engines"]["graphs"]
    values["decode"]["pads"] = False
    [note] = plan_artifact(change(both, tmp_path / "a", graphs=values), ServingOptions(name="m", max_batch=2)).notes
    assert "only texts of one length share a run" in note


def test_one_python_cannot_hold_two_versions_of_tensorrt(both, tmp_path):
    write_repository(both, tmp_path / "r", ServingOptions(name="m"))
    other = change(both, tmp_path / "other", version="10.13.3.9")
    for name in ("m", "n"):
        with pytest.raises(UsageError, match=r"needs tensorrt==10.13.3.9, and 'm' .* needs tensorrt==10.9.0.34"):
            write_repository(other, tmp_path / "r", ServingOptions(name=name))
    assert write_repository(both, tmp_path / "r", ServingOptions(name="m")).version == 2
    newer = change(both, tmp_path / "newer", version_compatible=True)
    write_repository(newer, tmp_path / "s", ServingOptions(name="m"))
    assert "tensorrt>=10.9.0.34,<11" in (tmp_path / "s/requirements.txt").read_text().split()


def test_damaged_engines_and_missing_tokenizers_are_refused(both, tmp_path):
    copied = shutil.copytree(both, tmp_path / "a")
    (copied / "engines/decode.sm_89.plan").write_bytes(b"other")
    with pytest.raises(OutputError, match=r"decode.sm_89.plan"):
        write_repository(copied, tmp_path / "r")
    values = json.loads((both / "effc.json").read_text())
    del values["files"]["tokenizer.json"]
    bare = shutil.copytree(both, tmp_path / "b")
    (bare / "effc.json").write_text(json.dumps(values))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match=r"has no tokenizer.json"):
        write_repository(bare, tmp_path / "r")


def test_the_command_writes_it_and_the_packaged_server_says_what_to_do(both, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        main(
            ["triton", str(both), "--repository", str(tmp_path / "r"), "--name", "m", "--instances", "gpu:1", "--json"]
        )
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["models"] == ["m"]
    monkeypatch.setattr("effc.serving.serve.find_server", lambda _: ServerProgram(("no",), {}, "packaged"))
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(both)])
    error = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "the packaged server runs on CPU" in error
    assert "requirements.txt" in error and "--target=onnxruntime" in error


class TestModel:
    """What the server's process does with it, here."""

    def open(self, repository: Path, gpu: int):
        from effc.serving.backend.engine_writer_model import TritonPythonModel

        directory = repository / "m/1"
        return TritonPythonModel().open(directory, settings(repository), {"model_instance_device_id": str(gpu)})

    @pytest.fixture
    def modules(self, monkeypatch):
        stub = types.ModuleType("triton_python_backend_utils")
        stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
        monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: {0: 86, 1: 89, 2: 90}.get(gpu))
        monkeypatch.setenv("EFFC_REGISTER_PLUGINS", "1")
        torch = stand_in(monkeypatch, "torch")
        return torch, stand_in(monkeypatch, "tensorrt")

    def test_each_gpu_opens_its_own_engines_and_tries_them(self, ada, ampere, modules, tmp_path):
        write_repository(ada, tmp_path / "r", ServingOptions(name="m", engines=(ampere,), max_batch=3))
        for gpu, arch in ((0, "sm_86"), (1, "sm_89")):
            torch, trt = modules
            trt.loaded_libraries.clear(), trt.runs.clear()
            rows, ends = self.open(tmp_path / "r", gpu)
            assert torch.current_gpu() == gpu
            assert trt.loaded_libraries == [str(tmp_path / f"r/m/1/libeffc_tensorrt.{arch}.so")]
            assert [run[0] for run in trt.runs] == ["prefill", "decode"] and len(rows) == 0
            assert (rows.capacity, rows.longest, ends) == (3, 48, [3])
        with pytest.raises(MissingDependencyError, match="for sm_89, sm_86, and GPU 2 is sm_90"):
            self.open(tmp_path / "r", 2)
        with pytest.raises(MissingDependencyError, match="this machine has no GPU 3"):
            self.open(tmp_path / "r", 3)
        trt.__version__ = "10.13.3.9"
        with pytest.raises(EffcError, match="pip install tensorrt==10.9.0.34"):
            self.open(tmp_path / "r", 0)


class Served:
    """A server with one model, ``m``."""

    def __init__(self, server: Server, plain: Path):
        self.server, self.plain = server, plain

    def stream(self, text: str, **parameters: Any) -> tuple[list[int], str, list[dict[str, Any]]]:
        body = json.dumps({"text_input": text, "stream": True, "ignore_eos": True, **parameters}).encode()
        request = urllib.request.Request(f"http://{self.server.http}/v2/models/m/generate_stream", body)
        with urllib.request.urlopen(request, timeout=60) as response:
            parts = [json.loads(line[5:]) for line in response if line.startswith(b"data:")]
        tokens = [part["token_ids"] for part in parts]
        flat = [token for part in tokens for token in (part if isinstance(part, list) else [part])]
        return flat, "".join(part["text_output"] for part in parts), parts

    def reference(self, text: str, count: int, **options: Any) -> list[int]:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(self.plain)([text], return_tensors="np")["input_ids"]
        model = effc.load(self.plain)
        return model.generate(ids, max_new_tokens=count, eos_token_id=[], **options)[0, ids.shape[1] :].tolist()

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.server.metrics) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def on_cpu(repository: Path) -> None:
    """A server without a GPU refuses instances on one."""
    file = repository / "m/config.pbtxt"
    message = parse_config(file.read_text())
    group = message.instance_group[0]
    group.kind = group.KIND_CPU
    file.write_text(str(message))


@pytest.fixture(scope="module")
def served(both, plain, tmp_path_factory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("served") / "repository"
    write_repository(both, repository, ServingOptions(name="m", max_batch=6))
    on_cpu(repository)
    version = repository / "m/1"
    # In the place of the module that asks the driver.
    (version / "lib/effc/exporters/cuda_device.py").write_text("def device_capability(index): return (86, 89)[index]")
    write_hashes(version)
    program = install_packaged_server()
    environment = {**program.environment, "EFFC_PACKAGES": str(STANDIN)}
    with Server(repository, replace(program, environment=environment)) as server:
        yield Served(server, plain)
    assert server.stop() == 0


@pytest.mark.server
class TestServer:
    def test_tokens_are_those_of_effc_load_one_response_each(self, served):
        tokens, text, parts = served.stream(TEXTS[0], max_tokens=20)
        assert tokens == served.reference(TEXTS[0], 20)
        assert len(parts) == 21 and parts[-1]["finish_reason"] == "length"
        values = {"text_input": TEXTS[0], "max_tokens": 20, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://{served.server.http}/v2/models/m/generate", json.dumps(values).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["text_output"] == text

    def test_texts_that_are_written_together_are_what_they_are_alone(self, served):
        counts = [5, 30, 12, 25, 18, 8, 22, 15, 2, 28]
        prompts = [TEXTS[number % 3] for number in range(len(counts))]
        steps = served.metric("effc_decode_steps")
        with ThreadPoolExecutor(len(counts)) as pool:
            jobs = [pool.submit(served.stream, text, max_tokens=count)
                    for text, count in zip(prompts, counts, strict=True)]  # fmt: skip
            results = [job.result()[0] for job in jobs]
        for text, count, tokens in zip(prompts, counts, results, strict=True):
            assert tokens == served.reference(text, count)
        assert served.metric("effc_decode_steps") - steps < sum(counts)

    def test_drawn_tokens_follow_the_seed_and_stop_texts_end_them(self, served):
        values = {"temperature": 1.3, "top_k": 10, "seed": 5}
        tokens, text, _ = served.stream(TEXTS[0], max_tokens=15, **values)
        assert tokens == served.reference(TEXTS[0], 15, **values)
        stop = text.split()[5]
        _, cut, parts = served.stream(TEXTS[0], max_tokens=15, stop=stop, **values)
        assert parts[-1]["finish_reason"] == "stop" and cut == text.partition(stop)[0]

    def test_cancelled_texts_make_room(self, served):
        before = served.metric("effc_tokens")
        first: queue.Queue[Any] = queue.Queue()
        with grpc.InferenceServerClient(served.server.grpc) as client:
            client.start_stream(lambda result, error: first.put(error or result))
            text, stream = grpc.InferInput("text_input", [1], "BYTES"), grpc.InferInput("stream", [1], "BOOL")
            text.set_data_from_numpy(np.array([TEXTS[0].encode()], dtype=object))
            stream.set_data_from_numpy(np.array([True]))
            for _ in range(60):
                client.async_stream_infer("m", [text, stream], parameters={"max_tokens": 40, "ignore_eos": True})
            first.get(timeout=30)
            client.stop_stream(cancel_requests=True)
        end = time.monotonic() + 30
        while served.metric("nv_inference_pending_request_count") and time.monotonic() < end:
            time.sleep(0.2)
        tokens, _, _ = served.stream(TEXTS[1], max_tokens=4)
        assert tokens == served.reference(TEXTS[1], 4)
        assert 0 < served.metric("effc_tokens") - before < 60 * 40 / 2

    def test_texts_beyond_the_profiles_are_refused_and_not_cut(self, served):
        with pytest.raises(urllib.error.HTTPError) as refused:
            served.stream(TEXTS[0], max_tokens=46)
        assert "46 new ones are more than the 48 that the engines take in all" in refused.value.read().decode()


@pytest.mark.server
def test_a_server_without_a_gpu_says_what_the_engines_need(both, tmp_path):
    write_repository(both, tmp_path / "r", ServingOptions(name="m"))
    on_cpu(tmp_path / "r")
    with (
        pytest.raises(EffcError, match=r"need an NVIDIA GPU \(sm_86, sm_89\), and this machine has none"),
        Server(tmp_path / "r", install_packaged_server()),
    ):
        pass


@pytest.mark.server
def test_a_damaged_plan_keeps_the_model_from_being_loaded(both, tmp_path):
    write_repository(both, tmp_path / "r", ServingOptions(name="m"))
    on_cpu(tmp_path / "r")
    (tmp_path / "r/m/1/decode.sm_86.plan").write_bytes(b"other")
    with (
        pytest.raises(EffcError, match=r"decode\.sm_86\.plan' was changed: its SHA-256"),
        Server(tmp_path / "r", install_packaged_server()),
    ):
        pass
