"""Artifacts side by side: the front, what is refused, and the files that a comparison writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report import bench_record, full_manifest

import effc
from effc import cli
from effc.compiler.compare import DENSE, Comparison
from effc.compiler.manifest import Manifest, SpeedRecord
from effc.errors import OutputError, UsageError

DENSE_MS = {128: 40.0, 512: 200.0}


def artifact(folder: Path, name: str, ms: dict[int, float], drop: float, *, data: str = "held.jsonl", **flags) -> Path:
    """A directory with an effc.json that says these figures."""
    manifest = full_manifest(model={"path": "models/tiny"}, attention="dense", quantization="none", require={}, **flags)
    assert manifest.verification is not None
    manifest.verification.quality_drop, manifest.verification.data = drop, data
    manifest.benchmark = bench_record({length: DENSE_MS[length] for length in ms}, ms)
    (folder / name).mkdir(parents=True)
    (folder / name / "effc.json").write_text(manifest.model_dump_json())
    return folder / name


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        artifact(tmp_path, "slow", {128: 30, 512: 160}, 0.05, low_rank={"rank": 64}),
        artifact(tmp_path, "good", {128: 20, 512: 100}, 0.01, prune=["ffn:0.25"]),
        artifact(tmp_path, "fast", {128: 45, 512: 50}, 0.10),
    ]


def test_the_front_is_what_nothing_beats_at_both(three: list[Path]) -> None:
    found = effc.compare(three)
    assert found.length == 512
    assert [one.name for one in found.contenders] == [DENSE, "slow", "good", "fast"]
    assert [one.speedup for one in found.contenders] == pytest.approx([1, 1.25, 2, 4])
    assert {one.name for one in found.contenders if one.on_front} == {DENSE, "good", "fast"}
    # At 128 tokens "fast" is slower than dense, and worse.
    short = effc.compare(three, length=128)
    assert [one.name for one in short.contenders] == ["fast", DENSE, "slow", "good"]
    assert {one.name for one in short.contenders if one.on_front} == {DENSE, "good"}


def test_equals_are_both_on_the_front(tmp_path: Path) -> None:
    twins = [artifact(tmp_path / name, "out", {512: 100}, 0.01) for name in "ab"]
    found = effc.compare(twins)
    # Directories of one name are told apart by their paths.
    assert [one.name for one in found.contenders] == [DENSE, *map(str, twins)]
    assert all(one.on_front for one in found.contenders)


def test_flags_say_what_was_done(three: list[Path]) -> None:
    flags = {one.name: one.flags for one in effc.compare(three).contenders}
    assert flags["good"] == "--prune=ffn:0.25" and flags[DENSE] == "" and flags["fast"] == ""


def test_what_cannot_be_compared_is_refused(three: list[Path], tmp_path: Path) -> None:
    other = artifact(tmp_path, "other", {512: 100}, 0.01, data="other.jsonl")
    with pytest.raises(UsageError, match="(?s)'other' was verified otherwise than 'slow'.*effc verify .*held.jsonl"):
        effc.compare([*three, other])
    with pytest.raises(UsageError, match="Not all were timed at 1024 tokens. Lengths of all: 128, 512"):
        effc.compare(three, length=1024)
    with pytest.raises(UsageError, match="nothing to compare"):
        effc.compare([])
    with pytest.raises(OutputError, match="no artifact"):
        effc.compare([tmp_path / "missing"])

    def edit(change) -> Path:
        values = json.loads((three[0] / "effc.json").read_text())
        change(values)
        (three[1] / "effc.json").write_text(json.dumps(values))
        return three[1]

    with pytest.raises(UsageError, match="two models"):
        effc.compare([three[0], edit(lambda values: values["source"].update(fingerprint="ff" * 32))])
    with pytest.raises(UsageError, match="(?s)timed with batch 8.*--batch 1 --threads 2"):
        effc.compare([three[0], edit(lambda values: values["benchmark"].update(batch=8))])
    with pytest.raises(UsageError, match="(?s)was not timed.*effc bench"):
        effc.compare([edit(lambda values: values.update(benchmark=None))])
    with pytest.raises(UsageError, match="(?s)was not verified.*effc verify"):
        effc.compare([edit(lambda values: values.update(verification=None))])


def test_files(three: list[Path], tmp_path: Path) -> None:
    found = effc.compare(three)
    for suffix in ("html", "md", "json", "svg"):
        found.save(tmp_path / f"out.{suffix}")
    assert json.loads((tmp_path / "out.json").read_text())["contenders"][2]["name"] == "good"
    table = (tmp_path / "out.md").read_text()
    assert "| **good** | `--prune=ffn:0.25` | 0.0100 | 2.00× |" in table and "| slow |" in table
    root = ElementTree.fromstring((tmp_path / "out.svg").read_text())
    written = "".join(root.itertext())
    assert all(name in written for name in ("slow", "good", "fast", DENSE)) and "var(--" not in str(root.attrib)
    assert "var(--" not in (tmp_path / "out.svg").read_text()
    html = (tmp_path / "out.html").read_text()
    assert "<svg" in html and "--prune=ffn:0.25" in html and "http" not in html.replace("http-equiv", "")
    with pytest.raises(UsageError, match=r"\.html, \.md, \.json, \.svg"):
        found.save(tmp_path / "out.pdf")
    with pytest.raises(OutputError, match="cannot be written"):
        found.save(tmp_path / "nowhere" / "out.md")


@pytest.fixture
def writers(tmp_path: Path) -> list[Path]:
    """Two artifacts that were measured writing, at different places, and one that was not."""
    paths = [artifact(tmp_path, name, {512: 100}, 0.01) for name in ("window", "linear", "silent")]
    for path, dense, compiled in (
        (paths[0], {128: 12, 512: 30}, {128: 10, 512: 20}),
        (paths[1], {2048: 90}, {2048: 9}),
    ):
        manifest = Manifest.model_validate_json((path / "effc.json").read_text())
        assert manifest.benchmark is not None
        record = bench_record(dense, compiled).model_dump()
        manifest.benchmark.decode = SpeedRecord(**{name: record[name] for name in SpeedRecord.model_fields})
        (path / "effc.json").write_text(manifest.model_dump_json())
    return paths


def test_what_a_token_costs(writers: list[Path], tmp_path: Path) -> None:
    found = effc.compare(writers)
    assert found.token_places == [128, 512, 2048]
    named = {one.name: one for one in found.contenders}
    assert named["window"].token_ms == {"128": 10, "512": 20}
    assert named["window"].token_speedup == pytest.approx({"128": 1.2, "512": 1.5})
    # The dense model has every place, and is the twin that was measured beside.
    assert named[DENSE].token_ms == {"128": 12, "512": 30, "2048": 90} and set(named[DENSE].token_speedup.values()) == {
        1
    }
    assert named["silent"].token_ms == {} and named["silent"].token(128) == "–"
    table = found.markdown().splitlines()
    assert table[0].endswith("| model | token at 128 | token at 512 | token at 2,048 |")
    assert {line.count("|") for line in table if line.startswith("|")} == {10}
    assert any("window" in line and line.endswith("| 10.0 ms, 1.20× | 20.0 ms, 1.50× | – |") for line in table)
    assert any("linear" in line and line.endswith("| – | – | 9.00 ms, 10.0× |") for line in table)
    assert "CPU time to write the token" in found.caption
    html = found.html()
    assert html.count(">token at ") == 3 and "20.0 ms, 1.50×" in html
    assert json.loads(found.json())["contenders"][0]["token_ms"]["2048"] == 90


def test_no_column_where_none_writes(three: list[Path]) -> None:
    found = effc.compare(three)
    assert found.token_places == []
    for text in (found.markdown(), found.html()):
        assert ">token at" not in text and "| token at" not in text and "write the token" not in text


def test_the_command_shows_what_a_token_costs(writers: list[Path], capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["compare", *map(str, writers)])
    printed = capsys.readouterr().out
    assert "token at 2,048" in printed and "20.0 ms, 1.50x" in printed


def test_command(three: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["effc", "compare", *map(str, three), *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main(["compare", *map(str, three), "-o", str(tmp_path / "out.html"), *arguments])
        assert done.value.code == 0
        printed = capsys.readouterr().out
        assert "good" in printed and (tmp_path / "out.html").is_file()
    assert Comparison(**{**json.loads(printed), "contenders": ()}).length == 512
