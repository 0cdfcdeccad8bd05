"""Factorisations of narrow and of small matrices, as torch.linalg's: on the device, or on the host
where that has none. Apple's MPS lacks some, and of others the way to the host and back is shorter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AT_HOME = ("cpu", "cuda", "meta")  # kinds of devices that have them all


def _near(function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
    device = given[0].device
    if device.type in AT_HOME:
        return function(*given)
    return tuple(part.to(device) for part in function(*(x.cpu() for x in given)))


def qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal Q `[..., m, k]` and upper triangular R `[..., k, n]`, k the smaller side."""
    Q, R = _near(lambda x: tuple(torch.linalg.qr(x)), X)
    return Q, R


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[..., m, k]`, the singular values `[..., k]`, V^T `[..., k, n]`."""
    U, sigma, Vh = _near(lambda x: tuple(torch.linalg.svd(x, full_matrices=False)), X)
    return U, sigma, Vh


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending `[..., d]`, and eigenvectors `[..., d, d]` of symmetric X."""
    values, vectors = _near(lambda x: tuple(torch.linalg.eigh(x)), X)
    return values, vectors


def cholesky(X: Tensor) -> Tensor:
    """The lower factor. Not a number where there is none: to be told so, a host would wait for its
    device."""
    factor, info = _near(lambda x: tuple(torch.linalg.cholesky_ex(x)), X)
    return torch.where(info[..., None, None] == 0, factor, torch.nan)


def cholesky_inverse(factor: Tensor) -> Tensor:
    """Of the matrix whose lower factor this is."""
    return _near(lambda x: (torch.cholesky_inverse(x),), factor)[0]


def triangular_solve(factor: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    def solve(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (torch.linalg.solve_triangular(x, y, upper=upper),)

    return _near(solve, factor, right)[0]


def solve(X: Tensor, right: Tensor) -> Tensor:
    """Whatever where there is no solution, for the same reason."""
    return _near(lambda x, y: (torch.linalg.solve_ex(x, y)[0],), X, right)[0]
