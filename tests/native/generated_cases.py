"""What Hypothesis draws for the attention kernels of every device, and how."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck
from hypothesis import strategies as st
from numpy.typing import NDArray

from effc.plugins.forms.registry import parse_pattern

PROFILE: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}


def patterns(widest: int, widest_side: int) -> st.SearchStrategy[str]:
    """Unions of up to four terms, whose windows have ``widest`` keys on both sides or ``widest_side`` on each."""
    terms = st.one_of(
        st.just("dense"),
        st.integers(1, widest).map("local:{}".format),
        st.tuples(st.integers(0, widest_side), st.integers(0, widest_side)).map(lambda p: f"local:{p[0]}:{p[1]}"),
        st.tuples(st.integers(1, 20), st.integers(1, 40)).map(lambda p: f"dilated:{p[0]}:{p[1]}"),
        st.tuples(st.integers(1, 70), st.integers(0, 3)).map(lambda p: f"block:{p[0]}:{p[1]}"),
        st.integers(1, 90).map("strided:{}".format),
        st.tuples(st.integers(1, 5), st.integers(0, 10**12)).map(lambda p: f"random:{p[0]}:{p[1]}"),
        st.integers(1, 70).map("global:{}".format),
        st.just("global:sep"),
        st.integers(1, 70).map("sinks:{}".format),
    )
    return st.lists(terms, min_size=1, max_size=4).map(lambda chosen: str(parse_pattern("|".join(chosen))))


def draw_key_mask(draw: st.DrawFn, batch: int, keys: int, rng: np.random.Generator) -> NDArray[np.bool_] | None:
    """None, or a mask ``[batch, keys]`` of few or many keys that begins with a run of equal ones."""
    if not draw(st.booleans()):
        return None
    mask = rng.random((batch, keys)) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.95, 1.0]))
    mask[:, : draw(st.integers(0, keys))] = draw(st.booleans())
    return mask
