"""Second moments of small rank (derived here, docs/method.md).

A layer's second moment C = E[x x^T] `[d, d]` is known from a few hundred rows, and what steps in
its metric need of it are its leading directions and how much is left beside them:

    C = U T U^T + s (I - U U^T),    U [d, k] orthonormal,  T [k, k] = U^T C U,  s (d - k) = the rest

of the trace. Sums, inverses and roots keep this form, so that no `[d, d]` matrix is ever made;
with k = d nothing is left out. Leading dimensions are those of layers that are worked on together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from . import linalg

# Columns of U. Of 96 to 384 dimensions 32 are as good as all of them; of wider ones a fifth, 64 at
# most, take another percent off the loss (docs/experiments.md).
RANK, WIDE_RANK, OF_WIDE = 32, 64, 5
DAMPING = 1e-2  # of a power step, in mean strengths: what has none stays where it is
STARTING = 3  # power steps that find the first U; each later one starts from the last


Kind = TypeVar("Kind", bound="SecondMoment")
Matmul = Callable[[Tensor], Tensor]


def rank_of(d: int) -> int:
    """Directions that are kept of `d` dimensions."""
    return min(d, max(RANK, min(WIDE_RANK, d // OF_WIDE)))


class SecondMoment(Protocol):
    """A symmetric positive matrix `[d, d]` of which products are known."""

    def matmul(self, X: Tensor) -> Tensor:
        """Its product with X `[d, n]`."""

    def diagonal(self) -> Tensor:
        """`[d]`."""

    def power(self, weights: Iterable[Tensor]) -> Tensor:
        """E|W x|^2 of each of g `weights` `[m, d]` of g layers; of any dtype, taken to the moment's
        one at a time, `[g]`."""

    def merged(self, other: Any, share: float) -> SecondMoment:
        """The mean of both, of which `other`, of the same kind, is `share`."""

    def damped(self, rho: float) -> SecondMoment:
        """With `rho` times the mean of its diagonal added there; never singular unless zero."""

    def plus(self, other: Any, weight: float) -> SecondMoment:
        """With `weight` times `other`, of the same kind, wherever it is, added."""

    def inverse(self) -> SecondMoment: ...

    def root(self) -> SecondMoment:
        """The symmetric square root."""

    def inverse_half(self) -> SecondMoment:
        """One of the many M with M M^T the inverse, not symmetric itself."""

    @property
    def mT(self) -> SecondMoment:
        """Of such a half."""


@dataclass(frozen=True)
class LowRank:
    """U, T and s; see above."""

    basis: Tensor
    core: Tensor
    rest: Tensor

    @classmethod
    def of(cls, rows: Rows) -> LowRank:
        """The leading directions of the rows' own moment, found from as many of them."""
        n, d = rows.rows.shape[-2:]
        k = rank_of(d)
        at = torch.arange(k, device=rows.rows.device) * n // k
        basis = linalg.orthonormal(rows.rows[..., at, :].mT)
        for _ in range(STARTING):
            basis = _power_step(basis, rows.matmul, rows.trace())
        return _within(basis, rows.matmul, rows.trace())

    def merged(self, other: Rows | LowRank, share: float) -> LowRank:
        """The mean of both, of which `other` is `share`; U makes one power step of it."""

        def matmul(X: Tensor) -> Tensor:
            return other.mixed(self.matmul(X), X, share)

        trace = self.trace().lerp(other.trace(), share)
        return _within(_power_step(self.basis, matmul, trace), matmul, trace)

    def trace(self) -> Tensor:
        d, k = self.basis.shape[-2:]
        return self.core.diagonal(dim1=-2, dim2=-1).sum(-1).add(self.rest, alpha=d - k)

    def mixed(self, product: Tensor, X: Tensor, share: float) -> Tensor:
        """As that of rows."""
        return product.lerp(self.matmul(X), share)

    def matmul(self, X: Tensor) -> Tensor:
        inside, rest = self.basis.mT @ X, self.rest[..., None, None]
        beyond = torch.addcmul(self.core @ inside, rest, inside, value=-1)  # what the rest is not
        return torch.addcmul(self.basis @ beyond, rest, X)

    def diagonal(self) -> Tensor:
        rest = self.rest[..., None]
        return rest + ((self.basis @ self.core - rest[..., None] * self.basis) * self.basis).sum(-1)

    def power(self, weights: Iterable[Tensor]) -> Tensor:
        each = (W.to(self.basis.dtype) for W in weights)
        pairs = [
            (W @ U, torch.linalg.vector_norm(W)) for W, U in zip(each, self.basis, strict=True)
        ]
        inside, norms = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        beyond = norms.square() - inside.square().sum((-2, -1))
        return (inside @ self.core * inside).sum((-2, -1)) + self.rest * beyond.clamp_min(0)

    def damped(self, rho: float) -> LowRank:
        shift = self.trace() * (rho / self.basis.shape[-2]) + tiny(self.rest)
        return LowRank(self.basis, linalg.shifted(self.core, shift), self.rest + shift)

    def plus(self, other: LowRank, weight: float) -> LowRank:
        """Its U starts with this one's, to the bit, unless it holds every direction."""
        other = moved(other, self.rest.device)
        d, k = self.basis.shape[-2:]
        basis = linalg.orthonormal(torch.cat([self.basis, other.basis], -1))
        if basis.shape[-1] < d:
            basis[..., :k] = self.basis
        core = basis.mT @ (self.matmul(basis) + weight * other.matmul(basis))
        return LowRank(basis, _symmetric(core), self.rest + weight * other.rest)

    def inverse(self) -> LowRank:
        return LowRank(self.basis, linalg.inverse(self.core), 1 / self.rest)

    def root(self) -> LowRank:
        values, vectors = linalg.eigh(self.core)
        root = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
        return LowRank(self.basis, root, self.rest.sqrt())

    def inverse_half(self) -> LowRank:
        return LowRank(self.basis, linalg.inverse_factor(self.core).mT, self.rest.rsqrt())

    @property
    def mT(self) -> LowRank:
        return LowRank(self.basis, self.core.mT, self.rest)


