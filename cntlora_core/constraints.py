"""How each mode turns what a sweep measured into an update. One solver, two right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .projections import Projection
from .solve import Components, damped, domain_components, target_components
from .statistics import Moments


class Constraint(Protocol):
    """What the subject asks of a layer. `backward`: it needs gradients; `signed`: its step may be negative."""

    @property
    def backward(self) -> bool: ...

    @property
    def signed(self) -> bool: ...

    def components(
        self,
        projection: Projection,
        weight: Tensor,
        moments: Moments,
        K: Tensor,
        rank: int,
        generator: torch.Generator,
    ) -> Components: ...


@dataclass(frozen=True)
class Target:
    """Align with what the denoising loss asks of this layer: R = -P G (a forward and a backward sweep)."""

    rho: float
    backward: bool = True
    signed: bool = False

    def components(
        self,
        projection: Projection,
        weight: Tensor,
        moments: Moments,
        K: Tensor,
        rank: int,
        generator: torch.Generator,
    ) -> Components:
        G = moments.G(projection).to(K)
        S = moments.S(projection).to(K)
        return target_components(G, S, K, rank, generator, rho=self.rho)


@dataclass(frozen=True)
class Domain:
    """Amplify (or damp) what the frozen weight already says about the subject: R = W C (forward passes only)."""

    backward: bool = False
    signed: bool = True

    def components(
        self,
        projection: Projection,
        weight: Tensor,
        moments: Moments,
        K: Tensor,
        rank: int,
        generator: torch.Generator,
    ) -> Components:
        return domain_components(weight.to(K), moments.C(projection).to(K), K, rank, generator)


def make_constraint(init: str, rho: float) -> Constraint:
    return Target(rho) if init == "target" else Domain()


def preservation_metric(
    projection: Projection, moments: Moments, prior: Moments | None, rho: float, weight: float
) -> Tensor:
    """K = C + lambda C_p + rho tau I, fp64 `[d, d]`; without a prior the damping alone preserves, isotropically."""
    C = moments.C(projection).double()
    extra = None if prior is None or weight == 0 else weight * prior.C(projection).double()
    return damped(C, rho, extra)
