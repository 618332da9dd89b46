"""What the operator does not accept ends in a message that names the remedy, never in a crash."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from native_cases import Case, model, session


def refuse_at_load(library: Path, message: str, **changes: object) -> None:
    attributes = {key: value for key, value in {**Case().attributes(), **changes}.items() if value is not None}
    with pytest.raises(Exception, match=message):
        session(library, model(attributes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "loocal:3"}, "'loocal:3' is not an attention pattern.*Known forms: dense, local:W"),
        ({"pattern": "local:32|topk:8"}, "'topk:8' is not an attention pattern"),
        ({"pattern": "global:CLS"}, "'CLS' in the pattern term 'global:CLS' is not a whole number"),
        ({"pattern": "global:cls+"}, "'cls.' in the pattern term"),
        ({"pattern": "local:x"}, "'x' in the pattern term 'local:x' is not a whole number"),
        ({"pattern": "local:-4"}, "'-4' in the pattern term 'local:-4' is not a whole number"),
        ({"pattern": "local:0"}, "'local:0' is not an attention pattern"),
        ({"pattern": "dilated:3"}, "'dilated:3' is not an attention pattern"),
        ({"pattern": ""}, "is not an attention pattern"),
        ({"pattern": "|".join(["sinks:1"] * 65)}, "more than 64 terms"),
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
        session(library, model(case.attributes())).run(None, case.inputs())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"query": (1, 64, 63)}, "must be a multiple of num_heads"),
        (
            {"query": (1, 64, 1026), "key": (1, 64, 1026), "value": (1, 64, 1026)},
            "head_dim is 513; .* 1 to 512.*EFFC_NATIVE=0",
        ),
        ({"query": (1, 64, 0), "key": (1, 64, 0), "value": (1, 64, 0)}, "head_dim is 0"),
        ({"query": (2, 64, 64)}, "query has batch 2 and key 1"),
        ({"key": (1, 64, 32)}, "the last dimension of key is 32; .* must be 64"),
        ({"value": (1, 63, 64)}, "value has shape .* they must be equal"),
        ({"key_mask": (1, 63)}, "key_mask has shape .* it must be .* = .1, 64."),
        ({"key_mask": (2, 64)}, "key_mask has shape"),
        ({"key_mask": (64,)}, "key_mask has shape"),
        ({"marks": (1, 65)}, "marks has shape .* it must be .* = .1, 64."),
        ({"marks": (64,)}, "marks has shape"),
        ({"distance_bias": (2, 4)}, "distance_bias has shape .*2, 4.*must be .num_heads, 2 . reach . 1. with 2 heads"),
        ({"distance_bias": (3, 5)}, "distance_bias has shape"),
        ({"distance_bias": (2, 0)}, "distance_bias has shape"),
        ({"distance_bias": (10,)}, "distance_bias has shape"),
        ({"distance_slope": (3,)}, "distance_slope has shape .3.; it must be .num_heads. = .2."),
        ({"distance_slope": (2, 1)}, "distance_slope has shape"),
    ],
)
def test_shapes(library: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    case = Case()
    feeds: dict[str, Any] = {
        name: np.zeros(shapes.get(name, (1, 64, 64)), np.float32) for name in ("query", "key", "value")
    }
    for name, shape in shapes.items():
        if name not in feeds:
            feeds[name] = np.ones(shape, np.float32 if name.startswith("distance") else bool)
    with pytest.raises(Exception, match=message):
        session(library, model(case.attributes(), feeds)).run(None, feeds)


@pytest.mark.parametrize("pattern", ["block:8", "random:2:0", "strided:3", "local:8|global:cls"])
def test_queries_beyond_the_first_key(library: Path, pattern: str) -> None:
    case = Case(pattern, q_len=65, kv_len=64)
    with pytest.raises(Exception, match="65 queries and 64 keys"):
        session(library, model(case.attributes())).run(None, case.inputs())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("query", np.float64), ("key_mask", np.float32), ("marks", np.int64), ("distance_bias", np.float16)],
)
def test_types(library: Path, name: str, kind: type) -> None:
    """The runtime compares types when it loads a model and names the input."""
    proto = onnx.load_from_string(model(Case().attributes(), ["key_mask", "marks", "distance_bias"]))
    for value in proto.graph.input:
        if value.name == name:
            value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    with pytest.raises(Exception, match=f"Type Error.*{name}|{name}.*invalid"):
        session(library, proto.SerializeToString())


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
