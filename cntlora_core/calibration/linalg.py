"""Factorisations of many small matrices at once, on the device as far as it does them as one.

CUDA works off QR, SVD, eigenvalues and inverses from Cholesky factors one matrix at a time, each
with a wait of the host. Here only what it batches runs there: Cholesky factors, triangular and
general solves. SVD and eigenvalues are left to the host, all matrices on one way there and back.
Apple's MPS lacks some of the others too: the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

AT_HOME = ("cpu", "cuda", "meta")  # kinds of devices that batch Cholesky factors and solves
ALL_AT_HOME = ("cpu", "meta")
# Of a Gram matrix's trace, in units of rounding for the root of the rows: what it takes to have a
# factor although its sums are rounded; and the turns until it takes none, from columns all alike.
SHIFT, TURNS = 2.0, 4


def _near(
    function: Callable[..., tuple[Tensor, ...]], *given: Tensor, home: tuple[str, ...] = AT_HOME
) -> tuple[Tensor, ...]:
    device = given[0].device
    if device.type in home:
        return function(*given)
    return tuple(part.to(device) for part in function(*(x.cpu() for x in given)))


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[..., m, k]`, the singular values `[..., k]`, V^T `[..., k, n]`."""

    def decompose(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.linalg.svd(x, full_matrices=False))

    U, sigma, Vh = _near(decompose, X, home=ALL_AT_HOME)
    return U, sigma, Vh


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending `[..., d]`, and eigenvectors `[..., d, d]` of symmetric X."""
    values, vectors = _near(lambda x: tuple(torch.linalg.eigh(x)), X, home=ALL_AT_HOME)
    return values, vectors


def cholesky(X: Tensor) -> Tensor:
    """The lower factor. Not a number where there is none: to be told so, a host would wait for its
    device."""
    factor, info = _near(lambda x: tuple(torch.linalg.cholesky_ex(x)), X)
    return factor.masked_fill_((info != 0)[..., None, None], torch.nan)


def inverse_factor(X: Tensor) -> Tensor:
    """L^-1 of positive X = L L^T, so that X^-1 = L^-T L^-1."""
    eye = torch.eye(X.shape[-1], device=X.device, dtype=X.dtype)
    return triangular_solve(cholesky(X), eye.expand_as(X), upper=False)


def triangular_solve(factor: Tensor, right: Tensor, *, upper: bool, left: bool = True) -> Tensor:
    """factor^-1 right, or not `left` right factor^-1."""

    def solve(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (torch.linalg.solve_triangular(x, y, upper=upper, left=left),)

    return _near(solve, factor, right)[0]


def solve(X: Tensor, right: Tensor) -> Tensor:
    """Whatever where there is no solution, for the same reason."""
    return _near(lambda x, y: (torch.linalg.solve_ex(x, y)[0],), X, right)[0]


def inverse(X: Tensor) -> Tensor:
    """Whatever where there is none."""
    eye = torch.eye(X.shape[-1], device=X.device, dtype=X.dtype)
    return solve(X, eye.expand_as(X))


def plus_product(X: Tensor, left: Tensor, right: Tensor, *, kept: float, share: float) -> Tensor:
    """`kept` X + `share` left right, of matrices or of batches of them, as one kernel."""
    add = torch.addmm if X.ndim == 2 else torch.baddbmm
    return add(X, left, right, beta=kept, alpha=share)


def orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis `[..., m, k]` of what the columns of X `[..., m, k]` span, and of more
    where they depend on each other; of everything, `[..., m, m]`, where there are as many.

    By Cholesky factors of Gram matrices, shifted and repeated (Fukaya, Kannan, Nakatsukasa,
    Yamamoto & Yanagisawa 2020): each turn takes a shift's root off the condition, the last is
    exact. Columns are of one length, and a faint cosine of its own in each keeps that condition
    finite: what X lacks is made up of those, what it has moves by rounding.
    """
    *groups, m, k = X.shape
    if k >= m:
        return torch.eye(m, device=X.device, dtype=X.dtype).expand(*groups, m, m)
    rounding, tiny = torch.finfo(X.dtype).eps, torch.finfo(X.dtype).tiny
    unit = normalize(X / X.abs().amax(-2, keepdim=True).clamp_min(tiny), dim=-2, eps=1.0)
    X = unit + rounding * _cosines(m, k, X)
    for _ in range(TURNS):
        X = straightened(X, SHIFT * rounding * m**0.5)
    return straightened(X)


def straightened(X: Tensor, shift: float = 0.0) -> Tensor:
    """X `[..., m, k]` times what makes its columns orthonormal, to rounding times their squared
    condition, but for `shift` times the trace of their Gram matrix."""
    gram = X.mT @ X
    if shift:
        gram = shifted(gram, shift * gram.diagonal(dim1=-2, dim2=-1).sum(-1))
    return triangular_solve(cholesky(gram).mT, X, upper=True, left=False)


def shifted(core: Tensor, shift: Tensor) -> Tensor:
    """With `shift` added on the diagonal."""
    moved = core.clone()
    moved.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return moved


def _cosines(m: int, k: int, like: Tensor) -> Tensor:
    """Orthogonal columns `[m, k]` of length 1, those of the cosine transform."""
    places, waves = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (m, k))
    return torch.cos(math.pi / m * (places[:, None] + 0.5) * waves) * (2 / m) ** 0.5
