"""Decode graphs of engines whose layers keep more or less than keys and values: states, and queries that choose."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from engine_artifacts import compile_plain, stand_in, with_engines
from test_engine_rows import PLAN, generated, open_rows, prompt, write
from test_tensorrt_graphs import Exported, _Runner, export, saved

from effc.compiler import engine_choice, engine_proof
from effc.compiler.artifact_files import read_manifest
from effc.compiler.engine_check import check_engine
from effc.compiler.engine_profiles import make_profiles
from effc.compiler.engine_proof import graph_error, step_error
from effc.compiler.engine_runtime import EngineModel
from effc.compiler.engine_sources import generation_sources
from effc.compiler.engine_text import write_on
from effc.compiler.engines import EngineSource, build_engines
from effc.compiler.generation import Prompt
from effc.compiler.recipe import build_recipe
from effc.errors import PassFailedError
from effc.exporters.engine_caches import LAST_QUERY, half_caches
from effc.exporters.engine_graph import EngineGraph, make_engine_graph
from effc.exporters.generation_export import positions_of
from effc.exporters.onnx_graph import save_onnx
from effc.passes.quantize_for_engine import engine_quantizing_passes
from effc.passes.quantize_observe import Remembered
from effc.passes.quantize_schemes import Schemes

LINEAR, CHOOSING = "linear:elu", "topk-blocks:3:8"


class Text:
    """A causal model's graphs."""

    def __init__(self, exported: Exported, folder, mode: str = "none"):
        self.exported, self.folder, self.forward = exported, folder, folder / "model.onnx"
        layers = {} if mode == "none" else {"*layer*": mode}
        recipe = build_recipe({"quantization": {"mode": mode, "layers": layers}})
        given = (Schemes(recipe.quantization), Remembered())
        batches = [exported.batch(40, 30)]
        forward = exported.prepared()
        for step in engine_quantizing_passes(recipe.quantization, batches, *given):
            step.run(forward)
        save_onnx(forward, self.forward)
        self.sources = generation_sources(
            exported.source, exported.layers, recipe, batches, given, exported.graph, self.forward, folder
        )

    def lowered(self, source: EngineSource, precision: str, plugin: bool) -> EngineGraph:
        model = ir.load(str(source.path))
        halves = half_caches(model.graph)
        return make_engine_graph(model, precision, plugin=plugin, past=source.name == "decode", as_half=halves)

    def in_standard_operators(self, precision: str) -> dict:
        return {
            source.name: saved(self.lowered(source, precision, False), self.folder / f"{source.name}-{precision}.onnx")
            for source in self.sources
        }

    def step_error(self, paths: dict, exact: bool = True) -> float:
        return step_error(self.exported.source, self.forward, paths["prefill"], paths["decode"], exact=exact)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    made: dict[str, Text] = {}

    def text(form: str) -> Text:
        if form not in made:
            folder = tmp_path_factory.mktemp("text")
            made[form] = Text(export(folder / "model", "LlamaForCausalLM", form), folder)
        return made[form]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield text


def written_by_torch(text: Text, prompt: Prompt, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """What the graphs write, and what torch finds most likely at each place of that."""
    runner = _Runner({source.name: source.path for source in text.sources})
    written = list(write_on(runner, prompt, max_length=64, ends=[], padding=0, max_new_tokens=steps))
    tokens = torch.from_numpy(np.concatenate([prompt.tokens, *(step[:, None] for step in written)], axis=1))
    mask = torch.from_numpy(np.pad(prompt.mask.astype(np.int64), ((0, 0), (0, steps)), constant_values=1))
    with torch.no_grad():
        model = text.exported.source.model
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions_of(mask)).logits
    first = prompt.tokens.shape[1] - 1
    return logits[:, first : first + steps].argmax(-1).numpy(), written


@pytest.mark.parametrize("form", [LINEAR, CHOOSING])
def test_text_is_the_forward_passes(texts, form):
    text = texts(form)
    assert text.sources[1].step_error < 1e-5
    batch = text.exported.batch(22, 11, side="left")
    prompt = Prompt(batch["input_ids"], batch["attention_mask"].astype(bool))
    expected, written = written_by_torch(text, prompt, 8)
    assert np.array_equal(expected, np.stack(written, axis=1))


def test_padding_in_front_is_not_counted_as_text(texts, monkeypatch):
    """Where features are taken of rotated queries and keys, their own places matter and not only their distance."""
    text = texts(LINEAR)
    monkeypatch.setattr(engine_proof, "_PROOF_LENGTHS", (40, 13))
    paths = [source.path for source in text.sources]
    assert step_error(text.exported.source, text.forward, *paths, exact=True, pads=True) < 1e-5
    with pytest.raises(PassFailedError, match="The decode graph is off by"):
        step_error(text.exported.source, text.forward, *paths, exact=True)


