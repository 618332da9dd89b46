"""Random patterns: every position term, alone and in unions."""

from __future__ import annotations

from hypothesis import strategies as st

from effc.plugins.forms.terms import Block, Dilated, Global, GlobalTokens, Local, Random, Sinks, Strided
from effc.plugins.pattern import Pattern, union

_small, _step = st.integers(1, 80), st.integers(1, 40)
TERMS = [
    st.builds(Local, _small),
    st.builds(Local, st.integers(0, 80), st.integers(0, 80)),
    st.builds(Dilated, st.integers(1, 24), _step),
    st.builds(Block, st.sampled_from([1, 7, 16, 48, 64, 96, 128]), st.integers(0, 2)),
    st.builds(Strided, _step),
    st.builds(Random, st.integers(1, 3), st.integers(0, 5)),
    st.builds(Global, st.integers(1, 150)),
    st.builds(Sinks, st.integers(1, 150)),
]
TOKENS = st.just(GlobalTokens((5,)))


def patterns(tokens: bool = False) -> st.SearchStrategy[Pattern]:
    """Unions of one to four terms; ``tokens`` allows ones that need marks."""
    term = st.one_of(*TERMS, *([TOKENS] if tokens else []))
    return st.lists(term, min_size=1, max_size=4).map(lambda terms: union(tuple(terms)))
