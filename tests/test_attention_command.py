"""``effc attention``: pictures of forms, and where a model's own attention goes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_checkpoints
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import effc
from effc.cli import main
from effc.compiler.attention_mass import attention_mass
from effc.compiler.attention_pictures import attention_forms, attention_picture
from effc.errors import EffcError, PreconditionError, UsageError
from effc.plugins.forms.registry import FORMS, parse_form, parse_pattern

TEXTS = ["the film was good and the plot was great but the acting was dull", "i loved it", "a very bad story", "it was"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_checkpoints.save(tmp_path_factory.mktemp("bert"), "BertModel", with_tokenizer=True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny_checkpoints.save(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", with_tokenizer=True)


def run(*arguments):
    return CliRunner().invoke(main, ["attention", *map(str, arguments)])


def own_weights(auto_class, checkpoint):
    """What transformers itself says: for each layer and text, the weights without padding."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = auto_class.from_pretrained(checkpoint, attn_implementation="eager").eval()
    result = [[] for _ in range(model.config.num_hidden_layers)]
    for text in TEXTS:
        with torch.no_grad():
            attentions = model(**tokenizer(text, return_tensors="pt"), output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            result[layer].append(weights[0].double().numpy())
    return result


@pytest.mark.parametrize(("kind", "auto_class"), [("encoder", AutoModel), ("decoder", AutoModelForCausalLM)])
@pytest.mark.parametrize("rows_at_once", [1 << 22, 90])
def test_mass_is_what_the_model_attends_to(kind, auto_class, rows_at_once, texts, request, monkeypatch):
    monkeypatch.setattr("effc.compiler.attention_recorder._WEIGHTS", rows_at_once)
    checkpoint = request.getfixturevalue(kind)
    causal = kind == "decoder"
    candidates = ["local:3", "sinks:2|local:2", "hierarchical:2", "local:3@0;dense@1"]
    mass = attention_mass(checkpoint, text=texts, samples=4, candidates=candidates)
    weights = own_weights(auto_class, checkpoint)
    lengths = [matrix.shape[-1] for matrix in weights[0]]
    assert (mass.samples, mass.tokens, mass.longest) == (4, sum(lengths), max(lengths))
    for layer, matrices in zip(mass.layers, weights, strict=True):
        assert layer.causal == causal
        np.testing.assert_allclose(layer.mass.sum(axis=1), 1, atol=1e-5)
        wanted = np.zeros_like(layer.mass)
        for matrix in matrices:
            for query in range(matrix.shape[1]):
                for key in range(matrix.shape[2]):
                    wanted[:, query - key + mass.longest - 1] += matrix[:, query, key] / mass.tokens
        np.testing.assert_allclose(layer.mass, wanted, atol=1e-5)
        distances = np.abs(np.arange(1 - mass.longest, mass.longest))
        np.testing.assert_allclose(layer.mean_distance, wanted @ distances, atol=1e-3)
        np.testing.assert_allclose(layer.by_distance(mass.edges()).sum(axis=1), 1, atol=1e-5)
        for candidate in ("local:3", "sinks:2|local:2"):
            pattern = parse_pattern(candidate)
            kept = (
                sum((matrix * pattern.mask(*matrix.shape[1:], causal)).sum(axis=(1, 2)) for matrix in matrices)
                / mass.tokens
            )
            np.testing.assert_allclose(layer.kept[str(pattern)], kept, atol=1e-5)
        by_head = layer.kept[str(parse_form("local:3@0;dense@1"))]
        np.testing.assert_allclose(by_head, [layer.kept["local:3"][0], 1], atol=1e-5)
        assert (layer.kept["hierarchical:2:2"] < 1).all() and (layer.kept["hierarchical:2:2"] > 0).all()


def test_mass_of_named_tokens(encoder, texts):
    mass = attention_mass(encoder, text=texts, samples=4, candidates=["global:cls", "global:1", "global:sep", "dense"])
    for layer in mass.layers:
        # [CLS] is the first token, so both see the same pairs; what is kept is a mean over all texts.
        np.testing.assert_allclose(layer.kept["global:cls"], layer.kept["global:1"], atol=1e-6)
        assert np.abs(layer.kept["global:sep"] - layer.kept["global:1"]).max() > 1e-4
        np.testing.assert_allclose(layer.kept["dense"], 1, atol=1e-5)
    assert mass.overall("dense") == pytest.approx(1, abs=1e-5)


def test_mass_leaves_texts_cut_and_told(encoder, texts):
    told = []
    mass = effc.attention_mass(
        encoder,
        text=texts,
        samples=2,
        max_length=8,
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert mass.longest == 8 and mass.samples == 2
    assert told[0][0] == "loading" and told[-1][1] == told[-1][2]


def test_refusals_of_models(encoder, texts, tmp_path):
    with pytest.raises(UsageError, match="depends on the text"):
        attention_mass(encoder, text=texts, candidates=["topk:4"])
    with pytest.raises(UsageError, match="not an attention pattern"):
        attention_mass(encoder, text=texts, candidates=["lokal:4"])
    with pytest.raises(EffcError, match="no data file"):
        attention_mass(encoder, text=tmp_path / "none.txt")
    with pytest.raises(PreconditionError, match="2 heads"):
        attention_mass(encoder, text=texts, candidates=["local:3@0;dense@1-2"])


def test_command_on_a_model(encoder, texts, tmp_path):
    image = tmp_path / "mass.png"
    done = run(encoder, "--text", texts, "--samples", 3, "--candidates", "local:3, local:3|sinks:1", "--save", image)
    assert done.exit_code == 0, done.output
    assert "local:3|sinks:1" in done.output and "These texts are short" in done.output
    assert image.read_bytes()[:4] == b"\x89PNG"
    done = run(encoder, "--text", texts, "--json", "--candidates", "local:3")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [layer["layer"] for layer in result["layers"]] == [
        f"encoder.layer.{number}.attention.self" for number in range(2)
    ]
    assert 0 < result["kept"]["local:3"] < 1
    assert len(result["layers"][0]["mass_by_distance"][0]) == len(result["distance_edges"]) - 1


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_can_be_pictured_by_its_bare_name(name):
    picture = attention_picture(name, 48, lengths=[64])
    assert parse_form(picture.form) == parse_form(name)
    if picture.weights is not None:
        assert picture.weights.shape == (48, 48)
        assert picture.weights.min() >= 0 and picture.weights.max() <= 1
    assert [cost.length for cost in picture.costs] == [48, 64]
    assert all(cost.flops > 0 for cost in picture.costs)
    json.dumps(picture.as_json(), allow_nan=False)


@pytest.mark.parametrize("causal", [False, True])
def test_density_is_exact(causal):
    picture = attention_picture("local:5|sinks:2", 40, causal=causal, head_dim=8)
    here = picture.costs[0]
    assert here.pairs == picture.weights.sum()
    assert here.density == pytest.approx(picture.weights.sum() / (40 * 41 / 2 if causal else 1600))
    assert here.flops == 4 * 8 * here.pairs
    assert here.share == pytest.approx(here.density)


def test_the_text_shows_the_pattern():
    lines = attention_picture("block:4", 8).as_text().splitlines()
    assert lines == ["████", "████", "    ████", "    ████"]
    lines = attention_picture("local:1", 4).as_text().splitlines()
    assert lines == ["▀▄", "  ▀▄"]
    assert attention_picture("dense", 3).as_text().splitlines() == ["███", "▀▀▀"]


@pytest.mark.parametrize("length", [1, 2, 79, 80, 81, 333])
def test_the_text_fits_the_width(length):
    picture = attention_picture("hierarchical:8:3", length)
    lines = picture.as_text(40).splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) <= 20
    # A mean that stands for a whole block is faint, but there.
    assert all(character in " ·░▒▓█▀▄" for line in lines for character in line)
    if length == 333:
        assert lines[0][-1] != " "


def test_command_draws_and_saves(tmp_path):
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        image = tmp_path / f"picture{suffix}"
        done = run("local:8|sinks:2", "--length", 32, "--causal", "--save", image)
        assert done.exit_code == 0, done.output
        assert image.read_bytes().startswith(start)
    assert "█" in done.output and "density" in done.output and "8,192" in done.output
    result = json.loads(run("local:8", "--length", 32, "--head-dim", 16, "--json").stdout)
    assert result["costs"][0]["flops"] == 64 * parse_pattern("local:8").visible_pairs(32)


def test_list_names_every_form_with_its_syntax():
    listed = json.loads(run("--list", "--json").stdout)
    assert listed == attention_forms()
    assert {form["name"] for form in listed} == set(FORMS)
    assert all(form["syntax"] and form["summary"] and form["group"] for form in listed)
    shown = "".join(run("--list").output.split())
    for name in FORMS:
        assert name in shown
    assert "[:WINDOW]" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lokal:8"], "Did you mean 'local'"),
        (["no/such"], "no file or directory"),
        ([], "nothing to show"),
        (["local:8", "--length", "0"], "cannot be drawn"),
        (["local:8", "--length", "100000"], "cannot be drawn"),
        (["local:8", "--head-dim", "-1"], "head"),
        (["local:8", "--samples", "3"], "--samples"),
        (["--list", "--causal"], "--causal"),
        (["local:8", "--save", "picture.xyz"], "image format"),
        (["local:8", "--text", "none.txt"], "local:8"),
    ],
)
def test_bad_usage_is_told(arguments, named):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert named in " ".join(done.output.split())


def test_a_model_without_text_and_options_that_mean_nothing(encoder, texts):
    done = run(encoder)
    assert done.exit_code == 2 and "--text" in done.output
    done = run(encoder, "--text", texts, "--causal")
    assert done.exit_code == 2 and "--causal" in done.output
