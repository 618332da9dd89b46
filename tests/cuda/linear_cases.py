"""Running linear attention on the CUDA kernels under the emulator, and holding it to the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulated_run import check_close, rounded, run_problem
from native_cases import CallSizes
from numpy.typing import NDArray

from effc.plugins.forms.linear import Linear
from effc.plugins.reference.linear import feature_maps, quadratic_attention

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LinearCase(CallSizes):
    """One call of the kernels. ``past``: tokens that the state holds before the first key."""

    map: str = "elu"
    causal: bool = False
    batch: int = 1
    q_len: int = 64
    kv_len: int | None = None
    num_heads: int = 1
    kv_num_heads: int | None = None
    head_dim: int = 32
    key_mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    past: int | None = None
    present: bool = False
    number: str = "half"
    seed: int = 0

    def inputs(self) -> dict[str, Array]:
        """Queries, keys and values of the past and of the call, rounded to the case's numbers."""
        rng = np.random.default_rng(self.seed)
        sizes = {"query": (self.q_len, self.num_heads)}
        sizes |= {"key": (self.keys, self.kv_heads), "value": (self.keys, self.kv_heads)}
        sizes |= {f"past_{name}": (self.past or 0, self.kv_heads) for name in ("key", "value")}
        return {
            name: rounded(rng.standard_normal((self.batch, length, heads * self.head_dim)), self.number)
            for name, (length, heads) in sizes.items()
        }

    def split(self, tensor: Array) -> torch.Tensor:
        return torch.from_numpy(tensor).double().unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


@dataclass(frozen=True)
class Outcome:
    output: Array  # [batch, q_len, num_heads * head_dim]
    state: Array | None
    normaliser: Array | None
    counters: dict[str, int]


def state_of(case: LinearCase, key: Array, value: Array, mask: NDArray[np.bool_] | None) -> tuple[Array, Array]:
    """State ``[batch, kv_heads, head_dim, head_dim]`` and normaliser of some tokens, in float64."""
    split = case.split(key)
    features = feature_maps(Linear(case.map), split, split, 1.0, {}).key
    if mask is not None:
        features = features * torch.from_numpy(mask)[:, None, :, None]
    return (features.transpose(-1, -2) @ case.split(value)).numpy(), features.sum(dim=2).numpy()


def expected(case: LinearCase, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Output, present state and normaliser."""
    key = np.concatenate([feeds["past_key"], feeds["key"]], axis=1)
    value = np.concatenate([feeds["past_value"], feeds["value"]], axis=1)
    mask = case.key_mask
    if mask is not None:
        mask = np.concatenate([np.ones((case.batch, case.past or 0), dtype=bool), mask], axis=1)
    found = quadratic_attention(
        Linear(case.map),
        case.split(feeds["query"]),
        case.split(key),
        case.split(value),
        scale=1.0,
        causal=case.causal,
        key_mask=None if mask is None else torch.from_numpy(mask),
    )
    return found.transpose(1, 2).flatten(2).numpy(), *state_of(case, key, value, mask)


def run(program: Path, case: LinearCase, *options: str, feeds: dict[str, Array] | None = None) -> Outcome:
    """Run one case; ``options`` are the program's."""
    feeds = feeds if feeds is not None else case.inputs()
    fields = {
        "map": case.map,
        "present": int(case.present),
        "key_mask": int(case.key_mask is not None),
        "past": int(case.past is not None),
    }
    others: list[NDArray[Any]] = [] if case.key_mask is None else [case.key_mask]
    if case.past is not None:
        states = state_of(case, feeds["past_key"], feeds["past_value"], None)
        others += [state.astype(np.float32) for state in states]
    output, rest, counters = run_problem(program, case, case.number, fields, feeds, others, options)
    if not case.present:
        return Outcome(output, None, None, counters)
    lines = (case.batch, case.kv_heads, case.head_dim)
    state, normaliser = np.split(rest, [-int(np.prod(lines))])
    return Outcome(output, state.reshape(*lines, case.head_dim), normaliser.reshape(lines), counters)


def check(program: Path, case: LinearCase, *options: str) -> Outcome:
    """Run one case and compare the output, and the present state where there is one."""
    feeds = case.inputs()
    outcome = run(program, case, *options, feeds=feeds)
    pairs = zip((outcome.output, outcome.state, outcome.normaliser), expected(case, feeds), strict=True)
    for name, (found, wanted) in zip(("output", "state", "normaliser"), pairs, strict=True):
        if found is None:
            continue
        check_close(found, wanted, case.number, f"the {name} of {case}")
    return outcome
