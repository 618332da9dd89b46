"""Longer texts than a model was trained for, and position tables with few rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
import torch
import transformers
from family_configs import FAMILIES

import effc
from effc.compiler.positions import extend_positions, thin_positions
from effc.compiler.recipe import ModelSection, build_recipe
from effc.compiler.source import SourceModel, load, locate
from effc.errors import PreconditionError, UsageError
from effc.exporters.onnx_graph import export_onnx
from effc.passes.attention_settings import AttentionSection
from effc.passes.extend_positions import ExtendPositions, trained_positions
from effc.passes.position_reach import reach_of
from effc.passes.position_tables import position_tables
from effc.passes.positions_settings import PositionsSection
from effc.passes.rewrite_attention import RewriteAttention
from effc.passes.sparse_positions import SparsePositions
from effc.plugins.forms.registry import parse_form

TABLES = {"bert": 600, "roberta": 598, "distilbert": 600, "electra": 600, "gpt2": 600, "opt": 600, "bart": 600}
ROTARY = ("llama", "modernbert", "gemma3")


def extended(name: str, length: int, method: str = "auto", widest: int | None = None) -> transformers.PreTrainedModel:
    model = FAMILIES[name].model()
    step = ExtendPositions(PositionsSection(max_length=length, method=method), widest)
    step.run(model)
    step.ensures(model)
    return model


def hidden(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return next(
            iter(model(**inputs, **({"use_cache": False} if hasattr(model.config, "use_cache") else {})).values())
        )


@pytest.mark.parametrize("name", TABLES)
def test_tiled_tables_repeat_their_rows_and_leave_short_texts_alone(name):
    family, own = FAMILIES[name], FAMILIES[name].model()
    assert trained_positions(own) == TABLES[name]
    model = extended(name, 1500)
    assert trained_positions(model) == 1500
    for before, after in zip(position_tables(own), position_tables(model), strict=True):
        rows, longer = before.module.weight[before.offset :], after.module.weight[after.offset :]
        assert torch.equal(longer, rows[torch.arange(1500) % len(rows)])
        assert torch.equal(after.module.weight[: after.offset], before.module.weight[: before.offset])
    inputs = family.inputs([40, 23])
    assert torch.equal(hidden(model, inputs), hidden(own, inputs))
    assert hidden(model, family.inputs([1500])).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "roberta", "opt"])
def test_interpolated_tables_keep_their_ends_and_are_straight_between_their_rows(name):
    before, after = position_tables(FAMILIES[name].model())[0], position_tables(extended(name, 1999, "interpolate"))[0]
    rows, longer = (table.module.weight.detach()[table.offset :] for table in (before, after))
    place = np.linspace(0, len(rows) - 1, 1999)
    expected = np.stack([np.interp(place, np.arange(len(rows)), column) for column in rows.T.numpy()], axis=1)
    assert np.abs(longer.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("method", ["rope-linear", "rope-yarn", "rope-dynamic"])
def test_rotary_embeddings_turn_as_transformers_turns_them(name, method):
    own = FAMILIES[name].model()
    model = extended(name, 2400, method)
    # The model as transformers builds it from a config that asks for that scaling.
    parameters = json.loads(json.dumps(own.config.rope_parameters))
    for kind in [parameters] if "rope_type" in parameters else [parameters["full_attention"]]:
        kind.update(rope_type=method.removeprefix("rope-"), factor=4.0)
        if method == "rope-yarn":
            kind["original_max_position_embeddings"] = 600
    config = type(own.config).from_dict(own.config.to_dict() | {"rope_parameters": parameters})
    built = type(own)(config).train(False)
    built.load_state_dict(own.state_dict())
    for length in (50, 900):
        inputs = FAMILIES[name].inputs([length])
        result, expected = hidden(model, inputs), hidden(built, inputs)
        assert torch.allclose(result, expected, atol=1e-4 * float(expected.abs().max()))
        changed = not torch.allclose(result, hidden(own, inputs), rtol=0, atol=1e-6 * float(expected.abs().max()))
        # Only dynamic scaling leaves texts of the old length alone.
        assert changed == (method != "rope-dynamic" or length > 600)


def test_dynamic_scaling_forgets_longer_texts():
    model, inputs = extended("llama", 2400, "rope-dynamic"), FAMILIES["llama"].inputs([40])
    before = hidden(model, inputs)
    hidden(model, FAMILIES["llama"].inputs([1000]))
    assert torch.equal(hidden(model, inputs), before)


def test_dynamic_scaling_can_be_exported():
    model, family = extended("llama", 2400, "rope-dynamic"), FAMILIES["llama"]
    inputs = family.inputs([30, 20])
    RewriteAttention(AttentionSection(pattern="local:16"), inputs).run(model)
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    assert any(node.op_type in ("ReduceMax", "Max") for node in export_onnx(model, inputs, axes).graph)


def test_rotary_embeddings_of_narrow_patterns_need_no_scaling():
    own, model = FAMILIES["llama"].model(), extended("llama", 2400, widest=300)
    inputs = FAMILIES["llama"].inputs([50])
    assert torch.equal(hidden(model, inputs), hidden(own, inputs))
    assert model.config.max_position_embeddings == 2400
    scaled = extended("llama", 2400, widest=None)
    assert scaled.config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("name", "method", "length", "reason"),
    [
        ("bert", "auto", 600, "already takes 600 tokens"),
        ("bert", "rope-yarn", 900, "a table of absolute positions"),
        ("llama", "tile", 900, "rotary embeddings"),
        ("t5-encoder", "auto", 900, "neither a position table"),
        ("vit", "auto", 900, "reads no text"),
        ("clip-vision", "tile", 900, "reads no text"),
    ],
)
def test_what_cannot_be_extended_says_why(name, method, length, reason):
    with pytest.raises(PreconditionError, match=reason) as refusal:
        extended(name, length, method)
    assert refusal.value.exit_code == 2
    assert refusal.value.remedy


def test_sinusoidal_positions_are_refused():
    config = transformers.MarianConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=1,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(PreconditionError, match="sinusoidal"):
        ExtendPositions(PositionsSection(max_length=100)).run(transformers.MarianModel(config).get_encoder())


def test_scaled_embeddings_are_not_scaled_again():
    model = extended("llama", 1200, "rope-linear")
    with pytest.raises(PreconditionError, match="scales its rotary embeddings already"):
        ExtendPositions(PositionsSection(max_length=2400)).run(model)


def test_the_section_is_checked():
    with pytest.raises(UsageError, match="max_length does not say how far"):
        build_recipe({"positions": {"method": "tile"}})
    with pytest.raises(UsageError, match="method"):
        build_recipe({"positions": {"max_length": 900, "method": "tiles"}})


@pytest.mark.parametrize(
    ("form", "causal", "reach"),
    [
        ("local:10", False, (5, 5, 0)),
        ("local:10", True, (9, 0, 0)),
        ("local:3:7", False, (3, 7, 0)),
        ("dilated:8:4", False, (16, 16, 0)),
        ("block:16:1", False, (31, 31, 0)),
        ("block:16", True, (15, 0, 0)),
        ("local:8|global:3|sinks:5", False, (4, 4, 5)),
        ("local:8|strided:4", False, None),
        ("dense", False, None),
        ("linear:elu", False, None),
    ],
)
def test_reach(form, causal, reach):
    found = reach_of(parse_form(form), causal)
    assert (found and (found.left, found.right, found.first)) == reach
    pattern = parse_form(form)
    if reach is not None:
        seen = pattern.mask(200, 200, causal)
        query, key = np.nonzero(seen)
        far = (key - query < -reach[0]) | (key - query > reach[1])
        assert (np.minimum(query, key)[far] < reach[2]).all()


def thinned(name: str, form: str) -> tuple[transformers.PreTrainedModel, SparsePositions]:
    family = FAMILIES[name]
    model = family.model()
    rewriting = RewriteAttention(AttentionSection(pattern=form), family.inputs([40, 23]))
    rewriting.run(model)
    plans = [(layer.name, plan.geometry.form, layer.visibility.causal) for layer, plan, _ in rewriting.layers]
    step = SparsePositions(PositionsSection(sparse=True), plans)
    step.run(model)
    step.ensures(model)
    return model, step


@pytest.mark.parametrize(
    ("name", "form", "rows"),
    [
        ("bert", "local:16", (0, 64)),
        ("bert", "global:2|local:64", (2, 128)),
        ("roberta", "local:100|sinks:3", (3, 128)),
        ("gpt2", "local:64|sinks:4", (4, 64)),
        ("opt", "local:65", (0, 128)),
    ],
)
def test_sparse_tables_look_positions_up_in_a_cycle(name, form, rows):
    model, step = thinned(name, form)
    assert step.rows() == rows
    own = FAMILIES[name].model()
    RewriteAttention(AttentionSection(pattern=form), FAMILIES[name].inputs([40, 23])).run(own)
    # The whole table with the rows that the formula names.
    first, cycle = rows
    for table in position_tables(own):
        position = torch.arange(table.positions)
        picked = torch.where(position < first, position, first + (position - first) % cycle)
        table.replace(lambda weight, picked=picked: weight[picked])
    inputs = FAMILIES[name].inputs([500, 77])
    assert torch.equal(hidden(model, inputs), hidden(own, inputs))
    assert {len(module.weight) - offset for module, offset in _tables(model)} == {sum(rows)}


def _tables(model: transformers.PreTrainedModel) -> list[tuple[torch.nn.Embedding, int]]:
    found = [module for module in model.modules() if hasattr(module, "cycle_rows")]
    return [(module, module.rows_before) for module in found]


def test_texts_within_one_cycle_are_as_they_were():
    family = FAMILIES["bert"]
    model, _ = thinned("bert", "local:64")
    own = family.model()
    RewriteAttention(AttentionSection(pattern="local:64"), family.inputs([40, 23])).run(own)
    inputs = family.inputs([128, 40])
    assert torch.equal(hidden(model, inputs), hidden(own, inputs))
    longer = family.inputs([129])
    assert not torch.equal(hidden(model, longer), hidden(own, longer))


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("bert", "dense", "bounded reach.*'dense'"),
        ("bert", "strided:8|local:16", "bounded reach"),
        ("bert", "local:700", "needs 704 rows.*has 600"),
        ("llama", "local:16", "no table of absolute"),
        ("vit", "local:16", "no table of absolute"),
    ],
)
def test_what_cannot_be_sparse_says_why(name, form, reason):
    with pytest.raises(PreconditionError, match=reason):
        thinned(name, form)


def source_of(directory: Path, kind: str) -> SourceModel:
    return load(locate(ModelSection(path=str(tiny_checkpoints.save(directory, kind, with_tokenizer=True)))))


def test_what_follows_from_the_length_is_changed_with_it(tmp_path):
    source = source_of(tmp_path, "BertModel")
    parameters = source.parameters
    extend_positions(source, PositionsSection(max_length=200))
    assert source.max_length == source.processor.model_max_length == source.config.max_position_embeddings == 200
    assert source.record().max_length == 200
    assert source.model.embeddings.position_ids.shape == source.model.embeddings.token_type_ids.shape == (1, 200)
    assert source.parameters == parameters + 136 * 16
    assert source.positions.model_dump() == {
        "trained": 64,
        "max_length": 200,
        "method": "tile",
        "rows": {"embeddings.position_embeddings": 200},
        "formula": None,
    }


def test_extended_and_sparse_tables_together(tmp_path):
    from effc.compiler.rewrite import rewrite

    source = source_of(tmp_path, "BertModel")
    extend_positions(source, PositionsSection(max_length=500, sparse=True))
    thin_positions(
        source,
        PositionsSection(max_length=500, sparse=True),
        rewrite(source, AttentionSection(pattern="local:32")).layers,
    )
    assert source.positions.rows == {"embeddings.position_embeddings": 64}
    assert source.positions.formula == "row(p) = p if p < 0 else 0 + (p - 0) mod 64"
    ids = torch.full((1, 500), 7)
    assert source.model(input_ids=ids).last_hidden_state.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "attention", "positions"),
    [
        ("BertModel", "local:32", {"max_length": 300}),
        ("BertModel", "local:32", {"max_length": 300, "sparse": True}),
        ("RobertaForSequenceClassification", "local:16", {"max_length": 200, "method": "interpolate"}),
        ("LlamaForCausalLM", "local:16", {"max_length": 200, "method": "rope-yarn"}),
        ("LlamaForCausalLM", "local:16", {"max_length": 200}),
    ],
)
def test_a_model_compiled_for_longer_texts(kind, attention, positions, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    checkpoint = tiny_checkpoints.save(tmp_path / "model", kind, with_tokenizer=True)
    length = positions["max_length"]
    artifact = effc.compile(
        checkpoint, attention=attention, positions=positions, output=tmp_path / "out",
        bench={"lengths": [length], "rounds": 1},
    )  # fmt: skip
    manifest = artifact.manifest
    assert not artifact.unmet
    assert (manifest.positions.max_length, manifest.source.max_length) == (length, length)
    assert manifest.benchmark.lengths == [length]
    # The dense twin is extended alike, and is made again where the cache has lost it.
    assert manifest.verification.extended.length == length
    assert manifest.verification.details["max_length"] == manifest.positions.trained
    model = effc.load(artifact.path)
    ids = np.random.default_rng(0).integers(5, 28, (2, length))
    outputs = model(input_ids=ids)
    source = load(locate(ModelSection(path=str(checkpoint))))
    extend_positions(source, PositionsSection(**positions), AttentionSection(pattern=attention))
    from effc.compiler.rewrite import rewrite

    layers = rewrite(source, AttentionSection(pattern=attention)).layers
    if positions.get("sparse"):
        thin_positions(source, PositionsSection(**positions), layers)
    name, expected = next(iter(source.model(input_ids=torch.from_numpy(ids)).items()))
    difference = np.linalg.norm(getattr(outputs, name) - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert difference < 1e-4
