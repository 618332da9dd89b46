"""Texts that are written at once with prefill and decode engines: each must become what it becomes alone.

The engines' graphs are real and are computed by ONNX Runtime, behind stand-ins for torch with CUDA and for TensorRT.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_artifacts import compile_plain, stand_in, with_engines
from generation_cases import ToyModel

import effc
from effc.compiler import engine_choice
from effc.compiler.artifact_files import read_manifest
from effc.compiler.engine_device import TorchDevice
from effc.compiler.engine_records import Engine, Engines, longest_text, most_rows
from effc.compiler.engine_rows import EngineRows
from effc.compiler.engine_runner import EngineRunner
from effc.compiler.engine_runtime import EngineModel
from effc.compiler.sampling import SamplingSettings
from effc.errors import MissingDependencyError, PreconditionError, UsageError
from effc.exporters.engine_caches import pads_in_front
from effc.serving.backend.sampling_parameters import Wanted
from effc.serving.backend.scheduler import Job, Scheduler

MIXED = {"pattern": "dense", "layers": {"*layers.0*": "local:4"}}
# When each text joins, its prompt's length, and how many tokens are written.
PLAN = [(0, 9, 12), (0, 1, 5), (2, 3, 6), (2, 30, 9), (4, 5, 3), (7, 3, 6), (7, 13, 4), (8, 9, 2)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A layer whose cache is bounded and one whose cache is not."""
    return compile_plain(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def engines(mixed):
    return with_engines(mixed, "engines")


@pytest.fixture(scope="module")
def half(mixed):
    return with_engines(mixed, "half", precision="fp16", shapes=("4x64",), archs=("sm_89",))


@pytest.fixture(scope="module")
def sinks(tmp_path_factory):
    return compile_plain(tmp_path_factory.mktemp("sinks"), "local:4|sinks:2")


@pytest.fixture(scope="module")
def sinks_engines(sinks):
    return with_engines(sinks, "engines")


@pytest.fixture
def modules(monkeypatch):
    """torch with CUDA and TensorRT, and two GPUs."""
    monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: {0: 86, 1: 89}.get(gpu))
    torch = stand_in(monkeypatch, "torch")
    return torch, stand_in(monkeypatch, "tensorrt")


def open_rows(artifact, capacity: int, gpu: int = 1, pads: bool = True) -> EngineRows:
    record = read_manifest(artifact).engines
    runner = EngineRunner(TorchDevice(artifact, record, gpu), artifact, engine_choice.engines_here(record, gpu))
    return EngineRows(runner, capacity, pads)


def prompt(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 27, length)


def generated(plain, tokens: np.ndarray, count: int) -> list[int]:
    model = effc.load(plain)
    return model.generate(tokens[None], max_new_tokens=count, eos_token_id=[])[0, len(tokens) :].tolist()


def write(rows: EngineRows, plan: list[tuple[int, np.ndarray, int]]) -> list[list[int]]:
    """What each text of a plan becomes while others come and go."""
    made: list[list[int]] = [[] for _ in plan]
    active: list[int] = []
    logits: list[np.ndarray] = []
    clock = 0
    while active or any(not tokens for tokens in made):
        for number, (start, tokens, _) in enumerate(plan):
            if start == clock:
                logits.append(rows.add(tokens))
                active.append(number)
        for row in reversed(range(len(active))):
            number = active[row]
            made[number].append(int(logits[row].argmax()))
            if len(made[number]) == plan[number][2]:
                rows.remove(row)
                active[row], logits[row] = active[-1], logits[-1]
                active.pop()
                logits.pop()
        if active:
            logits = list(rows.step([made[number][-1] for number in active]))
        clock += 1
    return made


@pytest.mark.parametrize("pads", [True, False])
def test_texts_that_come_and_go_are_what_they_are_alone(mixed, engines, modules, pads):
    torch, trt = modules
    rows = open_rows(engines, 8, pads=pads)
    torch.working_on = 1
    plan = [(start, prompt(length, seed), count) for seed, (start, length, count) in enumerate(PLAN)]
    assert write(rows, plan) == [generated(mixed, tokens, count) for _, tokens, count in plan]
    assert len(rows) == 0
    decoded = [shapes for graph, _, shapes in trt.runs if graph == "decode"]
    widest = max(shapes["input_ids"][0] for shapes in decoded)
    # Profiles of 1x16, 4x32 and 2x64 take four rows at most.
    assert widest == (4 if pads else 2)
    assert rows.runs == len(decoded) < sum(count for _, _, count in plan)
    # The bounded layer keeps what the next token can see, the other one the longest text in the run.
    assert max(shapes["past_key.0"][1] for shapes in decoded) == 3
    assert max(shapes["past_key.1"][1] for shapes in decoded) == 37


