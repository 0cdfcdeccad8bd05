"""How each mode turns what a sweep measured into an update. One solver, two right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..lora.targets import Projection
from .closed_form import Components, cholesky, damped, domain_components, target_components
from .moments import Moments


class Constraint(Protocol):
    """What the subject asks of a layer. `backward`: it needs gradients."""

    @property
    def backward(self) -> bool: ...

    def components(
        self,
        projection: Projection,
        weight: Tensor,
        moments: Moments,
        L: Tensor,
        rank: int,
        generator: torch.Generator,
    ) -> Components:
        """The leading terms of the update; `L` `[d, d]` is the Cholesky factor of K."""


@dataclass(frozen=True)
class Target:
    """Align with what the denoising loss asks of this layer: R = -P G (a forward and a backward
    sweep)."""

    rho: float
    backward: bool = True

    def components(
        self,
        projection: Projection,
        weight: Tensor,
        moments: Moments,
        L: Tensor,
        rank: int,
        generator: torch.Generator,
    ) -> Components:
        M = cholesky(damped(moments.S(projection).to(L), self.rho))
        return target_components(moments.G(projection).to(L), M, L, rank, generator)


@dataclass(frozen=True)
class Domain:
    """Amplify (or damp) what the frozen weight already says about the subject: R = W C (forward
    passes only)."""

    backward: bool = False

    def components(
        self,
        projection: Projection,
        weight: Tensor,
        moments: Moments,
        L: Tensor,
        rank: int,
        generator: torch.Generator,
    ) -> Components:
        return domain_components(weight.to(L), moments.C(projection).to(L), L, rank, generator)


def make_constraint(init: str, rho: float) -> Constraint:
    if init == "domain":
        return Domain()
    if init == "target":
        return Target(rho)
    raise ValueError(f"no constraint belongs to init {init!r}")


@dataclass(frozen=True)
class Metric:
    """K = C + lambda C_p + rho tau I: how dear a change of the outputs is, on the subject and on
    what the model should keep.

    `prior` holds C_p, `weight` is lambda; without a prior the damping alone preserves,
    isotropically.
    """

    rho: float
    prior: Moments | None = None
    weight: float = 0.0

    def K(self, projection: Projection, moments: Moments, like: Tensor) -> Tensor:
        """`[d, d]` (`[d]` where only the diagonal is kept), device and dtype of `like`."""
        C = moments.C(projection).to(like)
        extra = (
            None
            if self.prior is None or not self.weight
            else self.weight * self.prior.C(projection).to(like)
        )
        return damped(C, self.rho, extra)
