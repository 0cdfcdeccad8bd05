"""The closed form and its truncation: pure functions of small matrices (docs/method.md, derived here).

A projection is y = W x with W `[m, d]`. The update D that aligns it with its targets and preserves what the model
knows solves a damped least-squares problem:

    D = R K^-1,    R = E[(y* - W x) x^T],    K = C + lambda C_p + rho tau I,    tau = tr(C) / d.

Everything below works with any square root L of K (K = L L^T): here the Cholesky factor, and triangular solves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this size the exact SVD is as fast as the randomised one.
EXACT_SVD_SIZE = 512
OVERSAMPLING = 10
POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Components:
    """An update as a sum of rank-1 terms, strongest first: D = sum_k sigma_k up[:, k] down[k, :].

    `up` `[m, k]`, `sigma` `[k]` descending, `down` `[k, d]`. `score` `[k]` says what each term is worth, in units
    that compare between layers; it decides the ranks.
    """

    up: Tensor
    sigma: Tensor
    down: Tensor
    score: Tensor

    def truncated(self, rank: int) -> Components:
        return Components(self.up[:, :rank], self.sigma[:rank], self.down[:rank], self.score[:rank])

    def matrix(self) -> Tensor:
        """D `[m, d]`."""
        return (self.up * self.sigma) @ self.down


def damped(moment: Tensor, rho: float, extra: Tensor | None = None) -> Tensor:
    """`moment + extra + rho * mean(diag(moment)) * I`, all `[d, d]`; never singular unless the moment is zero."""
    d = len(moment)
    tau = moment.trace() / d
    tiny = torch.finfo(moment.dtype).tiny ** 0.5
    total = moment if extra is None else moment + extra
    return total + (rho * tau + tiny) * torch.eye(d, dtype=moment.dtype, device=moment.device)


def closed_form(R: Tensor, K: Tensor) -> Tensor:
    """D = R K^-1 `[m, d]` for symmetric positive definite K `[d, d]`: the minimiser of
    tr(D K D^T) - 2 tr(D R^T)."""
    return torch.cholesky_solve(R.T, torch.linalg.cholesky(K)).T


def svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets U `[m, k]`, sigma `[k]`, V^T `[k, d]`, largest entry of each column of U > 0.

    Large matrices are reduced first by a randomised range finder (Halko, Martinsson & Tropp 2011, algorithm 4.4).
    """
    rank = min(rank, *matrix.shape)
    basis = None
    if min(matrix.shape) > max(EXACT_SVD_SIZE, 2 * (rank + OVERSAMPLING)):
        probe = torch.randn(matrix.shape[1], rank + OVERSAMPLING, dtype=matrix.dtype, generator=generator).to(
            matrix.device
        )
        basis = torch.linalg.qr(matrix @ probe).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix.T @ basis).Q
            basis = torch.linalg.qr(matrix @ basis).Q
        matrix = basis.T @ matrix
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    U = (U if basis is None else basis @ U)[:, :rank]
    sigma, Vh = sigma[:rank], Vh[:rank]
    # Singular vectors have no sign of their own: fix it, so that equal runs give equal files.
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, sigma, Vh * sign.T


def target_components(
    G: Tensor, S: Tensor, K: Tensor, rank: int, generator: torch.Generator, *, rho: float
) -> Components:
    """`target` mode: R = -P G with P = (S + rho tr(S)/m I)^-1, truncated where the predicted loss falls most.

    With P^-1 = M M^T and K = L L^T the whitened gradient is H = M^-1 G L^-T = U Sigma V^T, and
    D = -M^-T H L^-1 = -(M^-T U) Sigma (V^T L^-1): the natural gradient under a Kronecker-factored metric. The best
    rank-r update in that metric keeps the r largest sigma (Eckart-Young); each sigma^2 is its predicted fall of the loss.
    """
    M = torch.linalg.cholesky(damped(S, rho))
    L = torch.linalg.cholesky(K)
    H = torch.linalg.solve_triangular(M, G, upper=False)
    H = torch.linalg.solve_triangular(L, H.T, upper=False).T
    U, sigma, Vh = svd(H, rank, generator)
    up = -torch.linalg.solve_triangular(M.T, U, upper=True)
    down = torch.linalg.solve_triangular(L.T, Vh.T, upper=True).T
    return Components(up, sigma, down, sigma.square())


def domain_components(W: Tensor, C: Tensor, K: Tensor, rank: int, generator: torch.Generator) -> Components:
    """`domain` mode: R = W C, so D = W C K^-1, truncated where it changes the subject's outputs most.

    The best rank-r update in E||D x||^2 is U_r U_r^T D with U_r the top eigenvectors of D C D^T.
    """
    D = closed_form(W @ C, K)
    root = _square_root(C)
    U, sigma, _ = svd(D @ root, rank, generator)
    rows = U.T @ D
    safe = sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    share = sigma.square() / (W @ root).square().sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return Components(U, sigma, rows / safe[:, None], share)


def _square_root(C: Tensor) -> Tensor:
    """R with R R^T = C for positive semi-definite C that may be singular."""
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp_min(0).sqrt()


def unit_response(up: Tensor, down: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale so that every row a of `down` answers the subject with unit power, a^T C a = 1; `up @ down` stays.

    It makes one learning rate mean the same in every layer and at every rank.
    """
    power = ((down @ C) * down).sum(1)
    floor = 1e-12 * down.square().sum(1) * C.trace() / len(C) + torch.finfo(C.dtype).tiny
    response = power.clamp_min(floor).sqrt()
    return up * response, down / response[:, None]


def line_search(
    loss: Callable[[float], float], base: float, first: float, *, signed: bool = False, evaluations: int = 6
) -> tuple[float, float]:
    """The step size on the grid first * 2^k with the least loss, found by walking downhill from `first`.

    `base` is loss(0). Returns (step, loss); step is 0.0, loss `base`, when no step tried is better: never worse than
    standing still on the set that `loss` measures.
    """
    best_step, best = 0.0, base

    def attempt(step: float) -> bool:
        nonlocal best_step, best
        value = loss(step)
        if not value < best:  # NaN counts as worse
            return False
        best_step, best = step, value
        return True

    improved = attempt(first)
    tried = 1
    if signed and not improved:
        improved, tried = attempt(-first), 2
    start = best_step or first
    factor = 2.0 if improved else 0.5
    step = start * factor
    while tried < evaluations:
        better = attempt(step)
        tried += 1
        if improved and not better:
            if factor == 2.0 and best_step == start and tried < evaluations:
                factor, step = 0.5, start * 0.5
                continue
            break
        improved = improved or better
        step *= factor
    return best_step, best
