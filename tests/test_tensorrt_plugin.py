"""The TensorRT plugin library in real plugin registries, and inside an engine.

``EFFC_TENSORRT_LIBRARY`` names a finished library to test. Without it the plugin is compiled around kernels that do
nothing, because the real ones take minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attention_cases import one_node_model, random_inputs

from effc.compiler.cache import cache_directory
from effc.errors import MissingDependencyError, PassFailedError
from effc.exporters.engine_attention import lower_attention
from effc.exporters.engine_build import Request, build_engine
from effc.exporters.engine_graph import make_engine_graph
from effc.exporters.engine_log import PLUGIN, serve
from effc.exporters.engine_states import STATES, state_shapes, with_state
from effc.exporters.half_precision import to_half
from effc.exporters.tensorrt_flavours import FLAVOURS
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_settings import QuantizationSection
from effc.plugins import tensorrt_library
from effc.plugins.forms.registry import parse_form
from effc.plugins.operator import AttentionGeometry

CHECKOUT = Path(__file__).resolve().parents[1]
LEAN = ["10.15.1.29", "10.16.1.11", "11.4.0.106"]
# Creates plugins in a registry and says which of them were made; run with the folder of one TensorRT on sys.path.
PROBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1]); library = sys.argv[2]
registry = trt.get_plugin_registry()
if len(sys.argv) > 4:
    import ctypes
    ctypes.CDLL(library)
else:
    registry.load_library(library)
import numpy as np
def make(operator="SparseAttention", **changes):
    creator = registry.get_creator(operator, "1", "effc")
    assert creator is not None, "there is no creator"
    values = {"pattern": "local:64", "inputs": "key_mask", "causal": 0, "num_heads": 12, "kv_num_heads": 12}
    values = {**values, "scale": 0.1, **changes}
    kinds = {str: trt.PluginFieldType.CHAR, int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
    keep, fields = [], []
    for name, value in values.items():
        if value is None: continue
        data = np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else np.array(
            [value], np.int32 if isinstance(value, int) else np.float32)
        keep.append(data)
        fields.append(trt.PluginField(name, data, kinds[type(value)]))
    try:
        return creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    except Exception:
        return None
cases = json.loads(sys.argv[3])
print(json.dumps({name: make(**changes) is not None for name, changes in cases.items()}))
"""
LINEAR = {"operator": "LinearAttention", "pattern": "linear:elu"}
EIGHT_BIT = {"query_scale": 0.5, "key_scale": 0.25, "value_scale": 2.0, "output_type": 10}
CASES = {
    "plain": {},
    "every input": {"inputs": "key_mask,marks,distance_bias,distance_slope"},
    "no input": {"inputs": ""},
    "grouped, causal, global": {"pattern": "global:16|local:64", "causal": 1, "kv_num_heads": 3},
    "bad pattern": {"pattern": "lokal:64"},
    "unknown input": {"inputs": "mask"},
    "inputs out of order": {"inputs": "marks,key_mask"},
    "heads that do not divide": {"kv_num_heads": 5},
    "no heads": {"num_heads": None},
    "scale of another type": {"scale": 1},
    "linear": {"operator": "LinearAttention", "pattern": "linear:relu", "causal": 1},
    "linear without a mask": {"operator": "LinearAttention", "pattern": "linear:elu", "inputs": ""},
    "linear that is none": {"operator": "LinearAttention", "pattern": "performer:64"},
    "linear with biases": {"operator": "LinearAttention", "pattern": "linear:elu", "inputs": "distance_bias"},
    "chosen blocks": {"pattern": "dense", "inputs": "key_mask,key_blocks", "block_size": 64},
    "chosen blocks of no size": {"pattern": "dense", "inputs": "key_mask,key_blocks"},
    "a size of no blocks": {"pattern": "dense", "block_size": 64},
    "a state to go on from": {**LINEAR, "inputs": "past_state,past_normaliser", "causal": 1, "present_state": 1},
    "half a state": {**LINEAR, "inputs": "past_state", "causal": 1, "present_state": 1},
    "a state that looks ahead": {**LINEAR, "inputs": "key_mask", "present_state": 1},
    "a state of sparse attention": {"causal": 1, "present_state": 1},
    "eight bits": EIGHT_BIT,
    "eight bits without an output's type": {**EIGHT_BIT, "output_type": None},
    "eight bits in, eight bits out": {**EIGHT_BIT, "output_type": 17},
    "a scale that is missing": {**EIGHT_BIT, "key_scale": None},
    "a scale below zero": {**EIGHT_BIT, "value_scale": -1.0},
    "linear in eight bits": {**LINEAR, **EIGHT_BIT},
}
TAKEN = {"plain", "every input", "no input", "grouped, causal, global", "linear", "linear without a mask"}
TAKEN |= {"chosen blocks", "a state to go on from", "eight bits"}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    given = os.environ.get("EFFC_TENSORRT_LIBRARY")
    if given:
        return Path(given)
    if tensorrt_library.find_nvcc() is None:
        pytest.skip("there is no nvcc, which compiles the plugin")
    if tensorrt_library.find_headers() is None:
        pytest.skip("there is no NvInfer.h: pip install --no-deps kernel-lens")
    sources = tmp_path_factory.mktemp("sources")
    for folder in ("pattern", "tensorrt"):
        shutil.copytree(CHECKOUT / "cpp_plugins" / folder, sources / folder)
    (sources / "cuda").mkdir()
    for header in ("attention_tensors", "sparse_attention", "linear_attention", "device_capability"):
        shutil.copy(CHECKOUT / "cpp_plugins/cuda" / f"{header}.hpp", sources / "cuda")
    shutil.copy(CHECKOUT / "tests/native/standin_kernels.cu", sources / "cuda")
    found = tensorrt_library.find_compiler()
    compiler = tensorrt_library.PluginCompiler(found.nvcc, found.include, sources)
    made = tmp_path_factory.mktemp("library") / tensorrt_library.LIBRARY_NAME
    compiler.compile([89], made)
    return made


