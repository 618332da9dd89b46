"""The attention rewrite over architecture families: every layer reached, the right pairs visible, ONNX the same.

The expectation comes from the model's own scaled dot-product attention, with the wanted window cut out of the mask that
the model itself made; effc's hook has no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from family_configs import FAMILIES, OWN_WINDOW, REFUSED, Family, gemma2
from transformers import PreTrainedModel

from effc.compiler.inputs import dynamic_axes
from effc.errors import PreconditionError
from effc.exporters.onnx_graph import export_onnx, save_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.fuse_onnxruntime import FuseOnnxRuntime
from effc.passes.rewrite_attention import RewriteAttention
from effc.plugins.function_body import geometry_of, is_attention

LENGTHS = [40, 23, 3]
WIDE, NARROW = 16, 4
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
_QUICK_EXPORTS = ("bert", "llama", "vit")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Models this small only wait for each other's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def rewrite(family: Family, pattern: str, **settings) -> tuple[PreTrainedModel, RewriteAttention]:
    model = family.model()
    rewriting = RewriteAttention(AttentionSection(pattern=pattern, **settings), family.inputs(LENGTHS))
    rewriting.run(model)
    return model, rewriting


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result = model(**inputs, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}


def relative_error(result: np.ndarray, reference: torch.Tensor, inputs: dict[str, torch.Tensor]) -> float:
    """Over the real tokens where the output has one row per token, over everything elsewhere."""
    expected = reference.numpy()
    masks = [inputs[name] for name in ("decoder_attention_mask", "attention_mask") if name in inputs]
    mask = next((mask for mask in masks if expected.shape[:2] == tuple(mask.shape)), None)
    if mask is not None:
        result, expected = result[mask.bool().numpy()], expected[mask.bool().numpy()]
    assert expected.size and np.isfinite(result).all()
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


@contextmanager
def windowed(monkeypatch: pytest.MonkeyPatch, reaches: list[tuple[int, int] | None]) -> Iterator[list[bool]]:
    """Let each call of torch's attention see ``-left <= j - i <= right`` only, besides what it is told; counts them."""
    original, calls = torch.nn.functional.scaled_dot_product_attention, []

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        left, right = reaches[len(calls)] or (10**6, 10**6)
        calls.append(is_causal)
        distance = torch.arange(key.shape[2])[None, :] - torch.arange(query.shape[2])[:, None]
        visible = (distance >= -left) & (distance <= right)
        if is_causal:
            visible &= distance <= 0
        added = torch.zeros(())
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        elif attn_mask is not None:
            visible, added = visible & (attn_mask > -1e4), attn_mask
        # A number rather than infinity, so that padding that sees nothing does not spread nan.
        bias = torch.where(visible, added, torch.finfo(torch.float32).min)
        return original(query, key, value, attn_mask=bias, dropout_p=dropout_p, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        yield calls


def reaches(family: Family, window: int) -> list[tuple[int, int] | None]:
    of_kind = {"causal": (window - 1, 0), "bidirectional": (window // 2, window // 2), "cross": None}
    return [of_kind[kind] for kind in family.kinds]


def expected_patterns(family: Family, window: int) -> list[str]:
    return [
        own if kind == "cross" or (own != "dense" and window >= OWN_WINDOW) else f"local:{window}"
        for own, kind in zip(family.own, family.kinds, strict=True)
    ]


@every_family
def test_every_layer_is_found_with_what_it_sees(family):
    _, rewriting = rewrite(family, f"local:{WIDE}")
    observed = [layer for layer, _, _ in rewriting.layers]
    assert [str(layer.visibility.pattern) for layer in observed] == list(family.own)
    assert [layer.visibility.causal for layer in observed] == [kind == "causal" for kind in family.kinds]
    assert [layer.cross for layer in observed] == [kind == "cross" for kind in family.kinds]
    assert [layer.bias is not None for layer in observed] == [family.bias and not layer.cross for layer in observed]
    assert {(layer.num_heads, layer.kv_heads) for layer in observed} == {family.heads}
    assert len({layer.name for layer in observed}) == len(family.own)
    patterns = [str(plan.geometry.form) for _, plan, _ in rewriting.layers]
    assert patterns == expected_patterns(family, WIDE)
    assert not rewriting.unwanted()


@every_family
@pytest.mark.parametrize("window", [WIDE, NARROW])
def test_a_window_computes_what_the_model_does_with_that_mask(family, window, monkeypatch):
    own = family.model()
    # Encoders are padded on the right: their positions count from the first token of the batch.
    for side in ("right", "left") if family.causal else ("right",):
        inputs = family.inputs(LENGTHS, side, seed=1)
        untouched = outputs(own, inputs)
        with windowed(monkeypatch, reaches(family, window)) as calls:
            reference = outputs(own, inputs)
        assert len(calls) == len(family.own), "the model's own attention did not run where the expectation is made"
        rewritten = outputs(rewrite(family, f"local:{window}")[0], inputs)
        name = next(iter(reference))
        assert relative_error(rewritten[name].numpy(), reference[name], inputs) < 1e-5, side
        if any(pattern == "dense" or window < OWN_WINDOW for pattern in family.own):
            assert relative_error(rewritten[name].numpy(), untouched[name], inputs) > 1e-3, "the window changes nothing"


@every_family
@pytest.mark.parametrize("pattern", ["dense", "local:500"])
def test_a_pattern_that_hides_nothing_leaves_the_model_as_it_is(family, pattern):
    inputs = family.inputs(LENGTHS, seed=2)
    reference = outputs(family.model("eager"), inputs)
    model, rewriting = rewrite(family, pattern)
    kept = [str(plan.geometry.form) for _, plan, _ in rewriting.layers]
    kinds = zip(family.own, family.kinds, strict=True)
    assert kept == [own if own != "dense" or kind == "cross" else pattern for own, kind in kinds]
    result = outputs(model, inputs)
    for name, value in reference.items():
        assert relative_error(result[name].numpy(), value, inputs) < 1e-5, name


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if set(family.own) != {"dense"}])
def test_own_sliding_layers_say_why_they_are_kept(name):
    family = FAMILIES[name]
    _, rewriting = rewrite(family, f"local:{WIDE}")
    reasons = [reason for _, _, reason in rewriting.layers]
    assert [reason is None for reason in reasons] == [own == "dense" for own in family.own]
    assert all(f"local:{OWN_WINDOW}" in reason for reason in reasons if reason)


def test_an_excluded_layer_stays_dense(monkeypatch):
    family = FAMILIES["bert"]
    model, rewriting = rewrite(family, f"local:{NARROW}", exclude=("*layer.0.*",))
    assert [str(plan.geometry.form) for _, plan, _ in rewriting.layers] == ["dense", f"local:{NARROW}"]
    inputs = family.inputs(LENGTHS, seed=3)
    dense = outputs(rewrite(family, "dense")[0], inputs)["last_hidden_state"]
    both = outputs(rewrite(family, f"local:{NARROW}")[0], inputs)["last_hidden_state"]
    result = outputs(model, inputs)["last_hidden_state"].numpy()
    assert relative_error(result, dense, inputs) > 1e-3
    assert relative_error(result, both, inputs) > 1e-3


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=() if name in _QUICK_EXPORTS else pytest.mark.slow)
        for name, family in FAMILIES.items()
    ],
)
def test_plain_onnxruntime_equals_torch(family, tmp_path):
    model, rewriting = rewrite(family, f"local:{WIDE}")
    inputs = family.inputs([24, 17])
    graph = export_onnx(model, inputs, dynamic_axes(inputs))
    FuseOnnxRuntime().run(graph)
    nodes = [node for node in graph.graph if is_attention(node)]
    assert [node.name for node in nodes] == [layer.name for layer, _, _ in rewriting.layers]
    assert [str(geometry_of(node).form) for node in nodes] == expected_patterns(family, WIDE)
    assert [geometry_of(node).causal for node in nodes] == [kind == "causal" for kind in family.kinds]
    assert not squares(graph), "something of the length times the length is in the graph"
    save_onnx(graph, tmp_path / "model.onnx")
    session = plain_session(tmp_path / "model.onnx")
    padded_left = [("left", [90, 31, 2])] if family.causal else []
    for side, lengths in [("right", [90, 64, 5]), ("right", [41]), ("right", [1]), *padded_left]:
        inputs = family.inputs(lengths, side, seed=4)
        reference = outputs(model, inputs)
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        assert set(names) == set(reference)
        for name, result in zip(names, results, strict=True):
            assert result.shape == tuple(reference[name].shape)
            assert relative_error(result, reference[name], inputs) <= 1e-4, (name, side, lengths)


