"""Requests that no model takes: wrong shapes, types, names, values and no JSON at all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any


def malformed_bodies(count: int, seed: int) -> Iterator[bytes]:
    """Bodies for ``/infer`` of a model that takes ``input_ids`` below 32 and up to 64 tokens; each is wrong somehow."""
    generator = random.Random(seed)
    for _ in range(count):
        yield generator.choice(_KINDS)(generator)


def _body(data: Any, shape: Any, datatype: Any = "INT64", name: Any = "input_ids", **more: Any) -> bytes:
    return json.dumps({"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data, **more}]}).encode()


def _ids(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(32) for _ in range(length)]


def _out_of_range(generator: random.Random) -> bytes:
    length = generator.randint(1, 20)
    ids = _ids(generator, length)
    ids[generator.randrange(length)] = generator.choice([-1, -(2**63), 32, 1000, 2**31, 2**63 - 1])
    return _body(ids, [1, length])


def _too_long(generator: random.Random) -> bytes:
    length = generator.choice([65, 100, 1000, 5000])
    return _body(_ids(generator, length), [1, length])


def _too_many_rows(generator: random.Random) -> bytes:
    rows = generator.randint(5, 40)
    return _body(_ids(generator, rows * 2), [rows, 2])


def _empty(generator: random.Random) -> bytes:
    return _body([], generator.choice([[1, 0], [0, 1], [0], []]))


def _wrong_shape(generator: random.Random) -> bytes:
    shape = generator.choice([[1, 3], [2, 4], [4], [1, 4, 1], [-1, 4], [1, -4], [2**40, 2**40], ["a"], "x", None])
    return _body(_ids(generator, 5), shape)


def _wrong_type(generator: random.Random) -> bytes:
    datatype = generator.choice(["FP32", "INT32", "BOOL", "BYTES", "FP16", "NONE", "", None, 5, "UINT64"])
    return _body([1, 2, 3], [1, 3], datatype)


def _wrong_data(generator: random.Random) -> bytes:
    data = generator.choice([["a", "b", "c"], [1.5, 2.5, 3.5], [None] * 3, {}, "text", [True, {}, []], None])
    return _body(data, [1, 3])


def _wrong_name(generator: random.Random) -> bytes:
    return _body([1, 2], [1, 2], name=generator.choice(["inputids", "", "../input_ids", "a" * 5000, None, 3, "\u0000"]))


def _mask_that_does_not_fit(generator: random.Random) -> bytes:
    mask = {"name": "attention_mask", "datatype": "INT64"}
    mask |= generator.choice([{"shape": [1, 5], "data": [1] * 5}, {"shape": [1, 4], "data": [1, 1, 2, 1]},
                              {"shape": [1, 4], "data": [1, -1, 1, 1]}])  # fmt: skip
    ids = {"name": "input_ids", "shape": [1, 4], "datatype": "INT64", "data": [5, 6, 7, 8]}
    return json.dumps({"inputs": [ids, mask]}).encode()


def _no_input(generator: random.Random) -> bytes:
    return json.dumps(generator.choice([{}, {"inputs": []}, {"inputs": None}, [], "x", 1, {"inputs": {}}])).encode()


def _outputs_that_are_not_there(generator: random.Random) -> bytes:
    ids = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [5, 6]}
    return json.dumps({"inputs": [ids], "outputs": [{"name": generator.choice(["nothing", "", "x" * 999])}]}).encode()


def _no_json(generator: random.Random) -> bytes:
    whole = _body([1, 2, 3], [1, 3])
    kind = generator.randrange(4)
    if kind == 0:
        return whole[: generator.randrange(1, len(whole) - 1)]
    if kind == 1:
        return generator.randbytes(generator.randint(1, 200))
    if kind == 2:
        return b"[" * generator.randint(10, 500)
    return b"\xff" + whole


CRASHES_24_10 = _body([1, 2, 3], [1, 2**62])
"""Its size in bytes overflows, which ends a Triton 24.10 (triton-inference-server/common, pull request 151)."""

_KINDS = (
    _out_of_range,
    _too_long,
    _too_many_rows,
    _empty,
    _wrong_shape,
    _wrong_type,
    _wrong_data,
    _wrong_name,
    _mask_that_does_not_fit,
    _no_input,
    _outputs_that_are_not_there,
    _no_json,
)
