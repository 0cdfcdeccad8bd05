"""Factorisations for devices that have none of their own."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cntlora_core.calibration import linalg

FOLDER = Path(linalg.__file__).parent
X = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
GRAM = X.mT @ X + torch.eye(4)


@pytest.fixture(params=["at home", "on the host"], autouse=True)
def where(request, monkeypatch):
    if request.param == "on the host":
        monkeypatch.setattr(linalg, "AT_HOME", ())
        monkeypatch.setattr(linalg, "ALL_AT_HOME", ())


def test_they_are_torchs_own():
    U, sigma, Vh = linalg.svd(X)
    torch.testing.assert_close((U * sigma[:, None]) @ Vh, X)
    values, vectors = linalg.eigh(GRAM)
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, GRAM)
    factor = linalg.cholesky(GRAM)
    torch.testing.assert_close(factor @ factor.mT, GRAM)
    half = linalg.inverse_factor(GRAM)
    torch.testing.assert_close(half.mT @ half, torch.linalg.inv(GRAM))
    right = torch.ones(3, 4, 2)
    solved = linalg.triangular_solve(factor, right, upper=False)
    torch.testing.assert_close(factor @ solved, right)
    torch.testing.assert_close(GRAM @ linalg.solve(GRAM, right), right)


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 50), st.integers(0, 50)),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 3.0, 12.0]),
    st.sampled_from([1e-25, 1.0, 1e25]),
    st.integers(0, 2**31),
)
def test_a_basis_is_orthonormal_whatever_it_is_made_of(size, dtype, decades, scale, seed):
    """Fewer directions than columns or none at all, strengths far apart, columns alike or zero: a
    basis still, and what each column has is in it."""
    m, k, directions = size
    g = torch.Generator().manual_seed(seed)
    strength = 10 ** -torch.linspace(0, decades, max(directions, 1), dtype=torch.float64)
    X = torch.randn(2, m, directions, generator=g, dtype=torch.float64) * strength[:directions]
    X = X @ torch.randn(2, directions, k, generator=g, dtype=torch.float64)
    X[1, :, k // 2 :] = X[1, :, :1]
    X[0, :, -1] = 0
    X = (X * scale).to(dtype)
    Q = linalg.orthonormal(X)
    rounding = 50 * torch.finfo(dtype).eps
    eye = torch.eye(min(m, k), dtype=dtype).expand(2, -1, -1)
    torch.testing.assert_close(Q.mT @ Q, eye, rtol=0, atol=rounding)
    unit = torch.nan_to_num(X / X.abs().amax(-2, keepdim=True))
    torch.testing.assert_close(Q @ (Q.mT @ unit), unit, rtol=0, atol=rounding * max(m, k) ** 0.5)


def test_a_matrix_that_has_no_factor_is_told_without_waiting():
    assert linalg.cholesky(-GRAM).isnan().all()


def test_calibration_factorises_nowhere_else():
    """Not every device has every factorisation."""
    for path in FOLDER.glob("*.py"):
        used = re.findall(
            r"torch\.(?:linalg\.(?!vector_norm)\w+|cholesky\w*|svd\w*)", path.read_text()
        )
        assert not used or path.name == "linalg.py", (path.name, used)