def test_a_state_takes_the_place_of_keys_and_values(texts):
    prefill, decode = (ir.load(str(source.path)).graph for source in texts(LINEAR).sources)
    shapes = {value.name: list(value.shape) for value in decode.inputs if value.name.startswith("past_")}
    assert shapes == {
        f"past_{name}.{number}": ["batch", 1, 32, 32][: 4 if name == "state" else 3]
        for number in (0, 1)
        for name in ("state", "normaliser")
    }
    presents = {name.replace("past_", "present_") for name in shapes}
    for graph in (prefill, decode):
        assert {value.name for value in graph.outputs} == {"logits", *presents}
    assert not texts(LINEAR).sources[1].caches, "nothing grows with the text"


def test_queries_that_choose_blocks_are_kept(texts):
    text = texts(CHOOSING)
    kept = {(cache.most, cache.width, cache.span) for cache in text.sources[1].caches}
    assert kept == {(None, 32, 1), (15, 64, 1), (None, 32, 8)}
    runner = _Runner({source.name: source.path for source in text.sources})
    batch = text.exported.batch(20, 20, side="left")
    prompt = Prompt(batch["input_ids"], batch["attention_mask"].astype(bool))
    list(write_on(runner, prompt, max_length=64, ends=[], padding=0, max_new_tokens=3))
    assert runner.pasts == [20, 21]


def test_sums_of_keys_are_kept_to_choose_by(texts):
    """Handed on by every step, they are those of all keys; and no step reads all keys to choose."""
    text = texts(CHOOSING)
    runner = _Runner({source.name: source.path for source in text.sources})
    seen: list[dict[str, np.ndarray]] = []
    run = runner.run
    runner.run = lambda graph, feeds: seen.append(run(graph, feeds)) or seen[-1]
    batch = text.exported.batch(22, 11, side="left")
    prompt = Prompt(batch["input_ids"], batch["attention_mask"].astype(bool))
    list(write_on(runner, prompt, max_length=64, ends=[], padding=0, max_new_tokens=5))
    assert [outputs["present_sums.1"].shape[1] for outputs in seen] == [3, 3, 3, 4, 4]
    for outputs in seen:
        keys = outputs["present_key.1"].copy()
        keys[:, :22] *= batch["attention_mask"][..., None]
        padded = np.pad(keys, ((0, 0), (0, -keys.shape[1] % 8), (0, 0)))
        sums = padded.reshape(len(keys), -1, 8, keys.shape[2]).sum(axis=2)
        assert np.allclose(outputs["present_sums.1"], sums, atol=1e-5)


def test_steps_read_sums_in_place_of_keys(texts):
    graph = texts(CHOOSING).lowered(texts(CHOOSING).sources[1], "fp16", False).model.graph
    for number in (0, 1):
        past = next(value for value in graph.inputs if value.name == f"past_key.{number}")
        (joined,) = (use.node for use in past.uses())
        readers = {use.node.op_type for use in joined.outputs[0].uses()}
        assert joined.op_type == "Concat" and readers == {"Attention", "Shape", "Identity"}
        assert [value.dtype for value in graph.inputs if value.name == f"past_sums.{number}"] == [ir.DataType.FLOAT]


def test_profiles_count_blocks(texts):
    text = texts(CHOOSING)
    graph = text.lowered(text.sources[1], "fp16", True).model.graph
    (profile,) = make_profiles(list(graph.inputs), ["4x50"], 64, text.sources[1].caches)
    assert profile["past_key.0"][2] == [4, 49, 32] and profile["past_query.0"][2] == [4, 15, 64]
    assert [shape[1] for shape in profile["past_sums.0"]] == [1, 7, 7]


@pytest.mark.parametrize("form", [LINEAR, CHOOSING])
def test_standard_operators_decode_as_well(texts, form):
    text = texts(form)
    assert text.step_error(text.in_standard_operators("fp32")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", [LINEAR, CHOOSING])
def test_half_precision_decodes_closely(texts, form):
    text = texts(form)
    paths = text.in_standard_operators("fp16")
    kinds = {value.name: value.dtype for value in ir.load(str(paths["decode"])).graph.inputs}
    states = {name for name in kinds if name.startswith(("past_state", "past_normaliser", "past_sums"))}
    for name, kind in kinds.items():
        if name.startswith("past_"):
            assert kind == (ir.DataType.FLOAT if name in states else ir.DataType.FLOAT16), name
    assert text.step_error(paths, exact=False) < 2e-2


def test_the_plugin_goes_on_from_a_state(texts):
    prefill, decode = (texts(LINEAR).lowered(source, "fp16", True) for source in texts(LINEAR).sources)
    for graph, inputs in ((prefill, "key_mask"), (decode, "key_mask,past_state,past_normaliser")):
        assert set(graph.attention.plugins.values()) == {"LinearAttention"} and not graph.model.functions
        for node in graph.model.graph:
            if node.op_type == "LinearAttention":
                assert node.attributes["inputs"].as_string() == inputs
                assert node.attributes["present_state"].as_int() == 1 and len(node.outputs) == 3
                assert [value.dtype for value in node.inputs[4:]] == [ir.DataType.FLOAT] * (len(node.inputs) - 4)
                assert [value.dtype for value in node.outputs[:2]] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]


