"""What is refused before anything is built; profiles; which engine and profile runs. Needs no TensorRT."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from effc.compiler import engine_check
from effc.compiler.engine_check import check_engine
from effc.compiler.engine_choice import choose_profile, what_is_missing
from effc.compiler.engine_profiles import make_profiles
from effc.compiler.manifest import EngineRecord, EnginesRecord
from effc.compiler.recipe import build_recipe
from effc.errors import EffcError, MissingDependencyError, PreconditionError, UsageError
from effc.exporters import tensorrt_flavours
from effc.exporters.engine_caches import EngineCache
from effc.exporters.tensorrt_flavours import FLAVOURS
from effc.passes.engine_settings import default_shapes
from effc.plugins import tensorrt_library

RTX = {"target": "tensorrt_rtx", "engine": {"arch": "sm_89"}}


@pytest.fixture
def installed(monkeypatch):
    """TensorRT and a plugin seem to be there, and no GPU."""
    monkeypatch.setattr(engine_check, "require_flavour", lambda target: FLAVOURS[target])
    monkeypatch.setattr(engine_check, "existing_library", lambda: Path("libeffc_tensorrt.so"))
    monkeypatch.setattr(tensorrt_flavours, "device_capability", lambda: None)


def refusal(recipe: dict) -> EffcError:
    with pytest.raises(EffcError) as found:
        check_engine(build_recipe(recipe))
    return found.value


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"shapes": "8 by 512"}, "is not BATCHxLENGTH"),
        ({"shapes": "0x512"}, "is not BATCHxLENGTH"),
        ({"shapes": "8x512,8x512"}, "named twice"),
        ({"arch": "89"}, "'89' is not an architecture such as sm_89"),
        ({"precision": "fp64"}, "precision"),
        ({"plug_in": True}, "plugin"),
    ],
)
def test_sections_that_make_no_sense_are_refused(section, said):
    with pytest.raises(UsageError, match=said):
        build_recipe({"engine": section})


@pytest.mark.parametrize(
    ("recipe", "kind", "said"),
    [
        (
            {"engine": {"arch": "sm_86"}, "quantization": {"attention": "fp8"}},
            PreconditionError,
            "sm_86 has no FP8 products; they came with sm_89",
        ),
        (
            {"engine": {"arch": "sm_86,sm_89"}, "quantization": "fp8"},
            PreconditionError,
            "sm_86 has no FP8 products; they came with sm_89",
        ),
        ({"engine": {"arch": "sm_75"}, "attention": "local:64"}, PreconditionError, "sm_75 is older than effc's"),
        ({"engine": {"arch": "sm_90"}}, UsageError, "does not build for sm_90. It builds for sm_75, sm_80"),
        ({"quantization": {"mode": "int8"}}, PreconditionError, "no calibration data. Give --calibration"),
        ({"quantization": "int4-weights"}, PreconditionError, "Engines hold no layers of 'int4-weights'"),
        ({"quantization": "auto:0.01"}, UsageError, "measures ONNX Runtime's kernels"),
        ({"quantization": {"mode": "int8", "activations": "token"}}, PreconditionError, "one for each token"),
        ({"quantization": {"mode": "int8", "reduce_range": True}}, PreconditionError, "7-bit weights are for CPUs"),
        ({"engine": {"plugin": False, "embed_plugin": True}}, UsageError, "into the plan and is not used"),
        ({"engine": {"refit": True}}, PreconditionError, "only where there is a GPU"),
        ({"engine": {"version_compatible": True}}, PreconditionError, "lacks the lean runtime"),
        ({"require": {"min_speedup": 2}}, UsageError, "not timed"),
        ({"quantization": "bf16", "engine": {"precision": "fp16"}}, UsageError, "says bf16"),
        ({"target": "tensorrt"}, UsageError, "this machine has none. Compile on that machine"),
        ({"target": "onnxruntime", "engine": {"arch": "sm_89"}}, UsageError, "the target 'onnxruntime' has none"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(installed, recipe, kind, said):
    error = refusal({"target": "tensorrt_rtx"} | recipe)
    assert isinstance(error, kind) and said in str(error)


def test_architectures_that_cannot_are_left_out_where_none_was_named(installed):
    recipe = {"target": "tensorrt_rtx", "quantization": {"mode": "fp8", "calibration": {"data": "x.txt"}}}
    plan = check_engine(build_recipe(recipe))
    assert plan is not None and plan.capabilities == (89, 120) and plan.precision == "fp16"


def test_half_precision_can_be_asked_for_as_quantization(installed):
    plan = check_engine(build_recipe(RTX | {"quantization": "bf16"}))
    assert plan is not None and plan.precision == "bf16"


def test_a_plugin_that_cannot_be_compiled_is_missed_early(monkeypatch, installed):
    monkeypatch.setattr(engine_check, "existing_library", lambda: None)
    monkeypatch.setattr(tensorrt_library, "find_nvcc", lambda: None)
    error = refusal(RTX | {"attention": "local:64"})
    assert isinstance(error, MissingDependencyError)
    assert "no CUDA compiler (nvcc)" in str(error) and "--no-plugin" in str(error)
    assert check_engine(build_recipe(RTX | {"attention": "dense"})) is not None
    without = {"target": "tensorrt_rtx", "engine": {"arch": "sm_89", "plugin": False}, "attention": "local:64"}
    assert check_engine(build_recipe(without)) is not None


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt_rtx"])
def test_a_compile_without_tensorrt_says_what_to_install_at_once(tmp_path, target):
    # An empty folder in place of the packages: nothing but effc and what it needs is found.
    code = (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {target!r} else real(name, *rest)\n"
        f"sys.argv = ['effc', 'compile', {str(tmp_path)!r}, '--target={target}', '-o', {str(tmp_path / 'o')!r}]\n"
        "from effc.cli import main; main()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the CPU, because other tests run beside this one.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2 and f"pip install {FLAVOURS[target].package}" in done.stderr
    assert seconds < 3


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))


def test_a_profile_takes_everything_up_to_its_shape():
    (profile,) = make_profiles([value("input_ids", "batch", "sequence")], ["4x128"], 512)
    assert profile == {"input_ids": ([1, 1], [4, 128], [4, 128])}


def test_caches_of_a_decode_graph_grow_to_what_their_layers_see():
    inputs = [value("input_ids", "batch", 1), value("attention_mask", "batch", "total")]
    inputs += [value("past_key.0", "batch", "past.0", 64), value("past_key.1", "batch", "past.1", 64)]
    caches = [EngineCache("a", "past.0", 31, 64), EngineCache("b", "past.1", None, 64)]
    (profile,) = make_profiles(inputs, ["2x100"], None, caches)
    assert profile["input_ids"][2] == [2, 1] and profile["attention_mask"] == ([1, 2], [2, 100], [2, 100])
    assert profile["past_key.0"][2] == [2, 31, 64] and profile["past_key.1"][2] == [2, 99, 64]


def test_shapes_that_do_not_fit_the_model_are_refused():
    text = [value("input_ids", "batch", "sequence")]
    with pytest.raises(UsageError, match="longer than the model's 512 positions"):
        make_profiles(text, ["1x1024"], 512)
    with pytest.raises(UsageError, match="says no length"):
        make_profiles(text, ["8"], 512)
    assert make_profiles([value("pixel_values", "batch", 3, 32, 32)], ["8"], None)[0]["pixel_values"][2][0] == 8


def test_default_shapes_keep_to_the_model():
    assert default_shapes(512) == ["1x128", "8x512"] and default_shapes(64) == ["1x64", "8x64"]
    assert default_shapes(32768)[-1] == "8x4096"


def engine(arch: str = "sm_89", *shapes: tuple[int, int]) -> EngineRecord:
    return EngineRecord(
        file=f"engines/forward.{arch}.plan",
        graph="forward",
        arch=arch,
        seconds=1,
        profiles=[{"input_ids": [[1, 1], list(shape), list(shape)]} for shape in shapes],
        inputs=[],
        outputs=[],
        attention={},
        linears={},
        low={},
    )


def test_the_smallest_profile_that_fits_runs():
    record = engine("sm_89", (8, 512), (1, 128), (8, 128))
    chosen = [choose_profile(record, {"input_ids": shape}) for shape in [(1, 100), (2, 100), (1, 129)]]
    assert chosen == [1, 2, 0]
    with pytest.raises(UsageError, match=r"up to \[8, 512\], and \[9, 10\] was given"):
        choose_profile(record, {"input_ids": (9, 10)})


def test_what_engines_miss_is_said(monkeypatch):
    record = EnginesRecord(
        flavour="tensorrt_rtx", version="1.7.1", precision="fp16", graphs={}, engines=[engine("sm_89"), engine("sm_86")]
    )
    from effc.compiler import engine_choice

    monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: None)
    assert "need an NVIDIA GPU (sm_89, sm_86)" in str(what_is_missing(record))
    monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: 120)
    assert "this GPU is sm_120: compile with --arch=sm_120" in str(what_is_missing(record))
    monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: 89)
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorrt-rtx==1.7.1" in str(what_is_missing(record))
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda name: object())
    assert what_is_missing(record) is None
