"""Timesteps by importance: drawn as often as their gradients are long, each weighed by the inverse,
so that the mean loss stays what it was and its estimate is less noisy (docs/method.md).

The variance of an importance-sampled mean is least where draws are in proportion to the norms of
what is averaged (Katharopoulos & Fleuret 2018, section 3.1). A frozen model's gradients shrink
several times over from the first timesteps to the last, much alike for all pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.noise_schedule import stratified_timesteps

BINS = 32
UNIFORM_SHARE = 0.25  # of the draws, whatever was measured: no weight is above its inverse, 4
USUAL_FALL = 2.0  # of the logarithm of the norm, over the whole schedule
GOLDEN = (5**0.5 - 1) / 2
RIDGE = 0.02  # on the curve's slope and bend: 8 measurements, each off by half of itself


@dataclass(frozen=True)
class Importance:
    """`density`: how often a timestep of each of equal bins of the schedule is drawn, mean 1."""

    density: tuple[float, ...]

    @classmethod
    def usual(cls) -> Importance:
        """Before anything was measured: as it was on the miniature's six subjects."""
        u = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
        return cls._from_heights((USUAL_FALL * -u).exp())

    @classmethod
    def measured(cls, timesteps: Tensor, norms: Tensor, steps: int) -> Importance:
        """From the gradients' `norms` `[n]` of pictures at `timesteps` `[n]` of `steps`.

        The logarithm of the norm is a parabola over the timesteps, fitted with a little ridge. A
        picture without a gradient (its mask shows nothing) says nothing of them.
        """
        told = norms > 0
        if not told.any():
            return cls.usual()
        u = (timesteps[told].double() + 0.5) / steps - 0.5
        y = norms[told].double().log()
        basis = torch.stack([torch.ones_like(u), u, u.square()], 1)
        ridge = torch.diag(torch.tensor([0.0, RIDGE, RIDGE], dtype=torch.float64))
        curve = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ y)
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS - 0.5
        heights = (curve[1] * centres + curve[2] * centres.square()).exp()
        return cls._from_heights(heights)

    @classmethod
    def _from_heights(cls, heights: Tensor) -> Importance:
        density = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * heights / heights.mean()
        return cls(tuple(density.tolist()))

    def draw(
        self, count: int, steps: int, generator: torch.Generator, place: float | None = None
    ) -> Tensor:
        """`count` timesteps, stratified over the density, in random order `[count]`; each at the
        same `place` in [0, 1) of its part, or anywhere."""
        share = torch.tensor(self.density, dtype=torch.float64)
        edges = torch.cat([share.new_zeros(1), share.cumsum(0) / share.sum()])
        draws = torch.rand(count, generator=generator, dtype=torch.float64)
        u = (torch.arange(count) + (draws if place is None else place)) / count
        at = torch.searchsorted(edges, u, right=True).clamp(1, len(share)) - 1
        inside = (u - edges[at]) / (edges[at + 1] - edges[at])
        t = ((at + inside) / len(share) * steps).long().clamp(0, steps - 1)
        return t[torch.randperm(count, generator=generator)]

    def weights(self, timesteps: Tensor, steps: int) -> Tensor:
        """What each loss counts, fp32 `[n]`: its mean over draws is 1."""
        density = torch.tensor(self.density, dtype=torch.float32)
        return 1 / density[(timesteps.cpu() * len(density) // steps)]


def draw_timesteps(
    importance: Importance | None,
    count: int,
    steps: int,
    generator: torch.Generator,
    turn: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stratified timesteps `[count]` and their weights; uniform ones weigh alike (None).

    Those of many batches together, each with its number as `turn`, cover the schedule evenly: their
    places step through it by the golden ratio (the additive recurrence of least discrepancy).
    """
    if importance is None:
        return stratified_timesteps(count, steps, generator), None
    place = None if turn is None else (turn + 0.5) * GOLDEN % 1
    t = importance.draw(count, steps, generator, place)
    return t, importance.weights(t, steps)