def squares(graph: ir.Model) -> list[str]:
    """Values outside the operators' bodies that grow with the square of a length."""
    return [
        value.name or ""
        for node in graph.graph
        for value in node.outputs
        if value.shape is not None
        and sum(isinstance(size, ir.SymbolicDim) and str(size.value) != "batch" for size in value.shape) > 1
    ]


def plain_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_forms_that_cannot_add_a_position_bias_are_refused():
    family = FAMILIES["t5-encoder"]
    rewriting = RewriteAttention(AttentionSection(pattern="linear:elu"), family.inputs(LENGTHS))
    with pytest.raises(PreconditionError, match="relative position bias.*linear:elu") as refusal:
        rewriting.run(family.model())
    assert refusal.value.exit_code == 2


def test_cross_attention_is_rewritten_only_when_asked_for():
    family = FAMILIES["bart"]
    left_alone = rewrite(family, "sinks:4")[1]
    assert [str(plan.geometry.form) for _, plan, _ in left_alone.layers] == ["sinks:4"] * 3 + ["dense"]
    assert "cross_attention" in left_alone.layers[-1][2]
    assert not left_alone.unwanted()
    model, asked = rewrite(family, "sinks:4", cross_attention=True)
    assert [str(plan.geometry.form) for _, plan, _ in asked.layers] == ["sinks:4"] * 4
    inputs = family.inputs(LENGTHS, seed=5)
    result = outputs(model, inputs)["last_hidden_state"]
    assert (
        relative_error(result.numpy(), outputs(rewrite(family, "sinks:4")[0], inputs)["last_hidden_state"], inputs)
        > 1e-3
    )
    # What a target token sees of the source: its first four tokens, as though there were no others.
    with torch.no_grad():
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        own = family.model()
        rewrite_all = RewriteAttention(AttentionSection(pattern="sinks:4"), inputs)
        rewrite_all.run(own)
        short = own.decoder(
            input_ids=inputs["decoder_input_ids"],
            attention_mask=inputs["decoder_attention_mask"],
            encoder_hidden_states=encoded.last_hidden_state[:, :4],
            encoder_attention_mask=inputs["attention_mask"][:, :4],
            use_cache=False,
        ).last_hidden_state
    assert relative_error(result.numpy(), short, inputs) < 1e-5


