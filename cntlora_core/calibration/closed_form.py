"""The closed form and its truncation: pure functions of small matrices (docs/method.md, derived
here).

A projection is y = W x with W `[m, d]`. The update D that aligns it with its targets and preserves
what the model knows solves a damped least-squares problem:

    D = R K^-1,    R = E[(y* - W x) x^T],    K = C + lambda C_p + rho tau I,

tau the strength of C (constraints.py).

Moments are of small rank (second_moment.py), and so are their inverses and roots. Products with
large matrices are never formed: `svd` asks only what they do to a few vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import linalg
from .second_moment import SecondMoment

# Below this size the exact SVD is as fast as the randomised one.
EXACT_SVD_SIZE = 512
OVERSAMPLING = 10
POWER_ITERATIONS = 2
NEAR = 0.3  # of the step at the minimum: so near, a tenth of the depth is missing at most
FARTHEST = 4.0  # times the first step: a parabola is trusted no farther
FITS = 4  # while nothing is better; each minimum is less than half as far as the one before
KEPT = 0.1  # of what a parabola promises: with less the loss bends more than any


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


def output_power(rows: Tensor, C: SecondMoment) -> Tensor:
    """E[(a x)^2] for every row a `[..., r, d]`: how strongly it answers, `[..., r]`."""
    return (rows.mT * C.matmul(rows.mT)).sum(-2)


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
        basis = linalg.orthonormal(product(probe))
        for _ in range(POWER_ITERATIONS):
            basis = linalg.orthonormal(adjoint(basis))
            basis = linalg.orthonormal(product(basis))
        matrix = adjoint(basis).T
    else:
        matrix = product(torch.eye(shape[1], dtype=like.dtype, device=like.device))
    U, sigma, Vh = linalg.svd(matrix)
    U = (U if basis is None else basis @ U)[:, :rank]
    return signed(U, sigma[:rank], Vh[:rank])


def signed(U: Tensor, sigma: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors have no sign of their own: fixed, so that equal runs give equal files."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, sigma, Vh * sign.mT


def target_components(
    up: Tensor, down: Tensor, P: SecondMoment, K: SecondMoment, rank: int, tokens: Sequence[int]
) -> list[Components]:
    """`target`: R = -P^-1 G, D = R K^-1, truncated where the predicted loss falls most.

    Of g layers of one shape at once, G = `up` `[g, m, k]` times `down` `[g, k, d]`. The whitened
    gradient is H = M^T G N = U Sigma V^T with M M^T = P^-1 and N N^T = K^-1, and D = -M H N^T: the
    natural gradient under a Kronecker-factored metric, whichever halves M and N are. The best
    rank-r update in that metric keeps the r largest sigma (Eckart-Young). G is a mean over a
    layer's `tokens`, so along a term the summed loss falls by tokens * sigma^2: of all layers take
    one step, those that see more tokens move it more. H is a product of small rank too, and its SVD
    that of a small matrix between bases of both sides.
    """
    M, N = P.inverse_half(), K.inverse_half()
    left, right = M.mT.matmul(up), N.mT.matmul(down.mT)  # H = left right^T
    Q, V = linalg.orthonormal(left), linalg.orthonormal(right)
    inner, sigma, outer = linalg.svd((Q.mT @ left) @ (V.mT @ right).mT)
    U, sigma = Q @ inner[..., :rank], sigma[..., :rank]
    Vh = outer[..., :rank, :] @ V.mT
    up, sigma, down = signed(-M.matmul(U), sigma, N.matmul(Vh.mT).mT)
    score = torch._foreach_mul(sigma.square().unbind(), [float(n) for n in tokens])
    return [Components(*own) for own in zip(up, sigma, down, score, strict=True)]


def domain_components(
    W: Tensor, C: SecondMoment, K: SecondMoment, rank: int, generator: torch.Generator
) -> Components:
    """`domain`: R = W C, so D = W C K^-1, truncated where it changes the subject's outputs most.

    The best rank-r update in E||D x||^2 is U_r U_r^T D with U_r the top left singular vectors of D
    C^1/2.
    """
    root, inverse = C.root(), K.inverse()

    def product(X: Tensor) -> Tensor:  # W C K^-1 C^1/2 X
        return W @ C.matmul(inverse.matmul(root.matmul(X)))

    def adjoint(Y: Tensor) -> Tensor:
        return root.matmul(inverse.matmul(C.matmul(W.T @ Y)))

    U, sigma, _ = svd(product, adjoint, (W.shape[0], W.shape[1]), rank, generator, W)
    rows = inverse.matmul(C.matmul(W.T @ U)).T  # U^T D
    least = torch.finfo(sigma.dtype).tiny
    share = sigma.square() / output_power(W, C).sum().clamp_min(least)
    return Components(U, sigma, rows / sigma.clamp_min(least)[:, None], share)


def unit_response(up: Tensor, down: Tensor, C: SecondMoment) -> tuple[Tensor, Tensor]:
    """Rescale so that every row a of `down` `[..., r, d]` answers the subject with unit power,
    a^T C a = 1; `up @ down` stays.

    It makes one learning rate mean the same in every layer and at every rank.
    """
    return rescaled(up, down, response(down, C))


def rescaled(up: Tensor, down: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same `up @ down`, rows of `down` divided by `scale` `[..., r]`."""
    return up * scale[..., None, :], down / scale[..., None]


