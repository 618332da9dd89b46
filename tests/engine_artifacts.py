"""Artifacts with engines that write text, for a stand-in of TensorRT that computes their graphs; see standin_gpu."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import tiny_checkpoints

import effc
from effc.compiler.artifact_files import read_manifest
from effc.compiler.engine_profiles import make_profiles
from effc.compiler.engine_sources import generation_sources
from effc.compiler.exported import exported_graph
from effc.compiler.manifest import EngineGraphRecord, EngineRecord, EnginesRecord, FileRecord, TensorRecord
from effc.compiler.recipe import build_recipe
from effc.compiler.rewrite import rewrite
from effc.compiler.source import load, locate
from effc.exporters.engine_caches import half_caches
from effc.exporters.engine_graph import make_engine_graph, save_engine_graph
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes

STANDIN = Path(__file__).with_name("standin_gpu")
ARCHS = ("sm_86", "sm_89")


def compile_plain(folder: Path, form: Any) -> Path:
    """A tiny causal model for ONNX Runtime, which says what tokens have to be."""
    checkpoint = tiny_checkpoints.save_lively(folder / "checkpoint", "LlamaForCausalLM")
    return effc.compile(checkpoint, attention=form, output=folder / "plain", bench={"enabled": False}).path


def with_engines(
    plain: Path, name: str, *, shapes: Sequence[str] = ("1x16", "4x32", "2x64"), precision: str = "fp32",
    archs: Sequence[str] = ARCHS, plugin: bool = True,
) -> Path:  # fmt: skip
    """The artifact with engines in the place of its generating graph.

    Their graphs are the real ones, written out in standard operators.
    """
    engines = plain.with_name(name)
    shutil.copytree(plain, engines)
    manifest = read_manifest(engines)
    assert manifest.generation is not None
    recipe = build_recipe(manifest.recipe)
    source = load(locate(recipe.model))
    layers = rewrite(source, recipe.attention).layers
    exported = exported_graph(source, layers)[0]
    work = engines.with_name(f"{name}-graphs")
    work.mkdir()
    given = (Schemes(recipe.quantization), Remembered())
    sources = generation_sources(source, layers, recipe, None, given, exported, plain / "model.onnx", work)
    records, plans = [], {}
    for entry in sources:
        model = ir.load(str(entry.path))
        halves = half_caches(model.graph)
        graph = make_engine_graph(model, precision, plugin=False, past=entry.name == "decode", as_half=halves)
        profiles = make_profiles(list(graph.model.graph.inputs), shapes, source.max_length, entry.caches)
        plans[entry.name] = _plan(graph, entry.name, profiles, work / f"{entry.name}-plan.onnx")
        records += [_record(graph.model.graph, entry.name, arch, profiles) for arch in archs]
    files = {record.file: plans[record.graph] for record in records}
    if plugin:
        files["engines/libeffc_tensorrt.so"] = f"library {' '.join(archs)}".encode()
    (engines / "engines").mkdir()
    for file, content in files.items():
        (engines / file).write_bytes(content)
        manifest.files[file] = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    manifest.engines = EnginesRecord(
        flavour="tensorrt",
        version="10.9.0.34",
        precision=precision,
        plugin="engines/libeffc_tensorrt.so" if plugin else None,
        graphs={entry.name: EngineGraphRecord(pads=entry.pads) for entry in sources},
        engines=records,
        eos_token_ids=manifest.generation.eos_token_ids,
        pad_token_id=manifest.generation.pad_token_id,
    )
    manifest.generation, manifest.target = None, "tensorrt"
    (engines / "effc.json").write_text(manifest.model_dump_json())
    return engines


def change(artifact: Path, target: Path, **changes: object) -> Path:
    """A copy with other values in the record of its engines."""
    shutil.copytree(artifact, target)
    values = json.loads((target / "effc.json").read_text())
    values["engines"] |= changes
    (target / "effc.json").write_text(json.dumps(values))
    return target


def stand_in(monkeypatch, name: str) -> ModuleType:
    """Put a module of ``standin_gpu`` in the place of the real one."""
    spec = importlib.util.spec_from_file_location(name, STANDIN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def _plan(graph, name: str, profiles: object, path: Path) -> bytes:
    save_engine_graph(graph, path, builder=False)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"graph": name, "profiles": json.dumps(profiles)})
    return model.SerializeToString()


def _record(graph: ir.Graph, name: str, arch: str, profiles) -> EngineRecord:
    return EngineRecord(
        file=f"engines/{name}.{arch}.plan",
        graph=name,
        arch=arch,
        seconds=1,
        profiles=[{key: [list(shape) for shape in ranges] for key, ranges in profile.items()} for profile in profiles],
        inputs=[_tensor(value) for value in graph.inputs],
        outputs=[_tensor(value) for value in graph.outputs],
        attention={},
        linears={},
        low={},
    )


def _tensor(value: ir.Value) -> TensorRecord:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorRecord(name=str(value.name), dtype=value.dtype.name.lower(), shape=shape)
