"""The sweep's answer: layers solved, cut to their ranks, scaled to unit response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..lora.adapter import Factors, LoRA, scaled
from ..lora.targets import Projection
from .closed_form import Components, output_power, unit_response
from .constraints import Constraint
from .moments import Moments, alike, shape_of
from .ranks import MAX_RANK_FACTOR, budget_of, data_ranks, uniform_ranks
from .second_moment import SecondMoment

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


# First step tried, as the mean relative change of the layers' outputs: near where the parabola's
# minimum was on every subject.
FIRST_CHANGE = 0.17


@dataclass(frozen=True)
class Solution:
    """An `update` of the `projections` that have a rank, its length still to be found: the `first`
    to try, the `slope` of the summed loss along it, and what each layer's part is worth,
    `energy`."""

    projections: Sequence[Projection]
    update: LoRA
    first: float
    slope: float
    energy: dict[str, float]

    def scaled(self, step: float) -> LoRA:
        return scaled(self.update, step)


def solve(
    model: StableDiffusion,
    projections: Sequence[Projection],
    constraint: Constraint,
    moments: Moments,
    config: CalibrationConfig,
    ranks: Mapping[str, int] | None,
    generator: torch.Generator,
) -> Solution:
    """The best update of every projection; `ranks` instead of the rule's."""
    most = config.rank * (MAX_RANK_FACTOR if config.rank_rule == "data" else 1)
    weight = partial(_weight, model)
    solved: dict[str, Components] = {}
    for _, group in alike(projections, shape_of):
        found = constraint.components(group, weight, moments, most, generator)
        solved |= {p.name: parts for p, parts in zip(group, found, strict=True)}
    scores = dict(zip(solved, on_host([parts.score for parts in solved.values()]), strict=True))
    ranks = ranks or _ranks(projections, scores, config)
    chosen = [p for p in projections if ranks[p.name]]
    energy = {p.name: float(scores[p.name][: ranks[p.name]].sum()) for p in chosen}
    slope = -sum(energy.values()) if constraint.backward else 0.0
    update = {
        p.name: _factors(solved[p.name].truncated(ranks[p.name]), moments.C(p)) for p in chosen
    }
    first = FIRST_CHANGE / max(_relative_change(chosen, weight, update, moments), 1e-12)
    return Solution(chosen, _lora_on_host(update), first, slope, energy)


def _weight(model: StableDiffusion, projection: Projection) -> Tensor:
    return model.unet.get_submodule(projection.name).weight.detach()


def _ranks(
    projections: Sequence[Projection], scores: Mapping[str, Tensor], config: CalibrationConfig
) -> dict[str, int]:
    if config.rank_rule == "uniform":
        return uniform_ranks(projections, config.rank)
    budget = budget_of([p for p in projections if not p.feed_forward], config.rank)
    return data_ranks(projections, scores, budget, max_rank=MAX_RANK_FACTOR * config.rank)


def _factors(components: Components, C: SecondMoment) -> Factors:
    return Factors(*unit_response(components.up * components.sigma, components.down, C))


def _relative_change(
    projections: Sequence[Projection],
    weight: Callable[[Projection], Tensor],
    update: Mapping[str, Factors],
    moments: Moments,
) -> float:
    """Root mean square over layers of ||D C^1/2|| / ||W C^1/2||: how far the update moves the
    outputs."""
    squares = []
    for p in projections:
        C, own = moments.C(p), update[p.name]
        moved = (own.up.T @ own.up * (own.down @ C.matmul(own.down.T))).sum()
        squares.append(moved / output_power(weight(p).float(), C).sum().clamp_min(1e-30))
    return float(torch.stack(squares).cpu().mean().sqrt())


def _lora_on_host(update: Mapping[str, Factors]) -> LoRA:
    parts = iter(on_host([part for own in update.values() for part in (own.up, own.down)]))
    return {name: Factors(next(parts), next(parts)) for name in update}


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each its own memory; all of one dtype and device, for which the host waits once."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(own.shape).clone() for part, own in zip(parts, tensors, strict=True)]
