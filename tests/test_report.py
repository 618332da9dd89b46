"""The report says what the manifest says, escapes what it is given, and loads nothing."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from effc.compiler.manifest import (
    AttentionLayer,
    BenchRecord,
    ExtendedRecord,
    FileRecord,
    Manifest,
    OutputDeviation,
    PassRecord,
    PositionsRecord,
    Skipped,
    SourceRecord,
    TensorRecord,
    Timing,
    VerifyRecord,
)
from effc.compiler.recipe import build_recipe
from effc.compiler.report import render_report, write_report
from effc.compiler.report_command import command_line
from effc.compiler.report_explain import explain
from effc.compiler.report_page import cosine, milliseconds, number, times
from effc.compiler.report_plots import probe_series, visibility
from effc.compiler.report_verdict import judge
from effc.errors import OutputError
from effc.plugins.forms.registry import parse_pattern

SIZE_LIMIT = 1_500_000
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x.png onerror=y>$\\frac$]]>&amp;"


def bench_record(dense: dict[int, float], compiled: dict[int, float], **more: Any) -> BenchRecord:
    """A benchmark with these CPU medians in ms; everything else follows from them by simple rules."""

    def timing(ms: float, rss: float) -> Timing:
        return Timing(cpu_ms=ms, wall_ms=ms / 1.9, cpu_ms_min=ms * 0.94, wall_ms_min=ms / 2, peak_rss_mib=rss, runs=6)

    values: dict[str, Any] = dict(
        batch=1,
        lengths=sorted(dense),
        threads=2,
        dense={str(n): timing(ms, 180 + n / 9) for n, ms in dense.items()},
        compiled={str(n): timing(ms, 120 + n / 18) for n, ms in compiled.items()},
        speedup={str(n): dense[n] / compiled[n] for n in compiled},
        speedup_wall={str(n): dense[n] / compiled[n] * 0.97 for n in compiled},
        memory_ratio={str(n): (120 + n / 18) / (180 + n / 9) for n in compiled},
        dense_form="MultiHeadAttention fusion",
        machine={"cpu": "Some CPU", "isa": ["avx2", "avx512f"], "usable_cores": 2, "memory_gib": 15.6},
    )
    return BenchRecord(**(values | more))


def full_manifest(layers: int = 6, **recipe: Any) -> Manifest:
    """A manifest with every part filled in; its figures are made up and only serve the tests."""
    names = [f"encoder.layer.{i}.attention.self" for i in range(layers)]
    values = {
        "model": {"path": "models/all-MiniLM-L6-v2"},
        "attention": "local:256",
        "quantization": "int8",
        "require": {"min_speedup": 1.5, "max_quality_drop": 0.1},
    }
    near = {"last_hidden_state": OutputDeviation(relative_error=3e-7, cosine=0.9999999)}
    local = {"last_hidden_state": OutputDeviation(relative_error=0.31, cosine=0.941, top1_agreement=0.97)}
    return Manifest(
        effc_version="0.1.0",
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        target="onnxruntime",
        source=SourceRecord(
            path="models/all-MiniLM-L6-v2", kind="directory", model_type="bert", architecture="BertModel",
            task="feature-extraction", parameters=22_713_216, max_length=512, fingerprint="ab" * 32,
        ),
        recipe=build_recipe(values | recipe).model_dump(mode="json"),
        toolchain={"onnxruntime": "1.31.1", "torch": "2.13.0"},
        export_key="cd" * 32,
        passes=[
            PassRecord(name="attention", version=1, seconds=0.21, modified=True, changed=names[:-1],
                       skipped=[Skipped(module=names[-1], reason="excluded by the recipe")], probe=local),
            PassRecord(name="export", version=1, seconds=9.4, modified=True, cached=True, probe=near | local),
            PassRecord(name="fuse", version=1, seconds=0.5, modified=False, metrics={"LayerNormalization": 13}),
            PassRecord(name="quantize", version=2, seconds=3.1, modified=True,
                       changed=[f"/MatMul_{i}" for i in range(36)],
                       skipped=[Skipped(module="/pooler/MatMul", reason="too few rows")],
                       metrics={"MatMul": {"int8": 36, "fp32": 1}, "method": "percentile", "share": 0.973},
                       probe={"last_hidden_state": OutputDeviation(relative_error=0.33, cosine=0.9365)}),
        ],
        attention=[
            AttentionLayer(layer=name, source="dense", pattern="local:256" if name != names[-1] else "dense",
                           causal=False, num_heads=12, kv_heads=12, head_dim=32, rewritten=name != names[-1],
                           reason=None if name != names[-1] else "excluded by the recipe")
            for name in names
        ],
        inputs=[TensorRecord(name="input_ids", dtype="int64", shape=["batch", "length"])],
        outputs=[TensorRecord(name="last_hidden_state", dtype="float32", shape=["batch", "length", 384])],
        files={
            "model.onnx": FileRecord(sha256="12" * 32, bytes=1_200_000),
            "model.onnx.data": FileRecord(sha256="34" * 32, bytes=22_900_000),
            "tokenizer.json": FileRecord(sha256="56" * 32, bytes=700_000),
        },
        verification=VerifyRecord(
            data="reviews.jsonl", samples=64, outputs=local, quality_drop=0.0591, quality_metric="1 - mean cosine",
            task_metric={"name": "accuracy", "source": 0.83, "compiled": 0.825}, details={"tokens": 31_337},
        ),
        benchmark=bench_record(
            {128: 14.0, 512: 82.0, 1024: 240.0, 2048: 780.0, 4096: 2810.0},
            {128: 15.1, 512: 40.0, 1024: 95.0, 2048: 205.0, 4096: 431.0},
            break_even_length=180,
            kernels={name: "native effc::SparseAttention" for name in names[:-1]}
            | {names[-1]: "onnxruntime MultiHeadAttention", "/lin/0": "int8 MatMulInteger"},
        ),
    )  # fmt: skip


def bare_manifest() -> Manifest:
    """Nothing was measured, nothing recorded that may be empty."""
    full = full_manifest()
    return full.model_copy(
        update={
            "passes": [], "attention": [], "inputs": [], "outputs": [], "files": {}, "toolchain": {},
            "verification": None, "benchmark": None, "recipe": {},
        }
    )  # fmt: skip


def hostile_manifest() -> Manifest:
    """A loss, with markup and mathematics wherever a string may come from a model or a user."""
    full = full_manifest()
    deviation = OutputDeviation(relative_error=math.nan, cosine=math.nan)
    layer = full.attention[0].model_copy(update={"layer": HOSTILE, "rewritten": False, "reason": HOSTILE})
    future = full.attention[1].model_copy(update={"layer": "_b", "pattern": f"future:{HOSTILE}"})
    step = PassRecord(
        name=HOSTILE, version=1, seconds=1.0, modified=True, changed=[HOSTILE] * 2000,
        skipped=[Skipped(module=HOSTILE, reason=HOSTILE)], metrics={HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: None}]}},
        probe={HOSTILE: deviation, "_hidden": OutputDeviation(relative_error=0.0, cosine=1.0)},
    )  # fmt: skip
    return full.model_copy(
        update={
            "source": full.source.model_copy(update={"path": HOSTILE, "architecture": HOSTILE}),
            "attention": [layer, future],
            "passes": [step, step.model_copy(update={"name": "quant" + HOSTILE})],
            "files": {HOSTILE: FileRecord(sha256=HOSTILE, bytes=1)},
            "toolchain": {HOSTILE: HOSTILE},
            "recipe": build_recipe({"model": HOSTILE, "require": {"min_speedup": 1.5}}).model_dump(mode="json"),
            "verification": VerifyRecord(
                data=HOSTILE, samples=1, outputs={HOSTILE: deviation}, quality_drop=math.nan, quality_metric=HOSTILE,
                task_metric={HOSTILE: HOSTILE}, details={HOSTILE: HOSTILE},
            ),
            "benchmark": bench_record(
                {512: 40.0}, {512: 50.0}, kernels={HOSTILE: HOSTILE, "x": HOSTILE}, machine={HOSTILE: HOSTILE}
            ),
        }
    )  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; raises where tags are not nested properly."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("li", "p") and self.open[-1] != tag:
            raise AssertionError(f"</{tag}> closes {self.open[-1]}")
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


MANIFESTS = {"full": full_manifest, "bare": bare_manifest, "hostile": hostile_manifest}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_page_is_well_formed_small_and_loads_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(MANIFESTS[kind](), path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.stat().st_size < SIZE_LIMIT
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}, tag
        for key, content in attributes.items():
            assert not key.startswith("on"), key
            if key in {"src", "href", "xlink:href", "data", "action", "srcset"}:
                assert content is not None and content.startswith(("#", "data:image/png;base64,")), content
    css = "".join(re.findall(r"<style.*?</style>", text, re.S)) + "".join(a.get("style") or "" for _, a in page.tags)
    assert "@import" not in css and not re.search(r"url\((?!#)", css)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "#010a" not in text, "a stand-in colour was not replaced by its CSS variable"


def test_references_inside_the_page_are_unique_and_resolve() -> None:
    page = Page(render_report(full_manifest()))
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    repeated = {i for i in ids if ids.count(i) > 1}
    assert not repeated
    targets = [(a.get("href") or "")[1:] for _, a in page.tags if (a.get("href") or "").startswith("#")]
    clips = re.findall(r"url\(#([^)]+)\)", " ".join(a.get("clip-path") or "" for _, a in page.tags))
    assert targets and clips and set(targets + clips) <= set(ids)


def test_full_report_shows_verdict_and_evidence() -> None:
    text = Page(render_report(full_manifest())).text
    for expected in (
        "effc compile models/all-MiniLM-L6-v2 --attn=local:256 --quant=int8 --require-speedup=1.5 "
        "--max-quality-drop=0.1 -o OUT",
        "6.52×",
        "Faster than dense at 4,096 tokens",
        "2,810 ms → 431 ms",
        "✓ met required speed-up at 4,096 tokens ≥ 1.5×, reached 6.52×",
        "✓ met required quality drop (1 - mean cosine) ≤ 0.1, reached 0.0591",
        "348 MiB54.7% of dense (635 MiB) at 4,096 tokens",
        "break-even: 180 tokens",
        "0.93×",
        "breaks even at about 180 tokens",
        "0.0591 drop",
        "24.1 MB",
        "26.5%",  # 24.1 MB of 4 bytes x 22,713,216 parameters
        "native effc::SparseAttention",
        "onnxruntime MultiHeadAttention",
        "excluded by the recipe",
        "1 × int8 MatMulInteger",
        "from the cache",
        "nothing to do",
        "MultiHeadAttention fusion",
        "Some CPU",
        "12" * 32,
        "last_hidden_state",
        "accuracy",
    ):
        assert expected in text, expected
    assert "<img" not in text and "Not measured" not in text


def test_exact_density_is_shown() -> None:
    # |i - j| <= 128 at 1024: 257 * 1024 pairs less the two corners of 128 * 129 / 2 each.
    share = (257 * 1024 - 128 * 129) / 1024**2
    assert f"{share:.1%}" in Page(render_report(full_manifest())).text


def test_loss_is_said_plainly_and_coloured() -> None:
    manifest = full_manifest()
    manifest = manifest.model_copy(update={"benchmark": bench_record({512: 40.0}, {512: 50.0})})
    html = render_report(manifest)
    page = Page(html)
    assert judge(manifest).state == "loss"
    assert any("hero loss" in (a.get("class") or "") for _, a in page.tags)
    for expected in ("0.80×", "Slower than dense at 512 tokens: every run takes 25% more CPU time", "✗ not met", "▼"):
        assert expected in page.text
    assert "Faster" not in page.text
    assert "var(--loss)" in html.split("</style>")[1], "the bar is not drawn in the colour of a loss"


@pytest.mark.parametrize(
    ("compiled", "state"),
    [(50.0, "win"), (79.0, "missed"), (98.0, "even"), (100.0, "even"), (101.0, "loss"), (120.0, "loss")],
)
def test_verdict_state(compiled: float, state: str) -> None:
    manifest = full_manifest().model_copy(update={"benchmark": bench_record({512: 100.0}, {512: compiled})})
    assert judge(manifest).state == state


def test_unmeasured_report_names_the_commands() -> None:
    manifest = bare_manifest()
    text = Page(render_report(manifest)).text
    assert judge(manifest).state == "unknown"
    assert "Not measured: run `effc bench OUT`" in text and "Not measured: run `effc verify OUT`" in text
    assert "Faster" not in text and "✓" not in text


def test_quality_on_random_inputs_is_called_that() -> None:
    manifest = full_manifest()
    assert manifest.verification is not None and "Random inputs" not in Page(render_report(manifest)).text
    verification = manifest.verification.model_copy(update={"data": "random tokens"})
    text = Page(render_report(manifest.model_copy(update={"verification": verification}))).text
    assert "Random inputs show that the two models compute alike, not how well the task is still done" in text


def test_changed_positions_and_kept_biases_are_told() -> None:
    manifest = full_manifest()
    assert "Positions" not in Page(render_report(manifest)).text
    assert manifest.verification is not None
    changes: dict[str, Any] = {
        "positions": PositionsRecord(
            trained=512, max_length=4096, method="tile", rows={"embeddings.position_embeddings": 321}, formula="row(p)"
        ),
        "attention": [layer.model_copy(update={"bias": "bias by distance"}) for layer in manifest.attention],
    }
    text = Page(render_report(manifest.model_copy(update=changes))).text
    assert f"Extended from 512 to {number(4096)} tokens by" in text and "Only part of each position table" in text
    assert "321 rows" in text and "row(p)" in text and "adds its bias by distance" in text
    assert "Quality beyond 512 tokens is not measured" in text

    near = {"last_hidden_state": OutputDeviation(relative_error=0.1, cosine=0.99)}
    beyond = ExtendedRecord(reference="the long one", length=2048, samples=1, outputs=near, quality_drop=0.0125)
    changes["verification"] = manifest.verification.model_copy(update={"extended": beyond})
    text = Page(render_report(manifest.model_copy(update=changes))).text
    assert f"At {number(2048)} tokens, 1 sample, against the long one: quality drop 0.0125" in text
    assert "tokens is not measured" not in text


def test_unmeasured_requirement_counts_as_neither() -> None:
    manifest = full_manifest().model_copy(update={"benchmark": None, "verification": None})
    text = Page(render_report(manifest)).text
    assert "✓" not in text and "✗" not in text and text.count("not measured required") == 2


def test_hostile_strings_stay_text() -> None:
    html = render_report(hostile_manifest())
    page = Page(html)
    assert "<script" not in html and "onerror=y>" not in html
    assert page.text.count(HOSTILE) > 20
    assert {tag for tag, a in page.tags if tag == "img"} <= {"img"} and "evil.example" not in str(
        [a for tag, a in page.tags if tag == "img"]
    )
    assert "not a number" in page.text
    assert "and 1,700 more in effc.json" in page.text


def test_length_measured_on_one_model_only_is_named() -> None:
    bench = bench_record({512: 40.0, 1024: 100.0, 8192: 9000.0}, {512: 30.0, 1024: 50.0})
    text = Page(render_report(full_manifest().model_copy(update={"benchmark": bench}))).text
    assert "Not measured on both models: 8192 tokens" in text
    assert "Faster than dense at 1,024 tokens" in text


def test_many_layers_and_outputs_stay_small() -> None:
    manifest = full_manifest(layers=96)
    outputs = {f"present.{i}.key": OutputDeviation(relative_error=i / 100, cosine=1 - i / 1000) for i in range(120)}
    step = manifest.passes[0].model_copy(update={"probe": outputs})
    assert manifest.verification is not None
    manifest = manifest.model_copy(
        update={"passes": [step], "verification": manifest.verification.model_copy(update={"outputs": outputs})}
    )
    html = render_report(manifest)
    assert len(html) < SIZE_LIMIT
    assert "112 more outputs" in Page(html).text
    (worst, [after]), _ = probe_series(manifest.passes)
    assert worst == "worst of 120 outputs" and after is not None and after.relative_error == pytest.approx(1.19)


def test_command_line_names_a_recipe_only_where_flags_do_not_suffice() -> None:
    plain = build_recipe({"attention": "local:64", "quantization": "none"}).model_dump(mode="json")
    assert command_line(plain, "a b") == "effc compile 'a b' --attn=local:64 --quant=none -o OUT"
    more = build_recipe({"attention": {"pattern": "local:64", "exclude": ["*.0.*"]}}).model_dump(mode="json")
    assert "--recipe=recipe.yaml" in command_line(more, "m")


def test_picture_shares_are_exact() -> None:
    import base64
    import io

    import numpy as np
    from matplotlib.image import imread

    for text, causal, length in (
        ("local:6", False, 64),
        ("local:256", True, 4096),
        ("dense", True, 10),
        ("dense", False, 1),
    ):
        pattern = parse_pattern(text)
        uri, covered, step = visibility(pattern, causal, length)
        alpha = imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])))[..., 3]
        cells = covered // step
        expected = pattern.mask(covered, covered, causal).reshape(cells, step, cells, step).mean(axis=(1, 3))
        np.testing.assert_allclose(alpha, expected, atol=0.003)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (times(0.9996), "0.999×"), (times(0.5), "0.50×"), (times(12.34), "12.3×"),
        (cosine(0.93654), "0.9365"), (cosine(1.0), "1.0000"), (cosine(0.9999987), "0.9999987"),
        (cosine(math.nan), "not a number"),
        (number(3.1e-7), "3.1e-7"), (number(1234567), "1,234,567"), (number(999.96), "1,000"), (number(0.0500), "0.05"),
        (number(True), "yes"), (number(None), "–"),
        (milliseconds(0.1234), "0.123 ms"), (milliseconds(12345.0), "12.3 s"),
    ],
)  # fmt: skip
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("isa", "quantization", "told", "advised"),
    [
        (["avx2"], {"mode": "int8"}, True, True),
        (["avx2"], {"mode": "int8", "reduce_range": True}, True, False),
        (["avx2"], {"mode": "none", "layers": {"*": "int8"}}, True, True),
        (["avx2"], {"mode": "fp16"}, False, False),
        (["avx2", "avx512f", "avx512_vnni"], {"mode": "int8"}, False, False),
        (["neon"], {"mode": "int8"}, False, False),
    ],
)
def test_a_cpu_without_vnni_is_named(isa: list[str], quantization: dict[str, Any], told: bool, advised: bool) -> None:
    manifest = full_manifest(quantization=quantization)
    assert manifest.benchmark is not None
    manifest.benchmark.machine["isa"] = isa
    sentences = " ".join(explain(manifest))
    assert ("no VNNI" in sentences) == told and ("reduce_range" in sentences) == advised


def test_unwritable_path_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(full_manifest(), tmp_path / "missing" / "report.html")


def test_existing_report_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    write_report(bare_manifest(), path)
    assert "effc report" in path.read_text(encoding="utf-8")
