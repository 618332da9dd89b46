"""Repositories of TensorRT engines: what is written, and that a real server takes the configuration.

There is no GPU here. A shim in the place of Triton's TensorRT backend lets the server load the configuration, which
proves that it and the layout are right, not that an engine runs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_triton_repository import artifact

from effc.cli import main
from effc.compiler.artifact_files import read_manifest
from effc.compiler.manifest import EngineRecord, EnginesRecord, FileRecord
from effc.errors import UsageError
from effc.exporters.triton_config import Instances, Tensor, parse_config
from effc.serving.deployment import plan_artifact
from effc.serving.engines import EngineSet, Profile, engine_set, write_engines
from effc.serving.options import ServingOptions
from effc.serving.packaged import ServerProgram
from effc.serving.repository import check_repository, write_repository
from effc.serving.repository_record import engine_flags
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


def compiled(
    folder: Path, flavour: str = "tensorrt", arch: str = "sm_120", *, version: str = "10.9.0.34", text: bool = False,
    shapes: Sequence[tuple[int, int]] = ((1, 16), (8, 64)), mode: str | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """An artifact whose effc.json says what the compiler says of engines; files of a few bytes stand in for them.

    Args:
        shapes: batch and length of each profile.
        mode: of quantization.
        changes: of the record of the engines.
    """
    artifact(folder, text=text)
    manifest = read_manifest(folder)
    (folder / "engines").mkdir()
    # Each architecture's library differs, as those of different compiles do.
    files = {
        f"engines/forward.{arch}.plan": f"plan {arch}".encode(),
        "engines/libeffc_tensorrt.so": f"library {arch}".encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest.files |= {
        name: FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for name, content in files.items()
    }
    names = [record.name for record in manifest.inputs]
    engine = EngineRecord(
        file=f"engines/forward.{arch}.plan",
        graph="forward",
        arch=arch,
        seconds=1,
        profiles=[{name: [[1, 1], list(shape), list(shape)] for name in names} for shape in shapes],
        inputs=manifest.inputs,
        outputs=[record.model_copy(update={"dtype": "float"}) for record in manifest.outputs],
        attention={},
        linears={},
        low={mode: 1} if mode else {},
    )
    record = EnginesRecord(
        flavour=flavour, version=version, precision="fp16", plugin="engines/libeffc_tensorrt.so", graphs={},
        engines=[engine],
    )  # fmt: skip
    manifest.engines = record.model_copy(update=changes)
    manifest.target = flavour
    manifest.recipe = {"quantization": {"mode": mode or "none"}}
    (folder / "effc.json").write_text(manifest.model_dump_json())
    return folder


def test_engines_of_an_artifact_take_text(tmp_path):
    path = compiled(tmp_path / "a", text=True)
    options = ServingOptions(name="m", server_tensorrt="10.9.0", cuda_graphs=("1x16", "8x64"))
    done = write_repository(path, tmp_path / "r", options)
    assert done.models == ("m_model", "m_tokenizer", "m_output", "m")
    message = parse_config((tmp_path / "r/m_model/config.pbtxt").read_text())
    assert (message.backend, message.max_batch_size) == ("tensorrt", 8)
    assert dict(message.cc_model_filenames) == {"12.0": "sm120.plan"}
    [group] = message.instance_group
    assert group.kind == group.KIND_GPU and list(group.profile) == ["0", "1"]
    graphs = [(spec.batch_size, {name: list(shape.dim) for name, shape in spec.input.items()})
              for spec in message.optimization.cuda.graph_spec]  # fmt: skip
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert graphs == [(batch, {name: [length] for name in names}) for batch, length in ((1, 16), (8, 64))]
    assert {entry.name: entry.optional for entry in message.input} == dict.fromkeys(names, False)
    assert (tmp_path / "r/m_model/1/libeffc_tensorrt.so").read_bytes() == b"library sm_120"
    assert "/m_model/1/libeffc_tensorrt.so" in (tmp_path / "r/launch.sh").read_text()
    assert "export EFFC_REGISTER_PLUGINS=1" in (tmp_path / "r/launch.sh").read_text()
    assert done.notes == ()
    assert check_repository(tmp_path / "r") == ["m"]


def test_plugins_beside_engines_of_tensorrt_11_are_said_not_to_register(tmp_path):
    path = compiled(tmp_path / "a", text=True)
    values = json.loads((path / "effc.json").read_text())
    values["engines"]["version"] = "11.4.0.106"
    (path / "effc.json").write_text(json.dumps(values))
    notes = plan_artifact(path, ServingOptions(name="m", server_tensorrt="11.4.0")).notes
    assert any("--embed-plugin" in note for note in notes)


def test_batch_and_length_are_fitted_to_the_profiles(tmp_path):
    path = compiled(tmp_path / "a", text=True, shapes=[(8, 16), (2, 32)])
    plan = plan_artifact(path, ServingOptions(name="m"))
    assert {model.config.max_batch for model in plan.models} == {2}
    assert any("--max-batch 8 was lowered to 2" in note for note in plan.notes)
    assert any("TensorRT 10.9.0.34 only" in note for note in plan.notes)
    tokenizer = plan.models[1].files["effc_model.json"]
    assert json.loads(tokenizer)["tokenizer"]["max_length"] == 32
    with pytest.raises(UsageError, match="at most 32 tokens, not 40"):
        plan_artifact(path, ServingOptions(max_length=40))


def test_an_embedded_plugin_and_plans_for_other_releases_need_the_servers_leave(tmp_path):
    path = compiled(tmp_path / "a", plugin=None, plugin_embedded=True)
    done = write_repository(path, tmp_path / "r", ServingOptions(name="m", server_tensorrt="10.9.0"))
    assert done.notes == () and not (tmp_path / "r/m/1/libeffc_tensorrt.so").exists()
    assert "--backend-config=tensorrt,version-compatible=true" in (tmp_path / "r/launch.sh").read_text()
    values = json.loads((path / "effc.json").read_text())
    values["recipe"] = {"engine": {"version_compatible": True}}
    (path / "effc.json").write_text(json.dumps(values))
    plan_artifact(path, ServingOptions(server_tensorrt="10.13.2"))
    for version in ("10.8.0", "11.0.0"):
        with pytest.raises(UsageError, match=f"the server has {version}"):
            plan_artifact(path, ServingOptions(server_tensorrt=version))


def test_engines_for_several_gpus_become_one_model(tmp_path):
    ada, hopper = (compiled(tmp_path / arch, arch=arch, text=True) for arch in ("sm_89", "sm_90"))
    done = write_repository(hopper, tmp_path / "r", ServingOptions(name="m", engines=(ada,)))
    message = parse_config((tmp_path / "r/m_model/config.pbtxt").read_text())
    assert dict(message.cc_model_filenames) == {"9.0": "sm90.plan", "8.9": "sm89.plan"}
    assert (tmp_path / "r/m_model/1/sm89.plan").read_bytes() == b"plan sm_89"
    # One library, since TensorRT registers a plugin once: that whose portable code runs on both.
    assert (tmp_path / "r/m_model/1/libeffc_tensorrt.so").read_bytes() == b"library sm_89"
    assert any("compiled for the oldest GPU" in note for note in done.notes)
    for other, message in (
        (compiled(tmp_path / "x", arch="sm_90"), "Two artifacts hold an engine for compute capability 9.0"),
        (compiled(tmp_path / "y", arch="sm_86", shapes=[(4, 16)]), "other profiles"),
        (compiled(tmp_path / "z", arch="sm_86", version="10.8.0"), "other TensorRT"),
        (compiled(tmp_path / "w", "tensorrt_rtx", arch="sm_86"), "are TensorRT-RTX's"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_artifact(hopper, ServingOptions(engines=(other,)))


def test_engines_that_triton_does_not_run_are_refused(tmp_path):
    rtx = compiled(tmp_path / "rtx", "tensorrt_rtx")
    with pytest.raises(UsageError, match="(?s)are TensorRT-RTX's.*--target=tensorrt.*--backend python"):
        plan_artifact(rtx, ServingOptions())
    assert plan_artifact(rtx, ServingOptions(backend="python")).models[0].config.backend == "python"
    with pytest.raises(UsageError, match="no engine of its prefill graph"):
        engine_set(compiled(tmp_path / "forward"), "prefill")
    with pytest.raises(UsageError, match="holds no engines"):
        plan_artifact(artifact(tmp_path / "plain"), ServingOptions(backend="tensorrt"))


def together(folder: Path, arch: str = "sm_90") -> Path:
    """An artifact whose engine is that of two GPUs, with the same file of a few bytes for each."""
    path = compiled(folder, arch=arch, version="11.4.0", text=True, shapes=[(8, 64)])
    values = json.loads((path / "effc.json").read_text())
    [engine] = values["engines"]["engines"]
    values["engines"] |= {
        "tensor_parallel": 2, "plugin": None, "plugin_embedded": True,
        "engines": [engine | {"rank": rank} for rank in range(2)],
    }  # fmt: skip
    (path / "effc.json").write_text(json.dumps(values))
    return path


def test_gpus_that_compute_together_are_one_instance(tmp_path):
    path = together(tmp_path / "a")
    done = write_repository(path, tmp_path / "r", ServingOptions(name="m", instances=Instances("gpu", 1, (2, 3))))
    message = parse_config((tmp_path / "r/m_model/config.pbtxt").read_text())
    [group] = message.instance_group
    assert group.kind == group.KIND_MODEL and group.count == 1 and not group.gpus and list(group.profile) == ["0"]
    assert not message.cc_model_filenames
    assert {name: value.string_value for name, value in message.parameters.items()} == {
        "enable_multi_device": "true", "multi_device_gpus": "2,3", "multi_device_per_rank_engines": "true",
    }  # fmt: skip
    files = {file.name for file in (tmp_path / "r/m_model/1").iterdir()}
    assert {"model.plan", "model.plan.rank0", "model.plan.rank1"} <= files
    assert "--gpus all" in (tmp_path / "r/launch.sh").read_text()
    assert any("TRITON_ENABLE_TENSORRT_MULTI_DEVICE" in note for note in done.notes)
    assert check_repository(tmp_path / "r") == ["m"]
    first = write_repository(path, tmp_path / "r", ServingOptions(name="m"))
    message = parse_config((tmp_path / "r/m_model/config.pbtxt").read_text())
    assert first.version == 2 and message.parameters["multi_device_gpus"].string_value == "0,1"


def test_options_that_do_not_fit_gpus_that_compute_together_are_refused(tmp_path):
    path = together(tmp_path / "a")
    for options, message in (
        ({"instances": Instances("gpu", 1, (0, 1, 2))}, "2 GPUs compute these engines together.*names 3"),
        ({"cuda_graphs": ("1x16",)}, "no CUDA graphs of GPUs that compute together"),
        ({"engines": (together(tmp_path / "b", "sm_89"),)}, "served by themselves"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_artifact(path, ServingOptions(name="m", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_tensorrt": "10.8.0"}, "built with TensorRT 10.9.0.34, and the server has 10.8.0"),
        ({"server_tensorrt": "10.9.0.35"}, "the server has 10.9.0.35"),
        ({"threads": 2}, "--threads means nothing where TensorRT engines run"),
        ({"stages": 2}, "--stages means nothing"),
        ({"instances": Instances("cpu", 2)}, "--instances cpu means nothing"),
        ({"cuda_graphs": ("8",)}, "says no length"),
        ({"cuda_graphs": ("x",)}, "is not BATCHxLENGTH"),
        ({"cuda_graphs": ("4x65",)}, "fits no profile"),
        ({"cuda_graphs": ("8x64",), "max_batch": 4}, "8 rows is never used"),
        ({"backend": "python", "cuda_graphs": ("1x16",)}, "--cuda-graphs means nothing where no engines run"),
    ],
)
def test_options_that_do_not_fit_engines_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        plan_artifact(compiled(tmp_path / "a"), ServingOptions(**options))


def test_the_command_writes_engines_and_the_packaged_server_says_that_it_cannot_run_them(tmp_path, capsys, monkeypatch):
    ada, hopper = (compiled(tmp_path / arch, arch=arch) for arch in ("sm_89", "sm_90"))
    flags = ["--engines", str(hopper), "--server-tensorrt", "10.9.0", "--cuda-graphs", "1x16,4x16", "--instances"]
    main_exits(0, "triton", ada, "--repository", tmp_path / "r", "--name", "m", *flags, "gpu:1", "--json")
    assert json.loads(capsys.readouterr().out)["models"] == ["m"]
    message = parse_config((tmp_path / "r/m/config.pbtxt").read_text())
    assert len(message.cc_model_filenames) == 2 and len(message.optimization.cuda.graph_spec) == 2
    assert list(message.instance_group[0].gpus) == [1]
    monkeypatch.setattr("effc.serving.serve.find_server", lambda _: ServerProgram(("no",), {}, "packaged"))
    main_exits(2, "serve", ada)
    assert "the packaged server runs on CPU" in capsys.readouterr().err


def main_exits(status: int, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == status


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
        ({}, {"max_batch": 8}, "take 4 rows of the longest inputs"),
        ({"files": {"89": Path("x")}}, {}, "no compute capability"),
        ({"files": {"8.9": Path("none.plan")}}, {}, "no engine 'none.plan'"),
        ({"files": {}}, {}, "no engine, or no profile"),
        ({"profiles": [Profile({"input_ids": [8, 128]})]}, {}, "does not describe the inputs"),
        ({"plugins": [Path("none.so")]}, {}, "no plugin library"),
        ({"cuda_graphs": [(1, {"input_ids": [5000]})]}, {}, "fits no profile"),
        ({"cuda_graphs": [(1, {"input_ids": [100], "attention_mask": [5000]})]}, {}, "fits no profile"),
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
    repository = tmp_path / "r"
    for name, mode, shapes in (("fp16", None, ("1x16", "4x64")), ("int8", "int8", ()), ("fp8", "fp8", ())):
        path = compiled(tmp_path / name, text=name == "fp16", mode=mode)
        options = ServingOptions(name=name, max_batch=4, server_tensorrt="10.9.0", cuda_graphs=shapes, keep=1)
        write_repository(path, repository, options)
    # What a user's own engines give in half precision.
    write_engines(engines(tmp_path / "own"), repository, "own", max_batch=4, server_tensorrt="10.9.0")
    # The shim's server knows no instance that places itself, so that this one's is changed like the others'.
    write_repository(together(tmp_path / "two"), repository, ServingOptions(name="two", max_batch=4, keep=1))
    written = {}
    for name in ("fp16_model", "int8", "fp8", "own", "two_model"):
        file = repository / name / "config.pbtxt"
        written[name] = parse_config(file.read_text())
        changed = parse_config(file.read_text())
        # A server without a GPU refuses instances on one, and a warm-up would run the engine.
        del changed.instance_group[:], changed.model_warmup[:]
        changed.instance_group.add(count=1, kind=changed.instance_group.add().KIND_CPU)
        del changed.instance_group[0]
        file.write_text(str(changed))
    extra = ("--disable-auto-complete-config", *engine_flags(repository))
    assert sum(flag.count(".so") for flag in extra) == 4
    with (
        Server(repository, replace(program, command=command), extra=extra) as server,
        grpc.InferenceServerClient(server.grpc) as client,
    ):
        assert client.is_model_ready("fp16")
        for name, message in written.items():
            assert client.is_model_ready(name)
            taken = client.get_model_config(name).config
            assert taken.backend == "tensorrt" and taken.max_batch_size == 4
            assert taken.cc_model_filenames == message.cc_model_filenames
            assert taken.optimization.cuda == message.optimization.cuda
            assert taken.parameters == message.parameters
            assert list(taken.input) == list(message.input) and list(taken.output) == list(message.output)
