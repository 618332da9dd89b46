"""Torch-TensorRT as a target: what is refused, and the exported program, which runs in plain torch."""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys

import pytest
import tiny_checkpoints
import torch

from effc.compiler import engine_torch
from effc.compiler.engine_check import check_engine
from effc.compiler.inputs import dynamic_axes, ragged_inputs
from effc.compiler.recipe import build_recipe
from effc.compiler.rewrite import rewrite
from effc.compiler.source import load, locate
from effc.errors import PreconditionError, UsageError
from effc.exporters.engine_torch import export_program, moved


def exported(path, form: str):
    recipe = build_recipe({"model": str(path), "attention": {"pattern": form, "force": True}})
    source = load(locate(recipe.model))
    rewrite(source, recipe.attention)
    inputs = ragged_inputs(source, [20, 11])
    return source, export_program(source.model, inputs, dynamic_axes(inputs))


@pytest.mark.parametrize("form", ["local:4|global:1", pytest.param("linear:elu", marks=pytest.mark.slow)])
def test_the_exported_program_computes_what_the_model_does(tmp_path, form):
    source, program = exported(tiny_checkpoints.save_lively(tmp_path / "m", "BertModel"), form)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.effc.attention.default]
    assert len(calls) == source.model.config.num_hidden_layers
    other = ragged_inputs(source, [31, 7, 3])
    with torch.no_grad():
        wanted, found = source.model(**other), program.module()(**other)
    rows = other["attention_mask"].bool()
    torch.testing.assert_close(found[0][rows], wanted[0][rows], atol=1e-5, rtol=1e-4)


def test_what_the_plugin_does_not_compute_is_refused(tmp_path):
    with pytest.raises(PreconditionError, match="not converted for Torch-TensorRT"):
        exported(tiny_checkpoints.save_lively(tmp_path / "m", "BertModel"), "performer:32")


def test_a_model_is_exported_in_half_precision_and_given_back_as_it_was(tmp_path):
    recipe = build_recipe({"model": str(tiny_checkpoints.save_lively(tmp_path / "m", "BertModel"))})
    source = load(locate(recipe.model))
    rewrite(source, recipe.attention)
    inputs = ragged_inputs(source, [20, 11])
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    with torch.no_grad():
        wanted = source.model(**inputs)[0]
        with moved(source.model, "cpu", torch.float16):
            found = export_program(source.model, inputs, dynamic_axes(inputs)).module()(**inputs)[0]
    assert found.dtype == torch.float16
    rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[rows].float(), wanted[rows], atol=2e-2, rtol=2e-2)
    for name, value in source.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_missing_package_is_named_in_less_than_three_seconds():
    if importlib.util.find_spec("torch_tensorrt") is not None:
        pytest.skip("torch_tensorrt is installed")
    command = [sys.executable, "-m", "effc.cli", "compile", "anything", "--target=torch_tensorrt"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "-o", "nowhere"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode != 0 and "pip install torch-tensorrt" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize(
    ("recipe", "kind", "said"),
    [
        ({"quantization": {"mode": "int8"}}, PreconditionError, "Leave --quant out"),
        ({"engine": {"arch": "sm_89"}}, UsageError, "engine.precision, engine.shapes and engine.plugin only"),
    ],
)
def test_what_it_does_not_take_is_refused(monkeypatch, recipe, kind, said):
    monkeypatch.setattr(engine_torch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="this machine has none"):
        monkeypatch.setattr(engine_torch, "device_capability", lambda: None)
        check_engine(build_recipe({"target": "torch_tensorrt"}))
    monkeypatch.setattr(engine_torch, "device_capability", lambda: 89)
    assert check_engine(build_recipe({"target": "torch_tensorrt", "engine": {"shapes": "8x512"}})) is None
    with pytest.raises(kind, match=said):
        check_engine(build_recipe({"target": "torch_tensorrt"} | recipe))
