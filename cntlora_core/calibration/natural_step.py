"""The natural-gradient step of both factors of many layers, as few kernels (derived here,
docs/method.md). Pure functions of rows: a factor's own, of A as it is and of B its transpose, and
those of its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import linalg
from .moments import alike
from .second_moment import Diagonal, LowRank, SecondMoment, tiny

ROW_DAMPING = 1e-3  # damping of the rows' own metric, which is near the identity
COLUMN_DAMPING = 0.3  # of the columns'; 0.1 to 1 measured alike


class BothWays(Protocol):
    """A metric M `[g, d, d]` of g layers and its inverse, which share most of their products."""

    def products(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """X M X^T `[g, R, R]` and Y M^-1 `[g, R, d]` of X and Y, the halves of `rows` `[g, 2 R,
        d]`."""


@dataclass(frozen=True)
class LowRankBothWays:
    """M = s I + U (T - s I) U^T and M^-1 = I / s + U (T^-1 - I / s) U^T: `basis` U, `beyond` what
    stands between U and U^T, `rest` what is before I."""

    basis: Tensor
    beyond: Tensor
    rest: Tensor
    inverse_beyond: Tensor
    inverse_rest: Tensor

    def products(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        X, Y = rows.chunk(2, 1)
        inside_X, inside_Y = (rows @ self.basis).chunk(2, 1)
        form = (X @ X.mT).mul_(self.rest[:, None, None])
        form.baddbmm_(inside_X @ self.beyond, inside_X.mT)
        direction = self.inverse_rest[:, None, None] * Y
        direction.baddbmm_(inside_Y @ self.inverse_beyond, self.basis.mT)
        return form, direction


@dataclass(frozen=True)
class DiagonalBothWays:
    """Of a wide hidden side, its diagonal `[g, d]` and that of the inverse."""

    values: Tensor
    inverse_values: Tensor

    def products(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        X, Y = rows.chunk(2, 1)
        return X * self.values[:, None] @ X.mT, Y * self.inverse_values[:, None]


def both_ways(metrics: Sequence[SecondMoment]) -> list[BothWays]:
    """Of each; the inverses of all cores of one size are one. Raises TypeError for another kind."""
    found: dict[int, BothWays] = {}
    for kind, which in alike(range(len(metrics)), lambda i: _core_size(metrics[i]), len(metrics)):
        own: list[Any] = [metrics[i] for i in which]
        made = map(_diagonal, own) if kind is None else _low_rank(own)
        found |= dict(zip(which, made, strict=True))
    return [found[i] for i in range(len(metrics))]


def _core_size(metric: SecondMoment) -> int | None:
    if isinstance(metric, Diagonal):
        return None
    if not isinstance(metric, LowRank):
        raise TypeError(f"no steps are known in a {type(metric).__name__}")
    return metric.core.shape[-1]


def _diagonal(metric: Diagonal) -> BothWays:
    return DiagonalBothWays(metric.values, metric.inverse().values)


def _low_rank(metrics: Sequence[LowRank]) -> Iterator[BothWays]:
    core, rest = (torch.cat([getattr(m, part) for m in metrics]) for part in ("core", "rest"))
    inverse, of_rest = linalg.inverse(core), 1 / rest
    # Without numbers no layer steps; theirs must not spoil the zeros of its systems.
    of_inverse = torch.nan_to_num(linalg.shifted(inverse, -of_rest), 0.0, 0.0, 0.0)
    every = linalg.shifted(core, -rest), rest, of_inverse, of_rest
    parts = (part.split([len(m.rest) for m in metrics]) for part in every)
    for metric, *own in zip(metrics, *parts, strict=True):
        yield LowRankBothWays(metric.basis, *own)


@dataclass(frozen=True)
class Half:
    """One factor of g layers of one width: `rows` `[g, 2 R, d]`, the weights' and then the
    gradients' (of B those of its transpose, G A^T transposed; of A B^T G), zero beyond each
    layer's own of the `ranks` `[g]`; the `metric` of that side, the outputs' P for B, the inputs'
    K for A."""

    rows: Tensor
    metric: BothWays
    ranks: Tensor


@dataclass(frozen=True)
class Step:
    """The natural directions of a half, as rows `[g, R, d]`, and their squared natural lengths
    `[g]`."""

    rows: Tensor
    squares: Tensor


def natural_steps(
    ups: Sequence[Half], downs: Sequence[Half], to_up: Tensor, to_down: Tensor
) -> tuple[list[Step], list[Step]]:
    """The natural-gradient directions of both factors of D = B A, each with the other fixed.

    Of the same L layers in two orders: the place of each of `ups` among `downs` is `to_up` `[L]`,
    `to_down` is the other way. The quadratic model <G, D> + 1/2 tr(P D K D^T) is least along P^-1 G
    A^T (A K A^T)^-1 in B, and along (B^T P B)^-1 B^T G K^-1 in A. Rows of A answer alike (unit
    response), columns of B do not: `COLUMN_DAMPING` times their mean strength is added, so that a
    faint component does not throw its row about.
    """
    of_B, of_A = ([half.metric.products(half.rows) for half in halves] for halves in (ups, downs))
    columns, rows = (
        damped_inverses([form for form, _ in own], rho, [half.ranks for half in halves])
        for own, rho, halves in ((of_B, COLUMN_DAMPING, ups), (of_A, ROW_DAMPING, downs))
    )
    return _along(ups, of_B, rows[to_up]), _along(downs, of_A, columns[to_down])


def _along(
    halves: Sequence[Half], products: Sequence[tuple[Tensor, Tensor]], inverses: Tensor
) -> list[Step]:
    steps = []
    parts = inverses.split([len(half.rows) for half in halves])
    for half, (_, direction), inverse in zip(halves, products, parts, strict=True):
        rank = direction.shape[1]
        rows = inverse[:, :rank, :rank] @ direction
        steps.append(Step(rows, _inner(half.rows, rows)))
    return steps


def damped_inverses(forms: Sequence[Tensor], rho: float, ranks: Sequence[Tensor]) -> Tensor:
    """The inverse of each layer's `[R, R]` in `forms` `[g, R, R]`, `rho` times the mean of its
    diagonal added there, `[L, R, R]` of all brought to the largest R by zeros. Zero where there is
    none: to be told so, a host would wait for its device."""
    most = max(form.shape[-1] for form in forms)
    every = forms[0].new_zeros(sum(map(len, forms)), most, most)
    for part, form in zip(every.split([len(form) for form in forms]), forms, strict=True):
        part[:, : form.shape[-1], : form.shape[-1]].copy_(form)
    strength = every.diagonal(dim1=-2, dim2=-1).sum(-1) / torch.cat(list(ranks))
    inverses = linalg.inverse(linalg.shifted(every, rho * strength + tiny(every)))
    return torch.nan_to_num(inverses, 0.0, 0.0, 0.0)


def _inner(rows: Tensor, step: Tensor) -> Tensor:
    """The sum of the products of the gradients in `rows` with `step`, `[g]`, as one kernel."""
    grads = rows.chunk(2, 1)[1]
    return (grads.flatten(1)[:, None] @ step.flatten(1)[:, :, None]).flatten()
