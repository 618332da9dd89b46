"""Repositories of TensorRT engines: what is written, and that a real server takes the configuration.

There is no GPU here. A shim in the place of Triton's TensorRT backend lets the server load the configuration, which
proves that it and the layout are right, not that an engine runs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_artifacts import token_manifest, token_model

from effc.compiler.manifest import EngineRecord, EnginesRecord, FileRecord, TensorRecord
from effc.errors import UsageError
from effc.exporters.triton_config import Tensor, parse_config
from effc.serving.engines import EngineSet, Profile, engine_set, write_engines
from effc.serving.repository import check_repository
from effc.serving.server import Server

pytest.importorskip("tritonclient.grpc")

SHIM = """
class TritonPythonModel:
    def execute(self, requests):
        raise NotImplementedError("this is no TensorRT")
"""


def engines(folder: Path, dtype: str = "float16") -> EngineSet:
    folder.mkdir(exist_ok=True)
    for name in ("ada.plan", "hopper.plan", "libattention.so"):
        (folder / name).write_bytes(name.encode())
    return EngineSet(
        files={"8.9": folder / "ada.plan", "9.0": folder / "hopper.plan"},
        inputs=[Tensor("input_ids", "int64", (-1,)), Tensor("attention_mask", "bool", (-1,))],
        outputs=[Tensor("last_hidden_state", dtype, (-1, 384))],
        profiles=[Profile({"input_ids": [8, 128], "attention_mask": [8, 128]}),
                  Profile({"input_ids": [4, 4096], "attention_mask": [4, 4096]})],
        tensorrt="10.9.0",
        plugins=[folder / "libattention.so"],
        cuda_graphs=[(1, {"input_ids": [128], "attention_mask": [128]})],
    )  # fmt: skip


def compiled(folder: Path, flavour: str) -> Path:
    """An artifact that says it has an engine."""
    folder.mkdir(exist_ok=True)
    token_model(folder / "model.onnx")
    manifest = token_manifest(folder)
    (folder / "engines").mkdir()
    files = {"engines/forward.sm_120.plan": b"plan", "engines/libeffc_tensorrt.so": b"library"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest.files |= {
        name: FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for name, content in files.items()
    }
    engine = EngineRecord(
        file="engines/forward.sm_120.plan",
        graph="forward",
        arch="sm_120",
        seconds=1,
        profiles=[{"input_ids": [[1, 1], [8, 128], [8, 128]]}],
        inputs=[TensorRecord(name="input_ids", dtype="int64", shape=["batch", "sequence"])],
        outputs=[TensorRecord(name="pooler_output", dtype="float", shape=["batch", 16])],
        attention={},
        linears={},
        low={},
    )
    manifest.engines = EnginesRecord(
        flavour=flavour, version="10.9.0", precision="fp16", plugin="engines/libeffc_tensorrt.so", graphs={},
        engines=[engine],
    )  # fmt: skip
    (folder / "effc.json").write_text(manifest.model_dump_json())
    return folder


def test_engines_of_an_artifact_can_be_served(tmp_path):
    found = engine_set(compiled(tmp_path / "a", "tensorrt"))
    assert list(found.files) == ["12.0"] and found.outputs == [Tensor("pooler_output", "float32", (16,))]
    write_engines(found, tmp_path / "r", "bert", max_batch=8, server_tensorrt="10.9.0")
    message = parse_config((tmp_path / "r/bert/config.pbtxt").read_text())
    assert dict(message.cc_model_filenames) == {"12.0": "sm120.plan"}
    assert (tmp_path / "r/bert/1/libeffc_tensorrt.so").read_bytes() == b"library"


def test_engines_that_triton_does_not_run_are_refused(tmp_path):
    with pytest.raises(UsageError, match="these are TensorRT-RTX's"):
        engine_set(compiled(tmp_path / "a", "tensorrt_rtx"))
    with pytest.raises(UsageError, match="no engine of its decode graph"):
        engine_set(tmp_path / "a", "decode")


def test_engines_plugins_and_profiles_are_written(tmp_path):
    done = write_engines(
        engines(tmp_path / "e"), tmp_path / "r", "bert", max_batch=4, server_tensorrt="10.9.0", gpus=(0, 1)
    )
    assert done.models == ("bert",) and check_repository(tmp_path / "r") == ["bert"]
    message = parse_config((tmp_path / "r/bert/config.pbtxt").read_text())
    assert dict(message.cc_model_filenames) == {"8.9": "sm89.plan", "9.0": "sm90.plan"}
    assert (tmp_path / "r/bert/1/sm90.plan").read_bytes() == b"hopper.plan"
    assert list(message.instance_group[0].profile) == ["0", "1"] and list(message.instance_group[0].gpus) == [0, 1]


def test_the_launch_script_starts_a_server_with_every_models_plugins(tmp_path):
    repository = tmp_path / "a b"
    for name in ("first", "second", "second"):
        write_engines(engines(tmp_path / "e"), repository, name, max_batch=4, server_tensorrt="10.9.0")
    (tmp_path / "bin").mkdir()
    server = tmp_path / "bin/tritonserver"
    server.write_text('#!/bin/sh\nfor flag in "$@"; do echo "$flag"; done\n')
    server.chmod(0o755)
    environment = {"PATH": f"{server.parent}:/usr/bin:/bin", "HTTP_PORT": "9000"}
    done = subprocess.run([repository / "launch.sh", "--log-info=0"], env=environment, capture_output=True, text=True)
    flags = done.stdout.splitlines()
    assert f"--model-repository={repository}" in flags and "--log-info=0" in flags
    assert {"--http-address=127.0.0.1", "--http-port=9000", "--grpc-address=127.0.0.1"} <= set(flags)
    libraries = [f"{repository}/{place}/libattention.so" for place in ("first/1", "second/2")]
    assert f"--backend-config=tensorrt,plugins={';'.join(libraries)}" in flags


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"server_tensorrt": "10.8.0"}, "built with TensorRT 10.9.0, and the server has 10.8.0"),
        ({}, {"max_batch": 8}, "Profile 1 takes 4 rows"),
        ({"files": {"89": Path("x")}}, {}, "no compute capability"),
        ({"files": {"8.9": Path("none.plan")}}, {}, "no engine 'none.plan'"),
        ({"files": {}}, {}, "no engine, or no profile"),
        ({"profiles": [Profile({"input_ids": [8, 128]})]}, {}, "does not describe the inputs"),
        ({"plugins": [Path("none.so")]}, {}, "no plugin library"),
        ({"cuda_graphs": [(1, {"input_ids": [5000]})]}, {}, "fits no profile"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, arguments, message):
    given = replace(engines(tmp_path / "e"), **change)
    with pytest.raises(UsageError, match=message):
        write_engines(given, tmp_path / "r", "m", **{"max_batch": 4, "server_tensorrt": "10.9.0", **arguments})
    assert not (tmp_path / "r").exists()


@pytest.mark.server
def test_a_real_server_takes_the_configuration(tmp_path):
    import tritonclient.grpc as grpc

    from effc.serving.packaged import install_packaged_server

    program = install_packaged_server()
    [backends] = [flag.partition("=")[2] for flag in program.command if flag.startswith("--backend-directory=")]
    (tmp_path / "backends/tensorrt").mkdir(parents=True)
    (tmp_path / "backends/python").symlink_to(Path(backends) / "python")
    (tmp_path / "backends/tensorrt/model.py").write_text(SHIM)
    command = tuple(
        f"--backend-directory={tmp_path / 'backends'}" if flag.startswith("--backend-directory") else flag
        for flag in program.command
    )
    # Precisions inside an engine (INT8, FP8) do not show; those of its outputs do.
    for name, dtype in (("fp16", "float16"), ("fp32", "float32")):
        write_engines(engines(tmp_path / "e", dtype), tmp_path / "r", name, max_batch=4, server_tensorrt="10.9.0")
    # A server without a GPU refuses instances on one, so they are moved for the check.
    override = {"instance_group": [{"kind": "KIND_CPU", "count": 1}]}
    extra = ("--disable-auto-complete-config",)
    with (
        Server(tmp_path / "r", replace(program, command=command), control="explicit", extra=extra) as server,
        grpc.InferenceServerClient(server.grpc) as client,
    ):
        for name in ("fp16", "fp32"):
            written = parse_config((tmp_path / "r" / name / "config.pbtxt").read_text())
            from google.protobuf.json_format import MessageToDict

            asked = MessageToDict(written, preserving_proto_field_name=True) | override
            client.load_model(name, config=json.dumps(asked))
            assert client.is_model_ready(name)
            taken = client.get_model_config(name).config
            assert taken.backend == "tensorrt" and taken.max_batch_size == 4
            assert taken.cc_model_filenames == written.cc_model_filenames
            assert taken.optimization.cuda.graphs
            assert taken.optimization.cuda.graph_spec == written.optimization.cuda.graph_spec
            assert list(taken.input) == list(written.input) and list(taken.output) == list(written.output)
