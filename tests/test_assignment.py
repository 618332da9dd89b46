"""Forms for single layers and heads: how they are written, what each layer then computes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_checkpoints
import torch

import effc
from effc.compiler.calibrate_forms import calibrate_forms
from effc.compiler.exported import describe_layers, export_now, restore_source_attention
from effc.compiler.kernels import BODY, UNKNOWN, attention_kernels, operator_nodes
from effc.compiler.manifest import AttentionLayer
from effc.compiler.recipe import Recipe, build_recipe, merge
from effc.compiler.recovery import refuse_untrained
from effc.compiler.rewrite import observe_attention, rewrite
from effc.compiler.session import KernelEvent
from effc.compiler.source import SourceModel, load, locate
from effc.errors import PreconditionError, UsageError
from effc.exporters.onnx_graph import save_onnx
from effc.passes.assign_attention import check_form, check_length, forms_of_layers, matching_layers, with_token_ids
from effc.passes.attention_settings import AttentionSection
from effc.passes.rewrite_attention import describe
from effc.plugins.forms.registry import parse_form
from effc.plugins.function_body import is_attention
from effc.plugins.hook import PARAMETERS

NAMES = [f"encoder.layer.{number}.attention.self" for number in range(3)]
HEADS = "dense@0;local:4|sinks:2@1-3"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of four heads whose outputs differ from token to token."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    return tiny_checkpoints.save_lively(folder, "BertModel", **sizes)


@pytest.fixture
def source(checkpoint: Path) -> SourceModel:
    return load(locate(build_recipe({"model": str(checkpoint)}).model))


def section(text: str, **more: Any) -> AttentionSection:
    return AttentionSection.model_validate({"pattern": text, **more})


def tokens(length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 28, (2, length), generator=torch.Generator().manual_seed(length))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    if padding:
        mask[1, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def hidden(source: SourceModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return source.model(**inputs).last_hidden_state.numpy()


class TestText:
    def test_an_assignment_is_taken_apart(self) -> None:
        read = section("local:8, 0-1=dense,2-*=local:4|sinks:1,*.layer.2.*=dense@0;local:2@1-3")
        assert read.pattern == "local:8"
        assert list(read.layers.items()) == [
            ("0-1", "dense"),
            ("2-*", "local:4|sinks:1"),
            ("*.layer.2.*", "dense@0;local:2@1-3"),
        ]
        assert section(read.text) == read

    def test_a_recipe_reads_back_and_flags_come_on_top(self) -> None:
        values: dict[str, Any] = {"attention": {"pattern": "local:8", "layers": {"0": "dense", "1-*": "local:4"}}}
        recipe = build_recipe(values)
        import yaml

        assert build_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
        over = build_recipe(merge(values, {"attention": {"pattern": "block:16,0=local:2"}})).attention
        assert over.pattern == "block:16"
        assert list(over.layers.items()) == [("1-*", "local:4"), ("0", "local:2")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0-3=dense,local:8,local:4", "two forms for all layers"),
            ("=dense", "empty entry"),
            ("0=dense,,1=local:4", "empty entry"),
            ("0=lcal:8", "Did you mean 'local'"),
            ("auto", "which quality drop"),
            ("auto:much", "not a number"),
            ("auto:-1", "at least 0"),
            ("duo:1.5", "between 0 and 1"),
            ("duo:0.5:0", "at least 1"),
            ("duo:0.5:8:4:2", "too many"),
            ("0-1=auto:0.02", "whole model"),
        ],
    )
    def test_mistakes(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            build_recipe({"attention": text})


class TestLayers:
    @pytest.mark.parametrize(
        ("key", "found"),
        [
            ("0", [0]),
            ("1-2", [1, 2]),
            ("1-*", [1, 2]),
            ("0-*", [0, 1, 2]),
            ("*.layer.1.*", [1]),
            (NAMES[2], [2]),
            ("*", [0, 1, 2]),
        ],
    )
    def test_keys(self, key: str, found: list[int]) -> None:
        assert matching_layers(key, NAMES) == [NAMES[number] for number in found]

    @pytest.mark.parametrize("key", ["3", "1-3", "2-1", "3-*"])
    def test_a_range_outside_names_the_one_that_there_is(self, key: str) -> None:
        with pytest.raises(PreconditionError, match="numbered 0 to 2.*0-2"):
            matching_layers(key, NAMES)

    def test_a_glob_that_matches_nothing_names_the_nearest(self) -> None:
        with pytest.raises(PreconditionError, match=r"Did you mean 'encoder\.layer\.1\.attention\.self'"):
            matching_layers("encoder.layr.1.attention.self", NAMES)

    def test_the_last_entry_wins_and_the_pattern_takes_the_rest(self) -> None:
        forms = forms_of_layers(section("local:8,0-1=local:4,1=dense"), NAMES)
        assert [str(forms[name]) for name in NAMES] == ["local:4", "dense", "local:8"]


class TestRewrite:
    def test_every_layer_computes_its_own_form(self, source: SourceModel) -> None:
        inputs = tokens(40, padding=9)
        outputs: dict[str, dict[str, torch.Tensor]] = {}
        observed = observe_attention(source)
        for text in ("dense", "local:4|sinks:2", f"1-*=dense,0={HEADS}"):
            rewrite(source, section(text), observed)
            outputs[text] = attention_outputs(source, inputs)
        dense, local, mixed = (output[NAMES[0]] for output in outputs.values())
        size = 32 // 4
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(mixed[..., :size][real], dense[..., :size][real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[..., size:][real], local[..., size:][real], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(dense[..., size:][real], local[..., size:][real], atol=1e-2)

    def test_what_is_described(self, source: SourceModel) -> None:
        layers = rewrite(source, section(f"local:8,0=dense,2={HEADS}", exclude=("*.layer.1.*",))).layers
        assert [layer.pattern for layer in layers] == ["dense", "dense", HEADS]
        assert [layer.reason for layer in layers] == ["is dense already", "excluded by the recipe", None]

    def test_head_count(self, source: SourceModel) -> None:
        with pytest.raises(PreconditionError, match=r"names heads 0 to 2, but encoder\.layer\.1.* has 4 heads"):
            rewrite(source, section("1=dense@0;local:4@1-2"))

    def test_forms_can_be_changed_and_taken_back(self, source: SourceModel) -> None:
        inputs = tokens(30)
        untouched = hidden(source, inputs)
        observed = observe_attention(source)
        np.testing.assert_allclose(hidden(source, inputs), untouched, atol=1e-5)
        with observed.using({NAMES[1]: parse_form("local:2|global:#2"), NAMES[2]: parse_form("hedgehog")}):
            assert np.abs(hidden(source, inputs) - untouched).max() > 1e-2
            assert hasattr(source.model.get_submodule(NAMES[2]), PARAMETERS)
        np.testing.assert_allclose(hidden(source, inputs), untouched, atol=1e-5)
        assert not any(PARAMETERS in name for name, _ in source.model.named_parameters())


def attention_outputs(source: SourceModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each attention module returns, its heads side by side."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        source.model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found.__setitem__(name, output[0])
        )
        for name in NAMES
    ]
    hidden(source, inputs)
    for handle in handles:
        handle.remove()
    return found


class TestParameters:
    def test_each_layer_has_its_own_and_always_the_same(self, source: SourceModel, checkpoint: Path) -> None:
        rewrite(source, section("0-1=performer:16"))
        first = parameters(source)
        assert sorted(first) == [f"{name}.{PARAMETERS}.features" for name in NAMES[:2]]
        assert not torch.equal(*first.values())
        again = load(source.located)
        rewrite(again, section("performer:16,2=dense"))
        assert all(torch.equal(first[name], value) for name, value in parameters(again).items())

    def test_of_heads_are_told_apart(self, source: SourceModel) -> None:
        rewrite(source, section("0=performer:16@0-1;performer:8@2-3"))
        shapes = {name.rsplit(".", 1)[1]: tuple(value.shape) for name, value in parameters(source).items()}
        assert shapes == {"part0_features": (16, 8), "part1_features": (8, 8)}


def parameters(source: SourceModel) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in source.model.named_parameters() if PARAMETERS in name}


class TestTokens:
    def test_names_become_ids(self, source: SourceModel) -> None:
        assert str(with_token_ids(parse_form("local:4|global:cls+sep"), source.processor)) == "local:4|global:#2+#3"
        heads = with_token_ids(parse_form("dense@0;local:4|global:mask@1-3"), source.processor)
        assert str(heads) == "dense@0;local:4|global:#4@1-3"

    def test_a_token_that_the_tokenizer_lacks(self, source: SourceModel) -> None:
        with pytest.raises(PreconditionError, match="'bos', which the model's tokenizer does not have.*cls"):
            rewrite(source, section("local:4|global:bos"))

    def test_no_tokenizer(self) -> None:
        with pytest.raises(PreconditionError, match="no tokenizer.*#102"):
            with_token_ids(parse_form("global:cls"), None)

    def test_the_first_token_named_or_counted_is_the_same(self, source: SourceModel) -> None:
        inputs = tokens(40, padding=9)
        real = inputs["attention_mask"].bool().numpy()
        observed = observe_attention(source)
        rewrite(source, section("local:4|global:1"), observed)
        counted = hidden(source, inputs)[real]
        rewrite(source, section("local:4|global:cls"), observed)
        np.testing.assert_allclose(hidden(source, inputs)[real], counted, atol=1e-5)


class TestRefusals:
    def test_forms_without_a_causal_form(self) -> None:
        form: Any = SimpleNamespace(supports_causal=False, extra_inputs=())
        layer: Any = SimpleNamespace(name="model.layers.0", visibility=SimpleNamespace(causal=True), bias=None)
        with pytest.raises(PreconditionError, match=r"model\.layers\.0 is causal.*Use one that has: local"):
            check_form(form, layer)

    def test_forms_that_end_before_the_model_does(self) -> None:
        layer: Any = SimpleNamespace(name="encoder.layer.0")
        with pytest.raises(
            PreconditionError, match=r"takes 512 tokens at most.*model takes 1024 \(encoder\.layer\.0\)"
        ):
            check_length(parse_form("local:8@0;linformer:256:512@1"), layer, 1024)
        check_length(parse_form("linformer:256:1024"), layer, 1024)

    def test_untrained_forms_say_what_they_lose(self, checkpoint: Path, tmp_path: Path) -> None:
        data = texts(tmp_path)
        with pytest.raises(PreconditionError, match=r"pooled embeddings 0\.\d+.*cosine.*--force") as refusal:
            effc.compile(checkpoint, attention="1-*=linear:elu", output=tmp_path / "o", verify={"data": str(data)})
        assert f"{NAMES[1]} and 1 more" in str(refusal.value)
        assert str(data) in str(refusal.value)
        assert not (tmp_path / "o").exists()
        with pytest.raises(PreconditionError, match="random tokens"):
            effc.compile(checkpoint, attention="linear:elu", output=tmp_path / "o")

    def test_force_accepts_them(self, source: SourceModel) -> None:
        observed = rewrite(source, section("linear:elu")).observed
        refuse_untrained(source, observed, Recipe(attention=section("linear:elu", force=True)))
        with pytest.raises(PreconditionError):
            refuse_untrained(source, observed, Recipe(attention=section("linear:elu")))


class TestCalibration:
    def test_dynamic_layers_are_fitted_to_texts(self, tmp_path: Path) -> None:
        sizes = {"num_hidden_layers": 2, "max_position_embeddings": 256}
        checkpoint = tiny_checkpoints.save_lively(tmp_path / "model", "BertModel", max_length=256, **sizes)
        spoken: dict[str, Any] = {
            "model": str(checkpoint),
            "attention": {"pattern": "dynamic:8:64", "layers": {"0": "dense"}},
        }
        for words, said in ((250, None), (250, "texts"), (40, "too short")):
            recipe = build_recipe(spoken | {"verify": {"data": said and str(texts(tmp_path, 12, words))}})
            source = load(locate(recipe.model))
            observed = rewrite(source, recipe.attention).observed
            before = parameters(source)
            figures = calibrate_forms(source, observed, recipe)
            fitted = [not torch.equal(before[name], value) for name, value in parameters(source).items()]
            if said == "texts":
                (caught,) = figures["distant_attention_caught"].values()
                assert fitted == [True] and caught[1] >= caught[0]
            else:
                assert fitted == [False]
                assert ("no text was given" if said is None else said) in figures["calibration"]


def texts(folder: Path, count: int = 12, words: int = 48) -> Path:
    """Random words of the tiny vocabulary, one text a line."""
    generator = np.random.default_rng(0)
    path = folder / "texts.jsonl"
    lines = (" ".join(generator.choice(tiny_checkpoints.WORDS[:20], words)) for _ in range(count))
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


class TestKernels:
    def test_one_operator_for_each_part_of_the_heads(self) -> None:
        assert operator_nodes(layer("a", "linear:elu")) == {"a": "LinearAttention"}
        assert operator_nodes(layer("a", HEADS)) == {"a/heads0": "SparseAttention", "a/heads1": "SparseAttention"}
        assert attention_kernels([], [layer("a", "of-the-future:3")])["a"] == BODY

    def test_parts_may_run_by_different_kernels(self) -> None:
        layers = [layer("a", HEADS), layer("b", "linear:elu"), layer("c", "topk:4")]
        events = [
            event("a/heads1", "SparseAttention"),
            event("_inlfunc_SparseAttention_scores", "MatMul"),
            event("_inlfunc_LinearAttention_state", "MatMul"),
            event("_inlfunc_TopKAttention_scores", "MatMul"),
            event("_inlfunc_TopKAttention_token_3_scores", "MatMul"),
        ]
        kernels = attention_kernels(events, layers)
        assert kernels["a"] == f"1 x {BODY} + 1 x native effc::SparseAttention"
        assert (kernels["b"], kernels["c"]) == (BODY, UNKNOWN)


def layer(name: str, pattern: str) -> AttentionLayer:
    return AttentionLayer(
        layer=name, source="dense", pattern=pattern, causal=False, num_heads=4, kv_heads=4, head_dim=8, rewritten=True
    )


def event(node: str, operator: str) -> KernelEvent:
    return KernelEvent(node, operator, "CPUExecutionProvider", "float")


def test_layers_and_heads_end_to_end(checkpoint: Path, tmp_path: Path, source: SourceModel) -> None:
    attention = f"local:8,0=performer:16,2={HEADS}"
    done = effc.compile(
        checkpoint,
        attention=attention,
        output=tmp_path / "o",
        bench={"lengths": [48], "rounds": 1},
        verify={"samples": 2},
    )
    patterns = [layer.pattern for layer in done.manifest.attention]
    assert patterns == ["performer:16", "local:8", HEADS]
    assert done.manifest.benchmark is not None
    kernels = done.manifest.benchmark.kernels
    assert {name: kernels[name] for name in NAMES}.keys() == set(NAMES)
    assert UNKNOWN not in kernels.values()
    report = (done.path / "report.html").read_text()
    assert HEADS in report and "performer:16" in report
    assert f"local:8,0=performer:16,2={HEADS}" in report

    model = effc.load(done.path, native=False)
    rewrite(source, section(attention))
    from effc.compiler.twin import dense_twin

    twin = onnxruntime.InferenceSession(dense_twin(done.manifest))
    operators = [node.name for node in ir.load(str(dense_twin(done.manifest))).graph if is_attention(node)]
    assert operators == NAMES, "the twin must not slice heads"
    untouched = load(source.located)
    for length in (3, 8, 9, 40):
        inputs = tokens(length, padding=2)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        real = inputs["attention_mask"].bool().numpy()
        expected = hidden(source, inputs)[real]
        np.testing.assert_allclose(model(**arrays).last_hidden_state[real], expected, atol=2e-4)
        dense = twin.run(["last_hidden_state"], arrays)[0]
        np.testing.assert_allclose(dense[real], hidden(untouched, inputs)[real], atol=2e-4)


def test_a_twin_is_made_from_the_graph_of_other_operators(source: SourceModel, tmp_path: Path) -> None:
    untouched = load(source.located)
    rewritten = rewrite(source, section("0=performer:16,1=local:4|global:cls,2=topk:4"))
    graph = export_now(source)
    types = {node.op_type for node in graph.graph if is_attention(node)}
    assert types == {"LinearAttention", "SparseAttention", "TopKAttention"}
    restore_source_attention(graph, rewritten.layers)
    nodes = [node for node in graph.graph if is_attention(node)]
    assert {node.op_type for node in nodes} == {"SparseAttention"}
    assert {len(node.inputs) for node in nodes} == {4}
    assert not [name for name in graph.graph.initializers if "features" in name]
    save_onnx(graph, tmp_path / "twin.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "twin.onnx")
    inputs = tokens(24, padding=5)
    real = inputs["attention_mask"].bool().numpy()
    found = session.run(["last_hidden_state"], {name: value.numpy() for name, value in inputs.items()})[0]
    np.testing.assert_allclose(found[real], hidden(untouched, inputs)[real], atol=1e-4)
    assert describe_layers(describe([])) == []
