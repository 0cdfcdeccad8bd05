"""The closed form and its truncation: pure functions of small matrices (docs/method.md, derived
here).

A projection is y = W x with W `[m, d]`. The update D that aligns it with its targets and preserves
what the model knows solves a damped least-squares problem:

    D = R K^-1,    R = E[(y* - W x) x^T],    K = C + lambda C_p + rho tau I,    tau = tr(C) / d.

Everything below works with any square root L of K (K = L L^T): here the Cholesky factor, and
triangular solves. Products with large matrices are never formed: `svd` asks only what they do to a
few vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this size the exact SVD is as fast as the randomised one.
EXACT_SVD_SIZE = 512
OVERSAMPLING = 10
POWER_ITERATIONS = 2
ROUNDING_DAMPING = (
    1e-5  # damping that only keeps a singular moment factorisable: it was summed in fp32
)
ROW_DAMPING = 1e-3  # damping of the rows' own metric, which is near the identity
COLUMN_DAMPING = 0.3  # of the columns'; 0.1 to 1 measured alike
NEAR = 0.3  # of the step at the minimum: so near, a tenth of the depth is missing at most
FARTHEST = 4.0  # times the first step: a parabola is trusted no farther


@dataclass(frozen=True)
class Components:
    """An update as a sum of rank-1 terms, strongest first: D = sum_k sigma_k up[:, k] down[k, :].

    `up` `[m, k]`, `sigma` `[k]` descending, `down` `[k, d]`. `score` `[k]` says what each term is
    worth, in units that compare between layers; it decides the ranks.
    """

    up: Tensor
    sigma: Tensor
    down: Tensor
    score: Tensor

    def truncated(self, rank: int) -> Components:
        return Components(self.up[:, :rank], self.sigma[:rank], self.down[:rank], self.score[:rank])


def diagonal(moment: Tensor) -> Tensor:
    """`[d]`, also of a moment of which only the diagonal is known."""
    return moment if moment.ndim == 1 else moment.diagonal()


def damped(moment: Tensor, rho: float, extra: Tensor | None = None) -> Tensor:
    """`moment + extra + rho * mean(diag(moment)) * I`, all `[d, d]`; never singular unless the
    moment is zero.

    A moment of which only the diagonal is known is a vector `[d]`, here and in all functions below.
    """
    shift = rho * diagonal(moment).mean() + torch.finfo(moment.dtype).tiny ** 0.5
    total = moment.clone() if extra is None else moment + extra
    diagonal(total).add_(shift)
    return total


def cholesky(K: Tensor) -> Tensor:
    """The Cholesky factor L of K = L L^T; of a diagonal its square root."""
    result: Tensor = K.sqrt() if K.ndim == 1 else torch.linalg.cholesky(K)
    return result


def moment_matmul(K: Tensor, X: Tensor) -> Tensor:
    """K X."""
    return K[:, None] * X if K.ndim == 1 else K @ X


def solve_lower(L: Tensor, X: Tensor) -> Tensor:
    """L^-1 X."""
    return X / L[:, None] if L.ndim == 1 else torch.linalg.solve_triangular(L, X, upper=False)


def solve_upper(L: Tensor, X: Tensor) -> Tensor:
    """L^-T X, for the same lower L."""
    return X / L[:, None] if L.ndim == 1 else torch.linalg.solve_triangular(L.T, X, upper=True)


def solve(L: Tensor, X: Tensor) -> Tensor:
    """K^-1 X for K = L L^T."""
    return solve_upper(L, solve_lower(L, X))


def output_power(rows: Tensor, C: Tensor) -> Tensor:
    """E[(a x)^2] for every row a `[r, d]`: how strongly it answers, `[r]`."""
    return (rows.T * moment_matmul(C, rows.T)).sum(0)


def svd(
    product: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets of a matrix H `[m, d]` of which only H X and H^T Y are
    known.

    U `[m, k]`, sigma `[k]`, V^T `[k, d]`, the largest entry of each column of U > 0, device and
    dtype those of `like`. Exact below `EXACT_SVD_SIZE`; above by a randomised range finder (Halko,
    Martinsson & Tropp 2011, algorithm 4.4).
    """
    rank = min(rank, *shape)
    basis = None
    if min(shape) > max(EXACT_SVD_SIZE, 2 * (rank + OVERSAMPLING)):
        probe = torch.randn(
            shape[1], rank + OVERSAMPLING, dtype=like.dtype, generator=generator
        ).to(like.device)
        basis = torch.linalg.qr(product(probe)).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(adjoint(basis)).Q
            basis = torch.linalg.qr(product(basis)).Q
        matrix = adjoint(basis).T
    else:
        matrix = product(torch.eye(shape[1], dtype=like.dtype, device=like.device))
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    U = (U if basis is None else basis @ U)[:, :rank]
    sigma, Vh = sigma[:rank], Vh[:rank]
    # Singular vectors have no sign of their own: fix it, so that equal runs give equal files.
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, sigma, Vh * sign.T


def target_components(
    G: Tensor, M: Tensor, L: Tensor, rank: int, generator: torch.Generator
) -> Components:
    """`target` mode: R = -P G with P^-1 = M M^T, K = L L^T (Cholesky factors), truncated where the
    predicted loss falls most.

    The whitened gradient is H = M^-1 G L^-T = U Sigma V^T, and D = -M^-T H L^-1 = -(M^-T U) Sigma
    (V^T L^-1): the natural gradient under a Kronecker-factored metric. The best rank-r update in
    that metric keeps the r largest sigma (Eckart-Young); each sigma^2 is its predicted fall of the
    loss.
    """
    U, sigma, Vh = svd(
        lambda X: solve_lower(M, G @ solve_upper(L, X)),
        lambda Y: solve_lower(L, G.T @ solve_upper(M, Y)),
        (len(M), len(L)), rank, generator, G,
    )  # fmt: skip
    return Components(-solve_upper(M, U), sigma, solve_upper(L, Vh.T).T, sigma.square())