def test_distances_between_two_texts_are_refused():
    family = FAMILIES["bart"]
    settings = AttentionSection(pattern="local:16", cross_attention=True)
    with pytest.raises(PreconditionError, match="encoder_attn is cross-attention.*local:16"):
        RewriteAttention(settings, family.inputs(LENGTHS)).run(family.model())


def test_capped_scores_are_refused():
    rewriting = RewriteAttention(AttentionSection(pattern="local:16"), FAMILIES["llama"].inputs(LENGTHS))
    with pytest.raises(PreconditionError, match="Gemma2Model.*caps the scores"):
        rewriting.run(gemma2())


@pytest.mark.parametrize("architecture", REFUSED)
def test_architectures_without_the_interface_are_refused_by_name(architecture):
    rewriting = RewriteAttention(AttentionSection(pattern="local:16"), FAMILIES["bert"].inputs(LENGTHS))
    with pytest.raises(PreconditionError, match=architecture) as refusal:
        rewriting.run(REFUSED[architecture]().train(False))
    assert refusal.value.remedy
    assert refusal.value.exit_code == 2


def test_attention_that_bypasses_the_interface_is_not_forgotten():
    family = FAMILIES["bert"]

    class OldAttention(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, states: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
            return self.inner(states), None

    def model() -> PreTrainedModel:
        result = family.model()
        result.encoder.layer[1].attention = OldAttention(torch.nn.Linear(32, 32))
        return result

    inputs = family.inputs(LENGTHS)
    name = "encoder.layer.1.attention"
    rewriting = RewriteAttention(AttentionSection(pattern="local:16"), inputs)
    result = rewriting.run(model())
    assert rewriting.unwanted() == [(name, "does not use the attention interface")]
    assert (name, "does not use the attention interface") in result.skipped
    excluded = RewriteAttention(AttentionSection(pattern="local:16", exclude=("*.layer.1.*",)), inputs)
    excluded.run(model())
    assert not excluded.unwanted()
    dense = RewriteAttention(AttentionSection(pattern="dense"), inputs)
    dense.run(model())
    assert not dense.unwanted()


def test_models_that_compute_with_the_mask_are_refused():
    family = FAMILIES["vit"]
    config = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=4,
        use_relative_position_bias=True,
    )
    model = transformers.BeitModel(config).train(False)
    with pytest.raises(PreconditionError, match="BeitModel does not run with a padding mask"):
        RewriteAttention(AttentionSection(pattern="local:8"), family.inputs([1, 1])).run(model)
