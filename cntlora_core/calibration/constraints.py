"""How each init turns what a sweep measured into an update. One solver, two right-hand sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..lora.targets import Projection
from .closed_form import Components, domain_components, target_components
from .moments import Moments, at_a_time
from .second_moment import SecondMoment, joined, rank_of, stack

# Channels by which a layer's strength is shared out at most: no more than WIDEST / rho directions
# of a layer's tokens are stronger than its damping. By the mean over a wide one the weak ones,
# which bring noise alone, would be trusted the more the wider it is. Rho was chosen on layers that
# are no wider; patches, 9 numbers to a channel, want half (docs/experiments.md).
WIDEST, WIDEST_OF_PATCHES = 128, 64


class Constraint(Protocol):
    """What the subject asks of a layer. `backward`: it needs gradients."""

    @property
    def backward(self) -> bool: ...

    def components(
        self,
        projections: Sequence[Projection],
        weight: Callable[[Projection], Tensor],
        moments: Moments,
        rank: int,
        generator: torch.Generator,
    ) -> list[Components]:
        """The leading terms of the updates of projections of one shape."""


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

    def on(self, device: torch.device) -> Metric:
        """With what is known of the prior on `device`."""
        return replace(self, prior=self.prior and self.prior.on(device))

    def only(self, projections: Sequence[Projection]) -> Metric:
        """Of some of the layers."""
        return replace(self, prior=self.prior and self.prior.only(projections))

    def P(self, projection: Projection, moments: Moments) -> SecondMoment:
        """Of the layer's outputs `[m, m]`."""
        return moments.S(projection).damped(self._rho_out(projection))

    def K(self, projection: Projection, moments: Moments) -> SecondMoment:
        """Of the layer's inputs `[d, d]`."""
        K = moments.C(projection).damped(self._rho_in(projection))
        prior = self._prior(projection)
        return K if prior is None else K.plus(prior, self.weight)

    def of_outputs(self, projections: Sequence[Projection], moments: Moments) -> SecondMoment:
        """P `[g, m, m]` of layers of one kind of output, worked on together."""
        S = stack([moments.S(p) for p in projections])
        return S.damped(self._rho_out(projections[0]))

    def of_inputs(self, projections: Sequence[Projection], moments: Moments) -> SecondMoment:
        """K `[g, d, d]` of layers of one kind of input, a few at a time where there is a prior:
        sums take many times what they come to."""
        C = [moments.C(p) for p in projections]
        rho = self._rho_in(projections[0])
        kept = [prior for p in projections if (prior := self._prior(p)) is not None]
        if not kept:
            return stack(C).damped(rho)
        d = projections[0].in_features
        parts = at_a_time(zip(C, kept, strict=True), lambda _: d * rank_of(d))
        each = (zip(*part, strict=True) for part in parts)
        return joined([stack(own).damped(rho).plus(stack(p), self.weight) for own, p in each])

    def _prior(self, projection: Projection) -> SecondMoment | None:
        return self.prior.C(projection) if self.prior and self.weight else None

    def _rho_out(self, p: Projection) -> float:
        return self.rho if p.diagonal_out else self._rho(p.out_features / WIDEST)

    def _rho_in(self, p: Projection) -> float:
        widest = WIDEST_OF_PATCHES if p.convolution else WIDEST
        return self.rho if p.diagonal_in else self._rho(p.channels_in / widest)

    def _rho(self, wider: float) -> float:
        return self.rho * max(1.0, wider)


@dataclass(frozen=True)
class Target:
    """Align with what the denoising loss asks of this layer: R = -P^-1 G (a forward and a backward
    sweep)."""

    metric: Metric
    backward: bool = True

    def components(
        self,
        projections: Sequence[Projection],
        weight: Callable[[Projection], Tensor],
        moments: Moments,
        rank: int,
        generator: torch.Generator,
    ) -> list[Components]:
        P = self.metric.of_outputs(projections, moments)
        K = self.metric.of_inputs(projections, moments)
        tokens = [moments.passed(p) for p in projections]
        return target_components(*moments.G(projections), P, K, rank, tokens)


@dataclass(frozen=True)
class Domain:
    """Amplify (or damp) what the frozen weight already says about the subject: R = W C (forward
    passes only)."""

    metric: Metric
    backward: bool = False

    def components(
        self,
        projections: Sequence[Projection],
        weight: Callable[[Projection], Tensor],
        moments: Moments,
        rank: int,
        generator: torch.Generator,
    ) -> list[Components]:
        def one(p: Projection) -> Components:
            W, K = weight(p).float(), self.metric.K(p, moments)
            return domain_components(W, moments.C(p), K, rank, generator)

        return [one(p) for p in projections]


def make_constraint(init: str, metric: Metric) -> Constraint:
    if init == "domain":
        return Domain(metric)
    if init == "target":
        return Target(metric)
    raise ValueError(f"no constraint belongs to init {init!r}")