def test_caches_are_laid_out_anew_only_when_texts_come_or_go(mixed, engines, modules, monkeypatch):
    rows = open_rows(engines, 4)
    copies: list[Any] = []
    copy = TorchDevice.copy
    monkeypatch.setattr(TorchDevice, "copy", lambda self, *given: (copies.append(given), copy(self, *given))[1])
    for length in (4, 9, 6):
        rows.add(prompt(length, length))
    rows.step([5, 5, 5])
    # Two layers' keys and values, and a block for each text.
    assert len(copies) == 3 * 4
    rows.step([6, 6, 6])
    assert len(copies) == 3 * 4
    # Sorted by length they were 0, 2, 1; the longest leaves, and the other two are a block.
    rows.remove(1)
    rows.step([7, 7])
    assert len(copies) == 3 * 4 + 4
    rows.step([8, 8])
    assert len(copies) == 3 * 4 + 4


def test_half_precision_passes_through(engines, half, modules):
    kinds = {tensor.name: tensor.dtype for tensor in open_rows(half, 4)._runner.inputs("decode")}
    assert kinds["past_key.0"] == np.float16
    found = []
    for artifact in (half, engines):
        rows = open_rows(artifact, 3)
        logits = [rows.add(prompt(length, length)) for length in (9, 21, 2)]
        logits += [row for token in (5, 9, 14) for row in rows.step([token] * 3)]
        found.append(np.stack(logits))
    error = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1])
    assert 1e-6 < error < 2e-2


def test_effc_load_writes_with_them_too(mixed, engines, modules):
    model = EngineModel(engines, read_manifest(engines))
    tokens = prompt(9, 3)
    written = model.generate(tokens[None], max_new_tokens=6, eos_token_id=[])[0, 9:]
    assert written.tolist() == generated(mixed, tokens, 6)
    assert modules[1].loaded_libraries == [str(engines / "engines/libeffc_tensorrt.so")]


class TestScheduler:
    def write(self, scheduler: Scheduler, jobs: list[tuple[np.ndarray, Wanted]]) -> list[tuple[list[int], Any]]:
        """Tokens and end of each, all submitted at once from another thread than the one that works."""
        told: list[tuple[list[int], Any]] = [([], None)] * len(jobs)
        left, ended = threading.Semaphore(0), threading.Lock()
        for number, (tokens, wanted) in enumerate(jobs):
            made: list[int] = []

            def done(finish, number=number, made=made):
                with ended:
                    told[number] = (made, finish)
                left.release()

            scheduler.submit(Job(tokens, wanted, lambda token, made=made: made.append(token), done, lambda: False))
        for _ in jobs:
            assert left.acquire(timeout=60)
        return told

    def test_requests_share_steps_on_the_gpu_of_the_instance(self, mixed, engines, modules):
        rows = open_rows(engines, 3)
        modules[0].working_on = 1
        scheduler = Scheduler(rows, [], 32, 64)
        prompts = [prompt(length, length) for length in (3, 20, 8, 1, 12)]
        wanted = [Wanted(count, SamplingSettings(), (), True) for count in (6, 9, 3, 12, 4)]
        told = self.write(scheduler, list(zip(prompts, wanted, strict=True)))
        scheduler.close()
        for tokens, asked, (made, finish) in zip(prompts, wanted, told, strict=True):
            assert finish == "length" and made == generated(mixed, tokens, asked.max_tokens)
        assert rows.runs < sum(asked.max_tokens for asked in wanted)

    def test_texts_beyond_the_profiles_are_refused(self, mixed, engines, modules, tmp_path):
        record = read_manifest(engines).engines.model_copy(deep=True)
        for engine in record.engines:
            del engine.profiles[2]
        runner = EngineRunner(TorchDevice(engines, record, 0), engines, engine_choice.engines_here(record, 0))
        scheduler = Scheduler(EngineRows(runner, 2, True), [], 32, 64)
        with pytest.raises(UsageError, match="20 tokens of prompt and 13 new ones are more than the 32 that"):
            self.write(scheduler, [(prompt(20, 0), Wanted(13, SamplingSettings(), (), True))])
        [(made, finish)] = self.write(scheduler, [(prompt(20, 0), Wanted(12, SamplingSettings(), (), True))])
        assert finish == "length" and made == generated(mixed, prompt(20, 0), 12)
        scheduler.close()

    def test_what_fails_ends_its_texts_and_no_others(self, mixed, engines, modules, monkeypatch):
        rows = open_rows(engines, 2)
        scheduler = Scheduler(rows, [], 32, 64)
        wanted = Wanted(3, SamplingSettings(), (), True)
        with monkeypatch.context() as broken:
            broken.setattr(modules[1].Context, "execute_async_v3", lambda *_: False)
            [(_, error)] = self.write(scheduler, [(prompt(4, 0), wanted)])
        assert "TensorRT failed on the engine 'prefill'" in str(error)
        [(made, finish)] = self.write(scheduler, [(prompt(4, 0), wanted)])
        assert finish == "length" and made == generated(mixed, prompt(4, 0), 3) and len(rows) == 0
        scheduler.close()


