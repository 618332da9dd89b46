"""What users may write for pruning and low rank, and what they are told when it is wrong."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from effc.cli import main
from effc.compiler.recipe import build_recipe, merge
from effc.errors import UsageError


def steps(*values):
    return build_recipe({"prune": list(values)}).prune


def test_texts_say_method_share_and_criterion():
    heads, sparse = steps("heads:0.25:taylor", "2:4")
    assert (heads.method, heads.share, heads.criterion) == ("heads", 0.25, "taylor")
    assert (sparse.method, sparse.share, sparse.criterion) == ("2:4", None, "auto")
    (wanda,) = steps("wanda:0.5")
    assert (wanda.method, wanda.criterion, wanda.text) == ("unstructured", "wanda", "wanda:0.5")
    (vocab,) = steps("vocab:some:odd.txt")
    assert vocab.corpus == "some:odd.txt"


@pytest.mark.parametrize("text", ["2:4", "2:4:wanda", "magnitude:0.5", "heads:0.25", "ffn:0.5:taylor", "vocab:a.txt"])
def test_the_text_of_a_step_reads_back_as_the_step(text):
    (step,) = steps(text)
    assert step.text == text
    assert steps(step.text) == (step,)


def test_an_unquoted_two_four_in_yaml_is_no_number():
    recipe = build_recipe(yaml.safe_load("prune:\n- 2:4\n- heads:0.25\n"))
    assert [step.text for step in recipe.prune] == ["heads:0.25", "2:4"]
    assert build_recipe(yaml.safe_load("prune:\n- method: 2:4\n  criterion: wanda\n")).prune[0].text == "2:4:wanda"
    assert build_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_steps_run_in_one_order_whatever_the_order_they_are_written_in():
    asked = ["magnitude:0.5", "ffn:0.25", "heads:0.25", "layers:0.25", "vocab:a.txt"]
    assert [step.method for step in steps(*asked)] == ["vocab", "layers", "heads", "ffn", "unstructured"]


def test_one_step_needs_no_list_and_a_map_takes_globs():
    assert steps({"method": "ffn", "share": 0.5, "include": ["*.0.*"]})[0].include == ("*.0.*",)
    assert build_recipe({"prune": "heads:0.5"}).prune[0].method == "heads"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hed:0.25", ["hed", "Did you mean 'heads'?"]),
        ("heads", ["needs a share"]),
        ("heads:1.5", ["between 0 and 1"]),
        ("heads:0", ["between 0 and 1"]),
        ("heads:nan", ["between 0 and 1"]),
        ("heads:much", ["much"]),
        ("heads:0.5:wanda", ["wanda", "taylor"]),
        ("2:4:0.5", ["criterion"]),
        ("vocab:", ["corpus"]),
        ({"method": "2:4", "share": 0.5}, ["no share"]),
        ({"method": "heads", "share": 0.5, "corpus": "a.txt"}, ["no corpus"]),
        ({"method": "heads", "shaer": 0.5}, ["shaer", "Did you mean 'share'?"]),
        ({"method": "hads", "share": 0.5}, ["Did you mean 'heads'?"]),
    ],
)
def test_what_is_wrong_is_named(value, words):
    with pytest.raises(UsageError) as error:
        steps(value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "values", [["2:4", "magnitude:0.5"], ["heads:0.25", "heads:0.5"], ["vocab:a.txt", "vocab:b.txt"]]
)
def test_steps_that_contradict_each_other_are_refused(values):
    with pytest.raises(UsageError):
        steps(*values)


def test_two_kinds_of_zeros_may_share_a_model_where_each_has_its_layers():
    first = {"method": "2:4", "include": ["*.0.*"]}
    second = {"method": "magnitude", "share": 0.5, "include": ["*.1.*"]}
    assert len(steps(first, second)) == 2


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [("0.5", "parameters", 0.5), (0.5, "parameters", 0.5), ("rank:64", "rank", 64), ("energy:0.95", "energy", 0.95)],
)
def test_low_rank_budgets(text, key, value):
    section = build_recipe({"low_rank": text}).low_rank
    assert getattr(section, key) == value
    assert build_recipe({"low_rank": section.text}).low_rank == section


@pytest.mark.parametrize("value", ["abc", "rank:0", "rank:1.5", "1.5", "energy:2", {}, {"rank": 4, "energy": 0.5}])
def test_impossible_low_rank_budgets(value):
    with pytest.raises(UsageError):
        build_recipe({"low_rank": value})


def test_flags_override_the_recipe():
    merged = merge({"prune": ["heads:0.5"], "low_rank": {"rank": 8}}, {"prune": ["ffn:0.25"], "low_rank": "0.5"})
    recipe = build_recipe(merged)
    assert [step.text for step in recipe.prune] == ["ffn:0.25"]
    assert recipe.low_rank.parameters == 0.5


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--prune=hads:0.2"], "heads"), (["--low-rank=rank:x"], "rank:64"), (["--prune=2:4:x"], "wanda")],
)
def test_the_command_explains_wrong_flags_with_exit_code_two(flags, word, tmp_path):
    result = CliRunner().invoke(main, ["compile", str(tmp_path), *flags])
    assert result.exit_code == 2
    assert word in result.output