def created(module: str, library: Path, folder: Path | None = None, *, opened: bool = False) -> dict[str, bool]:
    """Which cases a registry makes a plugin of; with ``opened`` the library registers itself, as Triton needs it."""
    path = os.pathsep.join([str(folder)] if folder else [])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module, str(library), json.dumps(CASES), *(["opened"] if opened else [])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **({"EFFC_REGISTER_PLUGINS": "1"} if opened else {})},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_library_links_no_tensorrt_and_exports_two_functions(library):
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "nvinfer" not in needed and "tensorrt" not in needed and "libcudart" not in needed
    names = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    functions = {line.split()[-1] for line in names.splitlines() if line.split()[1] == "T"}
    assert functions == {"getCreators", "setLoggerFinder"}


def compiled(name: str, folder: Path) -> Path:
    """A program of ``tests/native`` that uses the plugin library."""
    nvcc, include = tensorrt_library.find_nvcc(), tensorrt_library.find_headers()
    if nvcc is None or include is None:
        pytest.skip("there is no nvcc or no NvInfer.h to compile the test with")
    source = CHECKOUT / "tests/native" / f"{name}.cpp"
    subprocess.run([nvcc, "-std=c++17", "-isystem", include, source, "-o", folder / name, "-ldl"], check=True)
    return folder / name


def test_tensorrt_chooses_between_tilings(library, tmp_path):
    done = subprocess.run([compiled("plugin_tactics", tmp_path), library], capture_output=True, text=True)
    assert done.returncode == 0, done
    # Of long inputs in half precision; a decode step, fp32 and linear attention have one way.
    assert done.stdout.split() == ["2", "0", "0", "0"]
    assert "effc::SparseAttention 'layer': it knows no tactic 3." in done.stderr
    if "EFFC_TENSORRT_LIBRARY" not in os.environ:
        assert "its kernel cannot be launched: operation not permitted." in done.stderr, "by the stand-in, if told so"


@pytest.mark.parametrize("operator", ["sparse", "linear"])
def test_a_plan_keeps_every_attribute(library, tmp_path, operator):
    program = compiled("plugin_roundtrip", tmp_path)
    done = subprocess.run([program, library, operator], capture_output=True, text=True)
    assert done.returncode == 0, done
    said = dict(line.split(" (")[0].split("=") for line in done.stdout.splitlines())
    sparse = {
        "pattern": "global:4|local:16",
        "inputs": "marks,distance_slope,key_blocks",
        "block_size": "128",
        "present_state": "0",
        "query_scale": "0.500000",
        "key_scale": "0.250000",
        "value_scale": "2.000000",
        "output_type": "16",
    }
    linear = {
        "pattern": "linear:relu",
        "inputs": "past_state,past_normaliser",
        "block_size": "0",
        "present_state": "1",
        **{f"{name}_scale": "0.000000" for name in ("query", "key", "value")},
        "output_type": "0",
    }
    assert said == {
        **(sparse if operator == "sparse" else linear),
        "causal": "1",
        "num_heads": "6",
        "kv_num_heads": "2",
        "scale": "0.125000",
    }