def response(down: Tensor, C: SecondMoment) -> Tensor:
    """Root mean square of each row's answer to the subject, `(a^T C a)^1/2` `[..., r]`, above 0."""
    strength = C.diagonal().mean(-1, keepdim=True)
    floor = 1e-12 * down.square().sum(-1) * strength + torch.finfo(down.dtype).tiny
    return output_power(down, C).clamp_min(floor).sqrt()


@dataclass(frozen=True)
class Fitted:
    """Of the steps along an update that were tried the best `step` and its `loss`; and where the
    loss is `least` by all that is known of it."""

    step: float
    loss: float
    least: float


def fitted_step(
    loss: Callable[[float], float], base: float, first: float, slope: float | None = None
) -> Fitted:
    """How far to go along an update, from few looks at the loss.

    `base` is loss(0), `slope` its derivative there; without it (a sign that is not known either)
    loss(-first) is asked for. A loss is evaluated at `first` and where the parabola through what is
    known is least, unless that is `NEAR`; it is at most `FARTHEST * first` away. Where `first` was
    so far that no parabola fits, and there is no better loss there either, it is fitted anew with
    that one in its place, `FITS` times at most. Where the loss is no number at `first`, a quarter
    of it is tried, as often. Nothing better gives (0.0, base): never worse than standing still on
    the set that `loss` measures. Where the loss falls by less than `KEPT` of what
    the parabola promised, `least` is where the cubic through a known slope and the last two looks
    has its minimum, at which nobody looks (derived here).
    """
    tried, known, least = {0.0: base, first: loss(first)}, slope is not None, None
    for _ in range(FITS):
        if math.isfinite(tried[first]):
            break
        first /= 4
        tried[first] = loss(first)
    if slope is None:
        tried[-first] = loss(-first)
        slope = (tried[first] - tried[-first]) / (2 * first)
    far = FARTHEST * first
    for _ in range(FITS):
        curvature = (tried[first] - base - slope * first) / first**2
        best = -slope / (2 * curvature) if curvature > 0 else math.copysign(far, -slope)
        near = abs(best - first) <= NEAR * abs(best) and tried[first] < base
        if near or not math.isfinite(best):
            break
        best = max(-far, min(far, best))
        if best in tried:
            break
        tried[best] = loss(best)
        if tried[best] < base:
            promised = slope * best + curvature * best**2
            if known and tried[best] - base > KEPT * promised:
                looks = ((s, tried[s] - base) for s in (first, best))
                least = cubic_minimum(slope, *looks)
            break
        first = best
    step = min(tried, key=lambda s: tried[s] if math.isfinite(tried[s]) else math.inf)
    if least is None or least * step <= 0 or abs(least) > max(map(abs, tried)):
        least = step
    return Fitted(step, tried[step], least)


def cubic_minimum(
    slope: float, one: tuple[float, float], other: tuple[float, float]
) -> float | None:
    """Where the cubic with value 0 and `slope` at 0 through two points (x, y) has its minimum; None
    where it has none."""
    (x, at_x), (z, at_z) = ((x, (y - slope * x) / x**2) for x, y in (one, other))
    b = (at_x - at_z) / (x - z)
    a = at_x - b * x
    bend = a * a - 3 * b * slope
    if not 0 < bend < math.inf or (along := a + math.sqrt(bend)) == 0:
        return None
    return -slope / along