class TestWhatIsThere:
    def test_other_versions_of_tensorrt_are_refused_before_a_plan_is_read(self, mixed, engines, modules):
        modules[1].__version__ = "10.13.3.9"
        record = read_manifest(engines).engines
        with pytest.raises(PreconditionError, match=r"TensorRT 10.9.0.34, and 10.13.3.9 .*tensorrt==10.9.0.34"):
            TorchDevice(engines, record, 0)
        newer = record.model_copy(update={"version_compatible": True})
        device = TorchDevice(engines, newer, 0)
        assert device._runtime.engine_host_code_allowed

    @pytest.mark.parametrize(
        ("built", "installed", "newer", "runs"),
        [("10.9.0.34", "10.9.0.34", False, True), ("10.9.0.34", "10.9.0", False, True),
         ("10.9.0.34", "10.9.1.34", False, False), ("10.9.0.34", "10.13.3.9", True, True),
         ("10.9.0.34", "10.8.0.1", True, False), ("10.9.0.34", "11.0.0.1", True, False)],
    )  # fmt: skip
    def test_versions(self, built, installed, newer, runs):
        assert engine_choice.runs_in(built, installed, newer) == runs

    def test_what_is_missing_is_said_of_the_gpu_that_is_asked_for(self, mixed, engines, modules, monkeypatch):
        record = read_manifest(engines).engines
        assert [engine_choice.what_is_missing(record, gpu) for gpu in (0, 1)] == [None, None]
        assert "this machine has no GPU 2" in str(engine_choice.what_is_missing(record, 2))
        monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: 90)
        with pytest.raises(MissingDependencyError, match="sm_86, sm_89, and this GPU is sm_90: compile with --arch"):
            EngineModel(engines, read_manifest(engines))
        assert "GPU 1 is sm_90" in str(engine_choice.what_is_missing(record, 1))

    @pytest.mark.parametrize(
        ("form", "pads"),
        [("dense", True), ("local:4", True), ("strided:4|local:4", True), ("dilated:3:2|local:2", True),
         ("linear:elu", True), ("local:4|sinks:2", False), ("block:4", False), ("global:2|local:4", False),
         ("random:2|local:4", False)],
    )  # fmt: skip
    def test_forms_that_count_from_the_beginning_may_not_be_padded(self, form, pads):
        assert pads_in_front(ToyModel(form).graph()) == pads

    def test_records_survive_a_settings_file(self):
        profiles = [{"attention_mask": [[1, 2], [2, 64], [2, 64]]}, {"attention_mask": [[1, 2], [8, 32], [8, 32]]}]
        engine = Engine("decode.plan", "decode", "sm_89", profiles)
        record = Engines("tensorrt", "10.9.0", False, None, True, [engine], True)
        assert Engines.from_json(record.to_json()) == record
        assert replace(record, engines=[]).to_json()["engines"] == []
        assert longest_text(engine) == 64
        assert [most_rows(engine, length) for length in (1, 32, 33, 65)] == [8, 8, 2, 0]


@pytest.mark.slow
def test_forms_that_count_from_the_beginning_are_not_padded(sinks, sinks_engines, modules):
    assert not read_manifest(sinks_engines).engines.graphs["decode"].pads
    plan = [(start, prompt(length, seed), count) for seed, (start, length, count) in enumerate(PLAN)]
    expected = [generated(sinks, tokens, count) for _, tokens, count in plan]
    assert write(open_rows(sinks_engines, 8, pads=False), plan) == expected
    # What padding would do here.
    assert write(open_rows(sinks_engines, 8, pads=True), plan) != expected
