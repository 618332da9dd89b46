"""How engines are run: profiles, memory, streams, CUDA graphs. The device computes in numpy and keeps a log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from effc.compiler import engine_choice
from effc.compiler.engine_device import EngineTensor
from effc.compiler.engine_runner import EngineRunner
from effc.compiler.engine_runtime import EngineModel
from effc.compiler.manifest import EngineRecord, EnginesRecord, TensorRecord
from effc.errors import EffcError, UsageError


class FakeContext:
    """An engine that doubles its input. It reads memory when it runs, as a GPU does."""

    def __init__(self, device: FakeDevice, profile: int):
        self.device, self.profile, self.shapes, self.addresses = device, profile, {}, {}

    def set_shape(self, name, shape):
        self.shapes[name] = tuple(shape)

    def shape(self, name):
        assert set(self.shapes) == {"input_ids"}, "shapes of outputs are known once those of the inputs are"
        return (*self.shapes["input_ids"], 2)

    def set_address(self, name, tensor):
        assert tensor.shape == (self.shapes[name] if name in self.shapes else self.shape(name))
        self.addresses[name] = tensor

    def execute(self, stream):
        if self.device.refuses:
            return False
        assert set(self.addresses) == {"input_ids", "logits"}, "every tensor has its memory"
        bound = dict(self.addresses)

        def work():
            bound["logits"][:] = 2 * bound["input_ids"][..., None]

        if self.device.recording is not None:
            self.device.recording.append(work)
        else:
            work()
        self.device.log.append(("record" if self.device.recording is not None else "execute", self.profile, stream))
        return True


class FakeDevice:
    def __init__(self):
        self.log, self.stream, self.recording, self.refuses = [], "main", None, False
        self.contexts = []

    def load(self, file):
        self.log.append(("load", file.name))
        return file

    def tensors(self, engine):
        return [EngineTensor("input_ids", True, np.int64), EngineTensor("logits", False, np.float32)]

    def context(self, engine, profile):
        self.contexts.append(FakeContext(self, profile))
        return self.contexts[-1]

    def is_here(self, value):
        return isinstance(value, Here)

    def tensor(self, value, dtype):
        return value if isinstance(value, Here) and value.dtype == dtype else np.asarray(value, dtype).view(Here)

    def empty(self, shape, dtype):
        return np.full(shape, 99, dtype).view(Here)

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype).view(Here)

    def copy(self, target, source):
        self.log.append(("copy", self.stream))
        target[:] = source

    def clone(self, tensor):
        return tensor.copy()

    def current_stream(self):
        return self.stream

    def event(self, stream):
        return f"behind {stream}"

    def wait(self, stream, event):
        self.log.append(("wait", stream, event))

    def synchronize(self, stream):
        self.log.append(("synchronize", stream))

    def record(self, work):
        self.recording = []
        work("capture")
        graph, self.recording = self.recording, None
        return graph

    def replay(self, graph):
        self.log.append(("replay", self.stream))
        for work in graph:
            work()

    def numpy(self, tensor):
        return np.asarray(tensor)


class Here(np.ndarray):
    """A tensor of the device."""


def engine(*shapes: tuple[int, int]) -> EngineRecord:
    profiles = [{"input_ids": [[1, 1], list(shape), list(shape)]} for shape in shapes]
    empty = {"attention": {}, "linears": {}, "low": {}, "inputs": [], "outputs": []}
    return EngineRecord(file="engines/f.plan", graph="forward", arch="sm_89", seconds=1, profiles=profiles, **empty)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def runner(device) -> EngineRunner:
    return EngineRunner(device, Path("out"), {"forward": engine((8, 512), (1, 128))})


def ids(*shape: int, start: int = 0) -> Here:
    return (np.arange(np.prod(shape)).reshape(shape) + start).view(Here)


def executions(device) -> list[int]:
    return [entry[1] for entry in device.log if entry[0] == "execute"]


def test_each_call_runs_the_profile_that_fits(runner, device):
    for shape in [(1, 5), (2, 5), (1, 200), (1, 128)]:
        given = ids(*shape)
        np.testing.assert_array_equal(runner.run("forward", {"input_ids": given})["logits"][..., 0], 2 * given)
    assert executions(device) == [1, 0, 0, 1]
    assert len(device.contexts) == 2, "a context for each profile, and not for each call"


def test_tensors_of_the_device_are_used_where_they_lie(runner, device):
    given = ids(1, 5)
    found = runner.run("forward", {"input_ids": given, "token_type_ids": given})["logits"]
    assert device.contexts[0].addresses["input_ids"] is given
    assert device.contexts[0].addresses["logits"] is found
    assert not any(entry[0] in ("copy", "synchronize") for entry in device.log), "and nothing waits"


def test_arrays_are_brought_there_in_the_type_of_the_engine(runner):
    assert runner.run("forward", {"input_ids": np.ones((1, 3), np.int32)})["logits"].tolist() == [[[2, 2]] * 3]


def test_results_of_one_call_outlive_the_next(runner):
    first = runner.run("forward", {"input_ids": ids(1, 5)})["logits"]
    runner.run("forward", {"input_ids": ids(1, 5, start=100)})
    np.testing.assert_array_equal(first[0, :, 0], 2 * np.arange(5))


def test_another_stream_waits_for_the_one_before(runner, device):
    for stream in ("main", "main", "other", "main"):
        device.stream = stream
        runner.run("forward", {"input_ids": ids(1, 5)})
    assert [entry for entry in device.log if entry[0] == "wait"] == [
        ("wait", "other", "behind main"),
        ("wait", "main", "behind other"),
    ]


def test_a_shape_is_captured_once_and_replayed(runner, device):
    runner.capture("forward", {"input_ids": (1, 5)})
    order = [entry[0] for entry in device.log]
    assert order == ["load", "execute", "synchronize", "record"], "a run outside comes first"
    for start in (0, 50):
        given = ids(1, 5, start=start)
        np.testing.assert_array_equal(runner.run("forward", {"input_ids": given})["logits"][..., 1], 2 * given)
    assert [entry[0] for entry in device.log[4:]] == ["copy", "replay"] * 2
    runner.run("forward", {"input_ids": ids(1, 6)})
    assert device.log[-1][0] == "execute", "another shape is not replayed"
    (
        np.testing.assert_array_equal(runner.run("forward", {"input_ids": ids(1, 5)})["logits"][..., 0], 2 * ids(1, 5)),
        "and leaves the recorded addresses alone",
    )


def test_replayed_results_outlive_the_next(runner):
    runner.capture("forward", {"input_ids": (1, 5)})
    first = runner.run("forward", {"input_ids": ids(1, 5)})["logits"]
    runner.run("forward", {"input_ids": ids(1, 5, start=100)})
    np.testing.assert_array_equal(first[0, :, 0], 2 * np.arange(5))


def test_what_cannot_be_captured_or_run_is_said(runner, device):
    with pytest.raises(UsageError, match="also reads 'input_ids'"):
        runner.capture("forward", {})
    with pytest.raises(UsageError, match=r"up to \[8, 512\]"):
        runner.capture("forward", {"input_ids": (9, 5)})
    device.refuses = True
    with pytest.raises(EffcError, match="TensorRT failed on the engine 'forward'"):
        runner.run("forward", {"input_ids": ids(1, 5)})


def test_a_model_takes_arrays_and_tensors_of_the_device(device, monkeypatch):
    monkeypatch.setattr(engine_choice, "device_capability", lambda gpu: 89)
    record = EnginesRecord(
        flavour="tensorrt_rtx", version="1.7.1", precision="fp16", graphs={}, engines=[engine((8, 512))]
    )
    given = TensorRecord(name="input_ids", dtype="int64", shape=["batch", "sequence"])
    manifest = SimpleNamespace(engines=record, inputs=[given], source=SimpleNamespace(max_length=512))
    model = EngineModel(Path("out"), manifest, device)
    assert model(input_ids=[[1, 2, 3]])["logits"].tolist() == [[[2, 2], [4, 4], [6, 6]]]
    tensor = ids(1, 3)
    model(input_ids=tensor)
    assert device.contexts[0].addresses["input_ids"] is tensor
    model.capture(input_ids=(1, 3))
    np.testing.assert_array_equal(model(input_ids=tensor)["logits"][..., 0], 2 * tensor)
    assert device.log[-1] == ("replay", "main")
    with pytest.raises(UsageError):
        model(inputs=tensor)
