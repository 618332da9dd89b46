"""The benchmark: honest ratios, one process per model, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_artifacts import LAYER, VOCABULARY, image_artifact, make_artifact, token_manifest, token_model

import effc
from effc.compiler.artifact_files import read_manifest
from effc.compiler.bench import bench, choose_lengths, measure
from effc.compiler.bench_process import Candidate, Worker
from effc.compiler.bench_ratios import break_even
from effc.compiler.feeds import TensorSpec, random_inputs
from effc.errors import EffcError, OutputError, UsageError

TOKENS = [
    TensorSpec("input_ids", "int64", ("batch", "sequence"), VOCABULARY - 1),
    TensorSpec("attention_mask", "int64", ("batch", "sequence"), 1),
    TensorSpec("token_type_ids", "int64", ("batch", "sequence"), 1),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifact"))


class TestRecord:
    def test_a_twin_with_more_work_is_slower(self, artifact: Path, tmp_path: Path) -> None:
        token_model(tmp_path / "twin.onnx", work=1500)
        told: list[tuple[str, int, int]] = []
        record = bench(
            artifact,
            lengths=[64, 16, 64],
            rounds=2,
            threads=1,
            native=False,
            twin=tmp_path / "twin.onnx",
            progress=lambda *step: told.append(step),
        )
        assert record.lengths == [16, 64] and record.threads == 1 and record.batch == 1
        for key in ("16", "64"):
            dense, compiled = record.dense[key], record.compiled[key]
            assert record.speedup[key] == dense.cpu_ms / compiled.cpu_ms > 1
            assert record.speedup_wall[key] == dense.wall_ms / compiled.wall_ms > 1
            assert 0 < compiled.cpu_ms_min <= compiled.cpu_ms
            assert compiled.runs > dense.runs >= 2
            # On one thread the CPU time of a run cannot exceed its wall time by more than the clocks' resolution.
            assert compiled.cpu_ms_min <= compiled.wall_ms_min * 1.2 + 0.05
            assert 20 < compiled.peak_rss_mib < 1000
        assert record.break_even_length == 16
        assert record.kernels[LAYER] == "standard-op body"
        assert record.kernels["int8_product"] == "int8 DynamicQuantizeMatMul"
        assert record.dense_form == "1 x Attention"
        assert record.machine["logical_cpus"] == os.cpu_count()
        assert [step[1] for step in told] == [0, 1, 2, 3] and {step[2] for step in told} == {3}

    def test_a_model_beside_itself_is_even(self, artifact: Path) -> None:
        model = Candidate(artifact / "model.onnx")
        timings = measure({"a": model, "b": model}, TOKENS, length=64, batch=2, rounds=3, threads=1)
        assert 1 / 3 < timings["a"].cpu_ms_min / timings["b"].cpu_ms_min < 3

    def test_peak_memory_is_each_models_own(self, artifact: Path, tmp_path: Path) -> None:
        # 2^20 rows of 16 floats are 64 MiB that the other model does not have.
        token_model(tmp_path / "large.onnx", vocabulary=2**20)
        models = {"small": Candidate(artifact / "model.onnx"), "large": Candidate(tmp_path / "large.onnx")}
        timings = measure(models, TOKENS, length=8, batch=1, rounds=1, threads=1, seconds=0)
        assert timings["small"].runs == 1
        assert timings["large"].peak_rss_mib - timings["small"].peak_rss_mib > 60

    def test_json_has_what_scripts_read(self, artifact: Path) -> None:
        record = bench(artifact, lengths=[8], rounds=1, native=False, twin=artifact / "model.onnx")
        values = json.loads(record.model_dump_json())
        assert list(values["dense"]) == list(values["compiled"]) == list(values["speedup"]) == ["8"]

    def test_a_twin_may_name_its_form(self, artifact: Path, tmp_path: Path) -> None:
        import onnx

        model = token_model(tmp_path / "twin.onnx")
        onnx.helper.set_model_props(model, {"effc.dense_form": "MultiHeadAttention, fused"})
        onnx.save(model, tmp_path / "twin.onnx")
        record = bench(artifact, lengths=[8], rounds=1, twin=tmp_path / "twin.onnx")
        assert record.dense_form == "MultiHeadAttention, fused"

    def test_a_twin_may_do_without_the_mask(self, artifact: Path, tmp_path: Path) -> None:
        token_model(tmp_path / "twin.onnx", mask=False)
        assert bench(artifact, lengths=[8], rounds=1, twin=tmp_path / "twin.onnx").dense["8"].runs > 1

    def test_fixed_inputs_have_one_length(self, tmp_path: Path) -> None:
        directory = image_artifact(tmp_path)
        record = bench(directory, batch=3, rounds=1, twin=directory / "model.onnx")
        assert record.lengths == [5] and list(record.speedup) == ["5"]
        with pytest.raises(UsageError, match="one size only, 5 positions, not 128"):
            bench(directory, lengths=[128], twin=directory / "model.onnx")


class TestRefusals:
    def test_lengths_beyond_the_model(self, artifact: Path) -> None:
        with pytest.raises(UsageError, match="at most 64 tokens.*at 65"):
            bench(artifact, lengths=[8, 65], twin=artifact / "model.onnx")

    @pytest.mark.parametrize("name", ["batch", "rounds", "threads"])
    def test_counts_below_one(self, artifact: Path, name: str) -> None:
        with pytest.raises(UsageError, match=f"{name} must be at least 1, not 0"):
            bench(artifact, twin=artifact / "model.onnx", **{name: 0})

    def test_what_is_no_artifact(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="not an effc artifact"):
            bench(tmp_path)

    def test_a_model_that_cannot_be_loaded(self, artifact: Path, tmp_path: Path) -> None:
        (tmp_path / "twin.onnx").write_bytes(b"nothing")
        with pytest.raises(
            EffcError,
            match=r"dense model '.*twin.onnx' ended with status 1, saying: .*twin.onnx.*Compile the model again",
        ):
            bench(artifact, lengths=[8], native=False, twin=tmp_path / "twin.onnx")

    def test_a_model_that_fails_at_run_time(self, artifact: Path) -> None:
        beyond = [TensorSpec("input_ids", "int64", ("batch", "sequence"), 10**6), *TOKENS[1:]]
        with pytest.raises(EffcError, match=r"the only model.*out of data bounds"):
            measure({"only": Candidate(artifact / "model.onnx")}, beyond, length=8, batch=1, rounds=1, threads=1)

    def test_a_worker_that_the_system_kills(self, artifact: Path) -> None:
        with Worker("dense", artifact / "model.onnx") as worker:
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(EffcError, match="was killed by the system, most likely for lack of memory.*shorter"):
                worker.ask(command="memory")


class TestLengths:
    @pytest.mark.parametrize(
        ("maximum", "expected"),
        [
            (None, [128, 512, 1024, 2048, 4096]),
            (8192, [128, 512, 1024, 2048, 4096]),
            (512, [128, 512]),
            (514, [128, 512]),
            (77, [77]),
            (400, [128, 400]),
            (3000, [128, 512, 1024, 2048, 3000]),
        ],
    )
    def test_defaults_follow_the_maximum(self, tmp_path: Path, maximum: int | None, expected: list[int]) -> None:
        assert choose_lengths(token_manifest(tmp_path, max_length=maximum), None) == expected

    @pytest.mark.parametrize(
        ("speedup", "expected"),
        [
            ({128: 1.2, 512: 3.0}, 128),
            ({128: 0.5, 512: 0.9}, None),
            ({512: 1.5, 128: 0.5}, 320),
            ({128: 1.0, 512: 2.0}, 128),
            ({128: 0.9, 512: 0.8, 1024: 1.2}, 768),
            ({}, None),
        ],
    )
    def test_break_even(self, speedup: dict[int, float], expected: int | None) -> None:
        assert break_even(speedup) == expected


def test_inputs_are_random_tokens_and_the_same_for_both_models(artifact: Path) -> None:
    first, second = (random_inputs(TOKENS, batch=2, length=1000, seed=64) for _ in range(2))
    for name, array in first.items():
        assert array.shape == (2, 1000) and array.dtype == "int64"
        assert (array == second[name]).all()
    assert first["input_ids"].min() == 0 and first["input_ids"].max() == VOCABULARY - 1
    assert (first["attention_mask"] == 1).all() and (first["token_type_ids"] == 0).all()
    assert read_manifest(artifact).inputs[0].maximum == VOCABULARY - 1


def test_the_worker_imports_nothing_heavy() -> None:
    code = (
        "import sys, effc.compiler.bench_worker;"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'onnx', 'rich') if m in sys.modules])"
    )
    root = Path(effc.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(artifact: Path, how: signal.Signals) -> None:
    code = (
        "import sys; from dataclasses import asdict; from pathlib import Path\n"
        "from effc.compiler.bench import _request\n"
        "from effc.compiler.bench_process import Candidate, Worker\n"
        "from effc.compiler.feeds import TensorSpec\n"
        "specs = [TensorSpec(n, 'int64', ('batch', 'sequence'), 1)"
        " for n in ('input_ids', 'attention_mask', 'token_type_ids')]\n"
        "model = Path(sys.argv[1])\n"
        "with Worker('dense', model) as worker:\n"
        "    worker.ask(command='open', **_request(Candidate(model), specs, 1, 8, 1))\n"
        "    print(worker.pid, flush=True)\n"
        "    worker.ask(command='run', seconds=60)\n"
    )
    root = Path(effc.__file__).parents[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(artifact / "model.onnx")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert running(worker)
    parent.send_signal(how)
    parent.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(worker)


def running(pid: int) -> bool:
    try:
        # The state stands behind the command, which may itself hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