@dataclass(frozen=True)
class Diagonal:
    """Of a wide hidden side only the diagonal is kept."""

    values: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Diagonal:
        return cls(rows.rows.square().mean(-2))

    def merged(self, other: Diagonal, share: float) -> Diagonal:
        """The mean of both, of which `other` is `share`."""
        return Diagonal(self.values.lerp(other.values, share))

    def matmul(self, X: Tensor) -> Tensor:
        return self.values[..., None] * X

    def diagonal(self) -> Tensor:
        return self.values

    def power(self, weights: Iterable[Tensor]) -> Tensor:
        roots = self.values.sqrt()
        each = zip(weights, roots, strict=True)
        return torch.stack(
            [torch.linalg.vector_norm(W.to(root.dtype) * root) for W, root in each]
        ).square()

    def damped(self, rho: float) -> Diagonal:
        return Diagonal(self.values + rho * self.values.mean(-1, keepdim=True) + tiny(self.values))

    def plus(self, other: Diagonal, weight: float) -> Diagonal:
        return Diagonal(self.values + weight * other.values.to(self.values.device))

    def inverse(self) -> Diagonal:
        return Diagonal(1 / self.values)

    def root(self) -> Diagonal:
        return Diagonal(self.values.sqrt())

    def inverse_half(self) -> Diagonal:
        return Diagonal(self.values.rsqrt())

    @property
    def mT(self) -> Diagonal:
        return self


@dataclass(frozen=True)
class Rows:
    """E[x x^T] over `rows` `[..., n, d]` themselves."""

    rows: Tensor

    def matmul(self, X: Tensor) -> Tensor:
        return self.rows.mT @ (self.rows @ X) / self.rows.shape[-2]

    def mixed(self, product: Tensor, X: Tensor, share: float) -> Tensor:
        """The mean of another moment's `product` with X and of this one's, which is `share`."""
        share_of_row = share / self.rows.shape[-2]
        return linalg.plus_product(
            product, self.rows.mT, self.rows @ X, kept=1 - share, share=share_of_row
        )

    def trace(self) -> Tensor:
        return self.rows.square().sum((-2, -1)) / self.rows.shape[-2]


def _power_step(basis: Tensor, matmul: Matmul, trace: Tensor) -> Tensor:
    """The damped moment times U, times the inverse of its part inside U.

    What that adds to U is orthogonal to it, so the Gram matrix is at least the identity and its
    Cholesky factor orthonormalises; twice, for rounding.
    """
    d, k = basis.shape[-2:]
    if k == d:
        return basis
    shift = trace * (DAMPING / d) + tiny(trace)
    moved = torch.addcmul(matmul(basis), shift[..., None, None], basis)
    moved = linalg.solve(_symmetric(basis.mT @ moved), moved.mT).mT
    return linalg.straightened(linalg.straightened(moved))


def _within(basis: Tensor, matmul: Matmul, trace: Tensor) -> LowRank:
    """T and s of the moment for this U."""
    d, k = basis.shape[-2:]
    core = _symmetric(basis.mT @ matmul(basis))
    left = trace - core.diagonal(dim1=-2, dim2=-1).sum(-1)
    return LowRank(basis, core, left.clamp_min(0) / (d - k) if k < d else trace / d)


def stack(moments: Sequence[SecondMoment]) -> SecondMoment:
    """Several of one kind and shape, to be worked on together."""
    kind: Any = type(moments[0])
    return kind(*(torch.stack([getattr(m, f.name) for m in moments]) for f in fields(kind)))


def joined(stacks: Sequence[SecondMoment]) -> SecondMoment:
    """Stacks of one kind and shape as one."""
    if len(stacks) == 1:
        return stacks[0]
    kind: Any = type(stacks[0])
    return kind(*(torch.cat([getattr(s, f.name) for s in stacks]) for f in fields(kind)))


def unstack(moments: SecondMoment) -> list[SecondMoment]:
    """The other way."""
    kind: Any = type(moments)
    return [
        kind(*one) for one in zip(*(getattr(moments, f.name) for f in fields(kind)), strict=True)
    ]


def moved(moment: Kind, device: torch.device) -> Kind:
    """On `device`."""
    kind: Any = type(moment)
    return cast(Kind, kind(*(getattr(moment, f.name).to(device) for f in fields(kind))))


def _symmetric(core: Tensor) -> Tensor:
    return core.lerp(core.mT, 0.5)


def tiny(like: Tensor) -> float:
    """Keeps a moment that is zero invertible."""
    return float(torch.finfo(like.dtype).tiny ** 0.5)