def domain_components(
    W: Tensor, C: Tensor, L: Tensor, rank: int, generator: torch.Generator
) -> Components:
    """`domain` mode: R = W C, so D = W C K^-1 with K = L L^T, truncated where it changes the
    subject's outputs most.

    The best rank-r update in E||D x||^2 is U_r U_r^T D with U_r the top left singular vectors of D
    C^1/2.
    """
    root = cholesky(
        damped(C, ROUNDING_DAMPING)
    )  # any square root of C; the damping is there because C may be singular

    def product(X: Tensor) -> Tensor:  # W C K^-1 C^1/2 X
        return W @ moment_matmul(C, solve(L, moment_matmul(root, X)))

    def adjoint(Y: Tensor) -> Tensor:
        return moment_matmul(
            root if root.ndim == 1 else root.T, solve(L, moment_matmul(C, W.T @ Y))
        )

    U, sigma, _ = svd(product, adjoint, (len(W), len(L)), rank, generator, C)
    rows = solve(L, moment_matmul(C, W.T @ U)).T  # U^T D
    tiny = torch.finfo(sigma.dtype).tiny
    share = sigma.square() / output_power(W, C).sum().clamp_min(tiny)
    return Components(U, sigma, rows / sigma.clamp_min(tiny)[:, None], share)


def unit_response(up: Tensor, down: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale so that every row a of `down` answers the subject with unit power, a^T C a = 1; `up @
    down` stays.

    It makes one learning rate mean the same in every layer and at every rank.
    """
    answer = output_power(down, C)
    floor = 1e-12 * down.square().sum(1) * diagonal(C).mean() + torch.finfo(C.dtype).tiny
    response = answer.clamp_min(floor).sqrt()
    return up * response, down / response[:, None]


def inverse(K: Tensor) -> Tensor:
    """K^-1 of a positive definite K, through its Cholesky factor; of a diagonal its reciprocal."""
    if K.ndim == 1:
        return 1 / K
    result: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(K))
    return result


def factor_steps(
    up: Tensor,
    down: Tensor,
    grad_up: Tensor,
    grad_down: Tensor,
    P: Tensor,
    K: Tensor,
    P_inverse: Tensor,
    K_inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The natural-gradient directions of both factors of D = B A, each with the other fixed
    (derived here).

    Of g layers of one shape at once: `up` B `[g, m, r]`, `down` A `[g, r, d]` and their gradients G
    A^T, B^T G; `P` `[g, m, m]` is the outputs' metric, `K` `[g, d, d]` the inputs' (without the
    last dimension where only the diagonal is known). The quadratic model <G, D> + 1/2 tr(P D K D^T)
    is least along P^-1 G A^T (A K A^T)^-1 in B, and along (B^T P B)^-1 B^T G K^-1 in A. Rows of A
    answer alike (unit response), columns of B do not: `COLUMN_DAMPING` times their mean strength is
    added, so that a faint component does not throw its row about.
    """
    rows = down @ _batch_matmul(K, down.mT)
    columns = up.mT @ _batch_matmul(P, up)
    step_up = torch.linalg.solve(
        _batch_damped(rows, ROW_DAMPING), _batch_matmul(P_inverse, grad_up).mT
    ).mT
    step_down = torch.linalg.solve(
        _batch_damped(columns, COLUMN_DAMPING), _batch_matmul(K_inverse, grad_down.mT).mT
    )
    return step_up, step_down


def _batch_matmul(K: Tensor, X: Tensor) -> Tensor:
    return K[..., None] * X if K.ndim < X.ndim else K @ X


def _batch_damped(moments: Tensor, rho: float) -> Tensor:
    shift = (
        rho * moments.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(moments.dtype).tiny ** 0.5
    )
    return moments + shift[:, None, None] * torch.eye(moments.shape[-1]).to(moments)


def parabola_step(
    loss: Callable[[float], float], base: float, first: float, slope: float | None = None
) -> tuple[float, float]:
    """The step where the parabola through what is known of `loss` is least, and the loss there.

    `base` is loss(0), `slope` its derivative there; without it (a sign that is not known either)
    loss(-first) is asked for. A loss is evaluated at `first` and at the parabola's minimum, unless
    that is `NEAR`; it is at most `FARTHEST * first` away. Returns (0.0, base) when neither is
    better: never worse than standing still on the set that `loss` measures.
    """
    tried = {0.0: base, first: loss(first)}
    if slope is None:
        tried[-first] = loss(-first)
        slope = (tried[first] - tried[-first]) / (2 * first)
    curvature = (tried[first] - base - slope * first) / first**2
    far = FARTHEST * first
    best = -slope / (2 * curvature) if curvature > 0 else math.copysign(far, -slope)
    if math.isfinite(best) and not (abs(best - first) <= NEAR * abs(best) and tried[first] < base):
        best = max(-far, min(far, best))
        tried[best] = loss(best)
    step = min(tried, key=lambda s: tried[s] if math.isfinite(tried[s]) else math.inf)
    return step, tried[step]