def test_tensorrt_rtx_creates_the_plugin(library):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert created("tensorrt_rtx", library) == {name: name in TAKEN for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("version", LEAN)
def test_tensorrt_10_and_11_create_the_plugin(library, version):
    folder = cache_directory() / "tests" / f"tensorrt-lean-{version}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        done = subprocess.run([*command, f"tensorrt-lean=={version}"], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"tensorrt-lean {version} cannot be fetched: {done.stderr[-300:]}")
    assert created("tensorrt_lean", library, folder) == {name: name in TAKEN for name in CASES}
    if version.startswith("10."):
        assert created("tensorrt_lean", library, folder, opened=True) == {name: name in TAKEN for name in CASES}
    else:
        with pytest.raises(AssertionError, match="register themselves with TensorRT 10, and this is version 11"):
            created("tensorrt_lean", library, folder, opened=True)


def build(
    library: Path,
    folder: Path,
    half: ir.DataType | None,
    *,
    head_dim: int = 32,
    mask: str = "bool",
    form: str = "global:4|local:16",
):
    """An engine of one attention layer."""
    geometry = AttentionGeometry(parse_form(form), False, 4, 2, head_dim, 0.2)
    extras = {} if form.startswith(("linear", "topk")) else {"distance_bias": np.zeros((4, 33), np.float32)}
    model = one_node_model(geometry, True, extras)
    graph = ir.serde.deserialize_model(model)
    graph.graph[0].name = "encoder.layer.0.attention"
    if half is not None:
        to_half(graph, half)
    lower_attention(graph, True)
    if mask != "bool":
        next(value for value in graph.graph.inputs if value.name == "key_mask").dtype = ir.DataType.INT32
    return build_graph(library, folder, graph)


def build_graph(library: Path, folder: Path, graph: ir.Model):
    """An engine for sm_89 of a graph with batches and lengths that vary."""
    onnx.save(ir.serde.serialize_model(graph), folder / "g.onnx")
    profile = {
        value.name: tuple(
            [dim if isinstance(dim, int) else {"batch": 2}.get(dim.value, most) for dim in value.shape]
            for most in (8, 64, 128)
        )
        for value in graph.graph.inputs
    }
    request = Request(
        "tensorrt_rtx", str(folder / "g.onnx"), str(folder / "plan"), str(folder / "log"), str(library), None, 89,
        [profile],
    )  # fmt: skip
    return build_engine(FLAVOURS["tensorrt_rtx"], request, "layer")


@pytest.mark.parametrize(
    "half",
    [
        pytest.param(None, marks=pytest.mark.slow),
        ir.DataType.FLOAT16,
        pytest.param(ir.DataType.BFLOAT16, marks=pytest.mark.slow),
    ],
)
def test_an_engine_holds_the_plugin_in_every_precision(library, tmp_path, half):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    built = build(library, tmp_path, half)
    assert serve(built.layers, ["encoder.layer.0.attention"], {}).attention == {"encoder.layer.0.attention": PLUGIN}
    assert (tmp_path / "plan").stat().st_size > 1000
    assert not [text for text in built.warnings if "Attribute" in text]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_an_engine_hands_fp8_to_the_plugin(library, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    name = "encoder.layer.0.attention"
    geometry = AttentionGeometry(parse_form("global:4|local:16"), False, 4, 2, 32, 0.2)
    model = ir.serde.deserialize_model(one_node_model(geometry, True))
    model.graph[0].name = name
    samples = [random_inputs(geometry, 2, 20, 20, 0, "right")]
    for step in engine_quantizing_passes(QuantizationSection(attention="fp8"), samples):
        step.run(model)
    graph = make_engine_graph(model, precision, plugin=True).model
    served = serve(build_graph(library, tmp_path, graph).layers, [name], {})
    assert served.attention == {name: f"{PLUGIN}, fp8 inputs"} and served.low == {}
    node = next(node for node in graph.graph if node.name == name)
    for attribute in EIGHT_BIT:
        del node.attributes[attribute]
    with pytest.raises(PassFailedError, match="query is FP8; it must be FP32, FP16 or BF16, or FP8 with query_scale"):
        build_graph(library, tmp_path, graph)


def test_an_engine_holds_linear_attention(library, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    name = "encoder.layer.0.attention"
    built = build(library, tmp_path, ir.DataType.FLOAT16, form="linear:elu")
    served = serve(built.layers, [name], {}, {name: "LinearAttention"})
    assert served.attention == {name: "plugin effc::LinearAttention"}
    with pytest.raises(PassFailedError, match=r"effc::LinearAttention 'encoder.layer.0.attention': .*head_dim"):
        build(library, tmp_path, ir.DataType.FLOAT16, form="linear:elu", head_dim=520)


def test_an_engine_chooses_blocks_for_the_plugin(library, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    name = "encoder.layer.0.attention"
    built = build(library, tmp_path, ir.DataType.FLOAT16, form="topk-blocks:4:64")
    assert serve(built.layers, [name], {}).attention == {name: PLUGIN}
    with pytest.raises(PassFailedError, match=r"effc::SparseAttention 'encoder.layer.0.attention': .*head_dim"):
        build(library, tmp_path, ir.DataType.FLOAT16, form="topk-blocks:4:64", head_dim=520)


def test_an_engine_hands_on_a_state(library, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    name = "decoder.layer.0.attention"
    geometry = AttentionGeometry(parse_form("linear:elu"), True, 4, 2, 32, 0.2)
    graph = ir.serde.deserialize_model(one_node_model(geometry, True))
    node = graph.graph[0]
    node.name = name
    past = [
        ir.Value(name=f"past_{what}.0", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for what, shape in state_shapes(geometry).items()
    ]
    graph.graph.inputs.extend(past)
    for what, value in zip(STATES, with_state(graph, node, past), strict=True):
        value.name = f"present_{what}.0"
        graph.graph.outputs.append(value)
    to_half(graph, ir.DataType.FLOAT16)
    lower_attention(graph, True, past=True)
    built = build_graph(library, tmp_path, graph)
    assert serve(built.layers, [name], {}, {name: "LinearAttention"}).attention == {
        name: "plugin effc::LinearAttention"
    }
    assert [value.dtype for value in graph.graph.outputs[1:]] == [ir.DataType.FLOAT] * 2


def test_what_the_plugin_refuses_reaches_the_user(library, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    with pytest.raises(PassFailedError, match=r"effc::SparseAttention 'encoder.layer.0.attention': .*head_dim"):
        build(library, tmp_path, ir.DataType.FLOAT16, head_dim=520)
    with pytest.raises(PassFailedError, match=r"key_mask is INT32; it must be BOOL"):
        build(library, tmp_path, ir.DataType.FLOAT16, mask="int32")


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("EFFC_TENSORRT_LIBRARY", "/nowhere/lib.so")
    with pytest.raises(MissingDependencyError, match="EFFC_TENSORRT_LIBRARY names '/nowhere/lib.so'"):
        tensorrt_library.existing_library()


def test_compiler_errors_are_passed_on(tmp_path, monkeypatch):
    for folder in ("pattern", "cuda", "tensorrt"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tensorrt/broken.cpp").write_text("int x = ;\n")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "broken.cpp(1): error: expected an expression" >&2; exit 1\n')
    nvcc.chmod(0o755)
    compiler = tensorrt_library.PluginCompiler(str(nvcc), tmp_path, tmp_path)
    with pytest.raises(PassFailedError, match="error: expected an expression"):
        compiler.compile([89], tmp_path / "lib.so")


def test_another_architecture_is_another_library(tmp_path, monkeypatch):
    for folder in ("pattern", "cuda", "tensorrt"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tensorrt_library.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="V13"))
    compiler = tensorrt_library.PluginCompiler("nvcc", tmp_path, tmp_path)
    first = compiler.key([89])
    assert compiler.key([86, 89]) != first
    (tmp_path / "cuda/kernel.cuh").write_text("// new\n")
    assert compiler.key([89]) != first
