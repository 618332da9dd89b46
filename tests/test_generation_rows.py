"""Texts of different lengths in progress at once: each must become what it becomes alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from generation_cases import ToyModel

from effc.compiler.generation_rows import JointRows, SeparateRows, rows_for
from effc.compiler.sampling import SamplingSettings
from effc.errors import UsageError
from effc.serving.backend.sampling_parameters import Wanted, read_wanted
from effc.serving.backend.scheduler import Job, Scheduler

JOINT = ["local:4|sinks:2", "dense", "strided:4|local:4", "dilated:3:2|local:2", "linear:elu"]
SEPARATE = ["topk:4"]


def prompt(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 41, length)


def alone(generator, tokens: np.ndarray, count: int) -> list[int]:
    rows = SeparateRows(generator, 1)
    logits, made = rows.add(tokens), []
    for number in range(count):
        made.append(int(logits.argmax()))
        if number + 1 < count:
            [logits] = rows.step([made[-1]])
    return made


@pytest.mark.parametrize("form", [*JOINT, *SEPARATE])
def test_rows_that_come_and_go_are_what_they_are_alone(form, tmp_path):
    generator, _ = ToyModel(form).generator(tmp_path)
    rows = rows_for(generator, 4)
    assert isinstance(rows, JointRows if form in JOINT else SeparateRows)
    # Each starts at its own step and writes its own number of tokens; one has a prompt of a single token.
    plan = [
        (0, prompt(9, 1), 12),
        (0, prompt(1, 2), 5),
        (2, prompt(30, 3), 9),
        (4, prompt(5, 4), 3),
        (7, prompt(3, 5), 6),
    ]
    texts: list[list[int]] = [[] for _ in plan]
    active: list[int] = []
    logits: list[np.ndarray] = []
    for step in range(30):
        for number, (start, tokens, _) in enumerate(plan):
            if start == step:
                logits.append(rows.add(tokens))
                active.append(number)
        for row in reversed(range(len(active))):
            number = active[row]
            texts[number].append(int(logits[row].argmax()))
            if len(texts[number]) == plan[number][2]:
                rows.remove(row)
                active[row], logits[row] = active[-1], logits[-1]
                active.pop()
                logits.pop()
        assert len(rows) == len(active)
        if active:
            logits = list(rows.step([texts[number][-1] for number in active]))
    for text, (_, tokens, count) in zip(texts, plan, strict=True):
        assert text == alone(generator, tokens, count)


class Collected:
    """A job and what became of it."""

    def __init__(
        self, tokens: np.ndarray, wanted: Wanted, *, cancel_after: int | None = None, stop_at: int | None = None
    ):
        self.tokens: list[int] = []
        self.finish: object = None
        self.ended = threading.Event()
        self._stop_at, self._cancel_after = stop_at, cancel_after
        self.job = Job(tokens, wanted, self._emit, self._done, self._cancelled)

    def _emit(self, token: int) -> bool:
        self.tokens.append(token)
        return len(self.tokens) == self._stop_at

    def _done(self, finish: object) -> None:
        assert self.finish is None
        self.finish = finish
        self.ended.set()

    def _cancelled(self) -> bool:
        return self._cancel_after is not None and len(self.tokens) >= self._cancel_after


@pytest.fixture
def generator(tmp_path):
    return ToyModel("local:4|sinks:2").generator(tmp_path)[0]


@pytest.fixture
def scheduler(generator):
    made = Scheduler(rows_for(generator, 3), ends=[2], vocabulary=41, max_length=200, max_waiting=8)
    yield made
    made.close()


def test_more_requests_than_rows_are_all_answered_as_if_alone(generator, scheduler):
    jobs = [Collected(prompt(3 + n, n), Wanted(5 + n, SamplingSettings(), ignore_eos=True)) for n in range(8)]
    for entry in jobs:
        scheduler.submit(entry.job)
    for number, entry in enumerate(jobs):
        assert entry.ended.wait(30)
        assert entry.finish == "length"
        assert entry.tokens == alone(generator, prompt(3 + number, number), 5 + number)
    assert scheduler.stepped_tokens > scheduler.steps, "no step was shared"


def test_a_text_ends_at_its_end_token_and_at_a_stop_and_when_cancelled(generator, scheduler):
    tokens = prompt(4, 11)
    expected = alone(generator, tokens, 40)
    ending = Scheduler(rows_for(generator, 2), ends=[expected[6]], vocabulary=41, max_length=None)
    try:
        entry = Collected(tokens, Wanted(40, SamplingSettings()))
        ending.submit(entry.job)
        assert entry.ended.wait(30)
        assert entry.finish == "stop" and entry.tokens == expected[: expected.index(expected[6])]
    finally:
        ending.close()
    stopped = Collected(tokens, Wanted(40, SamplingSettings(), ignore_eos=True), stop_at=4)
    cancelled = Collected(tokens, Wanted(40, SamplingSettings(), ignore_eos=True), cancel_after=3)
    for entry in (stopped, cancelled):
        scheduler.submit(entry.job)
        assert entry.ended.wait(30)
    assert (stopped.finish, stopped.tokens) == ("stop", expected[:4])
    assert (cancelled.finish, cancelled.tokens) == ("cancelled", expected[:3])


def test_equal_seeds_draw_equal_texts_whoever_else_is_there(scheduler):
    wanted = Wanted(12, SamplingSettings(temperature=1.5, seed=3), ignore_eos=True)
    first = Collected(prompt(5, 1), wanted)
    scheduler.submit(first.job)
    assert first.ended.wait(30)
    others = [Collected(prompt(7, n), Wanted(12, SamplingSettings(temperature=2.0), ignore_eos=True)) for n in range(2)]
    second = Collected(prompt(5, 1), wanted)
    for entry in (*others, second):
        scheduler.submit(entry.job)
    assert second.ended.wait(30)
    assert second.tokens == first.tokens


def test_what_does_not_fit_is_refused(scheduler):
    greedy = SamplingSettings()
    for tokens, wanted, message in (
        (prompt(0, 0), Wanted(5, greedy), "empty"),
        (np.array([41]), Wanted(5, greedy), "out of range: 41"),
        (np.array([-1]), Wanted(5, greedy), "out of range: -1"),
        (prompt(150, 0), Wanted(51, greedy), "more than the 200 positions"),
    ):
        with pytest.raises(UsageError, match=message):
            scheduler.submit(Collected(tokens, wanted).job)


def test_a_queue_has_an_end_and_closing_tells_those_in_it(generator):
    scheduler = Scheduler(rows_for(generator, 1), ends=[], vocabulary=41, max_length=None, max_waiting=2)
    jobs = [Collected(prompt(3, n), Wanted(10_000, SamplingSettings(), ignore_eos=True)) for n in range(20)]
    refused = 0
    for entry in jobs:
        try:
            scheduler.submit(entry.job)
        except UsageError as error:
            assert "wait already" in str(error)
            refused += 1
    scheduler.close()
    assert refused >= 16
    told = [entry for entry in jobs if entry.ended.is_set()]
    assert len(told) == 20 - refused and all("stopping" in str(entry.finish) for entry in told)
    with pytest.raises(UsageError, match="stopping"):
        scheduler.submit(jobs[0].job)


def test_a_failing_graph_ends_the_texts_and_not_the_scheduler(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler._rows, "step", lambda tokens: 1 / 0)
    broken = Collected(prompt(3, 0), Wanted(5, SamplingSettings(), ignore_eos=True))
    scheduler.submit(broken.job)
    assert broken.ended.wait(30) and isinstance(broken.finish, ZeroDivisionError)
    monkeypatch.undo()
    entry = Collected(prompt(3, 0), Wanted(5, SamplingSettings(), ignore_eos=True))
    scheduler.submit(entry.job)
    assert entry.ended.wait(30) and entry.finish == "length"


class TestSamplingParameters:
    def test_as_vllm_names_them(self):
        wanted = read_wanted(
            {
                "max_tokens": "32",
                "temperature": 0.7,
                "top_k": 5,
                "top_p": "0.9",
                "seed": 1,
                "stop": "END",
                "ignore_eos": True,
            }
        )
        assert wanted == Wanted(
            32, SamplingSettings(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, seed=1), ("END",), True
        )

    def test_temperature_0_and_none_take_the_most_likely_token(self):
        assert not read_wanted({"temperature": 0, "top_p": 0.9}).sampling.samples
        assert not read_wanted({}).sampling.samples
        assert read_wanted({"top_k": -1}).sampling.samples

    @pytest.mark.parametrize(
        "values",
        [{"max_tokens": 0}, {"max_tokens": "many"}, {"max_tokens": 1.5}, {"max_tokens": True}, {"temperature": -1},
         {"temperature": "nan"}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 2}, {"top_k": -2}, {"stop": ""},
         {"stop": [1]}, {"stop": 5}, {"stop": {}}, {"ignore_eos": "yes"}, {"seed": -1}, {"max_tokens": 1e400},
         {"temprature": 1}, {"repetition_penalty": 0}, {"max_tokens": []}],
    )  # fmt: skip
    def test_nonsense_is_refused(self, values):
        with pytest.raises(UsageError):
            read_wanted(values)