@pytest.mark.slow
def test_the_plugin_gets_one_query_and_its_blocks(texts):
    graph = texts("topk-blocks:3:64").lowered(texts("topk-blocks:3:64").sources[1], "fp16", True)
    nodes = [node for node in graph.model.graph if node.op_type == "SparseAttention"]
    assert len(nodes) == 2 and not any(LAST_QUERY in node.metadata_props for node in nodes)
    for node in nodes:
        assert node.attributes["inputs"].as_string() == "key_mask,key_blocks"
        assert node.inputs[0].producer().op_type == "Slice" and node.inputs[0].shape[1] == 1
        assert node.inputs[4].producer().op_type == "Slice"


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, lost", [(LINEAR, "past_state.1"), (CHOOSING, "past_query.0"), (CHOOSING, "past_sums.0")]
)
def test_what_is_lost_between_steps_is_noticed(texts, form, lost, tmp_path):
    text = texts(form)
    model = ir.load(str(text.sources[1].path))
    value = next(value for value in model.graph.inputs if value.name == lost)
    nothing = ir.node("Sub", [value, value])
    ir.convenience.replace_all_uses_with(value, nothing.outputs[0])
    for place in (0, 1):
        nothing.replace_input_with(place, value)
    nothing.outputs[0].shape, nothing.outputs[0].type = value.shape, value.type
    model.graph.insert_before(model.graph[0], nothing)
    save_onnx(model, tmp_path / "wrong.onnx")
    with pytest.raises(PassFailedError, match="The decode graph is off by"):
        text.step_error({"prefill": text.sources[0].path, "decode": tmp_path / "wrong.onnx"})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_quantized_layers_beside_chosen_blocks(mode, texts, tmp_path):
    """Quantized graphs decode as their forward pass does, and quantized layers of their engines are such products."""
    text = Text(texts(CHOOSING).exported, tmp_path, mode)
    exact = text.exported.graph
    assert text.sources[1].step_error < 0.05
    assert text.step_error(text.in_standard_operators("fp16"), exact=False) < 0.1
    batch = text.exported.batch(60, 33, side="left")
    batch["position_ids"] = positions_of(torch.from_numpy(batch["attention_mask"])).numpy()
    alone, half = (graph_error(exact, path, batch) for path in (text.forward, tmp_path / "prefill-fp16.onnx"))
    assert 0 < alone < 0.5 and half < 1.5 * alone + 0.02
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    settings = {"arch": "sm_89", "shapes": "2x64", "plugin": False}
    whole = build_recipe({"target": "tensorrt_rtx", "engine": settings})
    out = tmp_path / "out"
    out.mkdir()
    record = build_engines(check_engine(whole), whole.engine, text.sources, 64, exact, batch, out, lambda what: None)
    for engine in record.engines:
        kernels = list(engine.linears.values())
        assert kernels.count(f"{mode} gemm") == 14 and not engine.warnings, engine.graph
    decode = record.engines[1]
    assert {name: tensor.dtype for tensor in decode.inputs if (name := tensor.name).startswith("past_sums")} == {
        f"past_sums.{number}": "float" for number in (0, 1)
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", [LINEAR, CHOOSING])
def test_texts_that_share_engines_are_what_they_are_alone(form, tmp_path, monkeypatch):
    plain = compile_plain(tmp_path, {"pattern": form, "force": True})
    engines = with_engines(plain, "engines")
    plan = [(start, prompt(length, seed), count) for seed, (start, length, count) in enumerate(PLAN)]
    wanted = [generated(plain, tokens, count) for _, tokens, count in plan]
    monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: {0: 86, 1: 89}.get(gpu))
    for module in ("torch", "tensorrt"):
        stand_in(monkeypatch, module)
    rows = open_rows(engines, 8, pads=read_manifest(engines).engines.graphs["decode"].pads)
    assert write(rows, plan) == wanted
    _, tokens, count = plan[1]
    alone = EngineModel(engines, read_manifest(engines)).generate(tokens[None], max_new_tokens=count, eos_token_id=[])
    assert alone[0, len(tokens) :].tolist() == wanted[1]
