"""What the operator does not accept ends in a message that names the remedy, never in a crash."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from native_cases import Case, model, session


def refuse_at_load(library: Path, message: str, **changes: object) -> None:
    attributes = {key: value for key, value in {**Case().attributes(), **changes}.items() if value is not None}
    with pytest.raises(Exception, match=message):
        session(library, model(attributes, False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "loocal:3"}, "'loocal:3' is not an attention pattern.*Known forms: dense, local:W"),
        ({"pattern": "local:32|random:8"}, "'random:8' is not an attention pattern"),
        ({"pattern": "local:x"}, "'x' in the pattern term 'local:x' is not a whole number"),
        ({"pattern": "local:-4"}, "'-4' in the pattern term 'local:-4' is not a whole number"),
        ({"pattern": "local:0"}, "'local:0' is not an attention pattern"),
        ({"pattern": "dilated:3"}, "'dilated:3' is not an attention pattern"),
        ({"pattern": ""}, "is not an attention pattern"),
        ({"pattern": "|".join(["sinks:1"] * 17)}, "more than 16 terms"),
        ({"pattern": None}, "attribute 'pattern' .* is missing"),
        ({"causal": 2}, "'causal' is 2. Set it to 0 or 1"),
        ({"num_heads": 0}, "'num_heads' must be a whole number of at least 1"),
        ({"num_heads": None}, "'num_heads' must be"),
        ({"num_heads": 6, "kv_num_heads": 4}, "must be a multiple of kv_num_heads"),
        ({"kv_num_heads": -1}, "must be a multiple of kv_num_heads"),
        ({"scale": float("nan")}, "'scale' is not a finite number"),
    ],
)
def test_attributes(library: Path, changes: dict[str, object], message: str) -> None:
    refuse_at_load(library, message, **changes)


def test_huge_parameters_mean_everything(library: Path) -> None:
    for pattern in ("local:99999999999999", "block:7:999999999999", "dilated:999999999:99999", "sinks:536870912"):
        case = Case(pattern=pattern)
        session(library, model(case.attributes(), False)).run(None, case.inputs())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"query": (1, 64, 63)}, "must be a multiple of num_heads"),
        (
            {"query": (1, 64, 8), "key": (1, 64, 8), "value": (1, 64, 8)},
            "head_dim is 4; .* multiple of 8 .*EFFC_NATIVE=0",
        ),
        ({"query": (1, 64, 1024), "key": (1, 64, 1024), "value": (1, 64, 1024)}, "head_dim is 512"),
        ({"query": (1, 64, 0), "key": (1, 64, 0), "value": (1, 64, 0)}, "head_dim is 0"),
        ({"query": (2, 64, 64)}, "query has batch 2 and key 1"),
        ({"key": (1, 64, 32)}, "the last dimension of key is 32; .* must be 64"),
        ({"value": (1, 63, 64)}, "value has shape .* they must be equal"),
        ({"query": (1, 65, 64)}, "65 queries and 64 keys"),
        ({"key_mask": (1, 63)}, "key_mask has shape .* it must be .* = .1, 64."),
        ({"key_mask": (2, 64)}, "key_mask has shape"),
    ],
)
def test_shapes(library: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    case = Case()
    feeds: dict[str, Any] = {
        name: np.zeros(shapes.get(name, (1, 64, 64)), np.float32) for name in ("query", "key", "value")
    }
    if "key_mask" in shapes:
        feeds["key_mask"] = np.ones(shapes["key_mask"], bool)
    with pytest.raises(Exception, match=message):
        session(library, model(case.attributes(), "key_mask" in shapes)).run(None, feeds)


def test_unknown_isa(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_ISA", "avx9000")
    refuse_at_load(library, "EFFC_ISA is 'avx9000'. Set it to avx512, avx2 or portable")


class FakeRuntime:
    """Just enough of an ONNX Runtime of some version to be refused by the library."""

    def __init__(self, version: bytes, newest_api: int):
        status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        self.message = b""

        def create_status(code: int, message: bytes) -> int:
            self.message = message
            return 1

        self._create_status = status(create_status)
        self._table = (ctypes.c_void_p * 300)(ctypes.cast(self._create_status, ctypes.c_void_p))
        address = ctypes.addressof(self._table)
        self._get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
            lambda wanted: address if wanted <= newest_api else None
        )
        self._version = ctypes.create_string_buffer(version)
        self._get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(self._version))
        self.base = (ctypes.c_void_p * 2)(
            ctypes.cast(self._get_api, ctypes.c_void_p), ctypes.cast(self._get_version, ctypes.c_void_p)
        )


@pytest.mark.parametrize(("version", "newest_api"), [(b"1.16.3", 16), (b"1.9.0", 17), (b"garbage", 17)])
def test_old_runtime(library: Path, version: bytes, newest_api: int) -> None:
    runtime = FakeRuntime(version, newest_api)
    entry = ctypes.CDLL(str(library)).RegisterCustomOps
    entry.restype = ctypes.c_void_p
    assert entry(None, ctypes.byref(runtime.base)) == 1
    assert b"needs ONNX Runtime 1.17 or newer and this is " + version in runtime.message
    assert b"Upgrade onnxruntime" in runtime.message


def test_version_of_this_runtime_is_accepted() -> None:
    assert tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 17)
