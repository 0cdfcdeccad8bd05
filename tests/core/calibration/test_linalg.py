"""Factorisations for devices that have none of their own."""

import re
from pathlib import Path

import pytest
import torch

from cntlora_core.calibration import linalg

FOLDER = Path(linalg.__file__).parent
X = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
GRAM = X.mT @ X + torch.eye(4)


@pytest.fixture(params=["at home", "on the host"], autouse=True)
def where(request, monkeypatch):
    if request.param == "on the host":
        monkeypatch.setattr(linalg, "AT_HOME", ())


def test_they_are_torchs_own():
    Q, R = linalg.qr(X)
    torch.testing.assert_close(Q @ R, X)
    U, sigma, Vh = linalg.svd(X)
    torch.testing.assert_close((U * sigma[:, None]) @ Vh, X)
    values, vectors = linalg.eigh(GRAM)
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, GRAM)
    factor = linalg.cholesky(GRAM)
    torch.testing.assert_close(factor @ factor.mT, GRAM)
    torch.testing.assert_close(linalg.cholesky_inverse(factor), torch.linalg.inv(GRAM))
    right = torch.ones(3, 4, 2)
    solved = linalg.triangular_solve(factor, right, upper=False)
    torch.testing.assert_close(factor @ solved, right)
    torch.testing.assert_close(GRAM @ linalg.solve(GRAM, right), right)


def test_a_matrix_that_has_no_factor_is_told_without_waiting():
    assert linalg.cholesky(-GRAM).isnan().all()


def test_calibration_factorises_nowhere_else():
    """Not every device has every factorisation."""
    for path in FOLDER.glob("*.py"):
        used = re.findall(
            r"torch\.(?:linalg\.(?!vector_norm)\w+|cholesky\w*|svd\w*)", path.read_text()
        )
        assert not used or path.name == "linalg.py", (path.name, used)
