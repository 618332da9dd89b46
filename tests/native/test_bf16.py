"""Products of bfloat16 numbers, which a node or the environment has to ask for: by AMX, by AVX512_BF16, or not at all.

Rounding to 8 significant bits makes errors of a few thousandths of the values; a wrong pair would make one of their
size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from native_cases import Case, model, reference, run, session
from test_sparse_attention import PATTERNS, cpu_flags

HAS_BF16 = "avx512_bf16" in cpu_flags()
UNITS = ["0", "1"] if "amx_bf16" in cpu_flags() else ["0"]


@pytest.fixture(params=UNITS, ids=lambda value: "amx" if value == "1" else "no_amx")
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_AMX", request.param)
    monkeypatch.setenv("EFFC_PRECISION", "bf16")


def check(library: Path, case: Case) -> None:
    output, log_sum_exp = run(library, case, log_sum_exp=True)
    expected_output, expected = reference(case)
    np.testing.assert_allclose(output, expected_output, atol=0.05, err_msg=str(case))
    np.testing.assert_allclose(log_sum_exp, expected, atol=0.05, err_msg=str(case))
    assert np.sqrt(np.mean((output - expected_output) ** 2)) < 5e-3


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(library: Path, bf16: None, pattern: str, causal: bool) -> None:
    check(library, Case(pattern, causal, 2, 150))
    mask = np.random.default_rng(3).random((1, 200)) < 0.8
    check(library, Case(pattern, causal, 1, 70, 200, 4, 2, head_dim=64, key_mask=mask, bias_reach=9, sloped=True))


@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 17, 31, 33, 64, 72, 80, 96, 128, 256, 512])
def test_head_dims(library: Path, bf16: None, head_dim: int) -> None:
    check(library, Case("local:32|sinks:2", q_len=130, head_dim=head_dim))


@pytest.mark.parametrize("rows", [1, 5, 23, 24, 48, 63, 65])
def test_row_counts(library: Path, bf16: None, rows: int) -> None:
    check(library, Case("local:40|sinks:4", True, 2, rows, 170, num_heads=6, kv_num_heads=2, head_dim=64))


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16 instructions")
def test_it_is_used_when_asked_for_and_only_then(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(q_len=128, head_dim=64)
    feeds = case.inputs()

    def output(**changes: object) -> np.ndarray:
        array: np.ndarray = session(library, model({**case.attributes(), **changes})).run(None, feeds)[0]
        return array

    exact = output()
    assert np.abs(exact - reference(case)[0]).max() < 5e-6
    by_attribute = output(precision="bf16")
    assert np.abs(by_attribute - exact).max() > 1e-5
    monkeypatch.setenv("EFFC_PRECISION", "bf16")
    np.testing.assert_array_equal(output(), by_attribute)
    np.testing.assert_array_equal(output(precision="fp32"), exact)


def test_unknown_precision(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="'precision' is 'fp8'. Set it to fp32 or bf16"):
        session(library, model({**Case().attributes(), "precision": "fp8"}))
    monkeypatch.setenv("EFFC_PRECISION", "half")
    with pytest.raises(Exception, match="EFFC_PRECISION is 'half'. Set it to fp32 or bf16"):
        session(library, model(Case().attributes()))
