"""The sweep's answer: layers solved, cut to their ranks, scaled to unit response."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..lora.adapter import Factors, LoRA, scaled
from ..lora.targets import Projection
from .closed_form import Components, unit_response
from .constraints import Constraint
from .moments import Moments, alike, at_a_time, shape_of
from .ranks import MAX_RANK_FACTOR, data_ranks, shared_budget, uniform_ranks
from .second_moment import SecondMoment, stack
from .sketch import sketch_numbers, sketch_width

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
    """The best update of every projection; `ranks` instead of the rule's. What `moments` hold of a
    layer's gradient is gone then: at real size it is the most of all that is held."""
    most = config.rank * (MAX_RANK_FACTOR if config.rank_rule == "data" else 1)
    weight = partial(_weight, model)
    solved: dict[str, Factors] = {}
    scores: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for group in _groups(projections, sketch_width(config.rank)):
        names = [p.name for p in group]
        parts = constraint.components(group, weight, moments, most, generator)
        C = stack([moments.C(p) for p in group])
        factors, moved = _factors(parts, C)
        solved |= dict(zip(names, factors, strict=True))
        scores |= {name: own.score for name, own in zip(names, parts, strict=True)}
        power = C.power(map(weight, group)).clamp_min(1e-30)
        changes |= dict(zip(names, moved / power[:, None], strict=True))
        if moments.gradients:
            moments.gradients.forget(group)
    told = iter(on_host([*scores.values(), *changes.values()]))
    scores, changes = ({name: next(told) for name in solved} for _ in range(2))
    ranks = ranks or _ranks(projections, scores, config)
    chosen = [p for p in projections if ranks[p.name]]
    energy = {p.name: float(scores[p.name][: ranks[p.name]].sum()) for p in chosen}
    slope = -sum(energy.values()) if constraint.backward else 0.0
    # root mean square over the layers
    change = statistics.fmean(float(changes[p.name][: ranks[p.name]][-1]) for p in chosen) ** 0.5
    update = {p.name: _cut(solved[p.name], ranks[p.name]) for p in chosen}
    first = FIRST_CHANGE / max(change, 1e-12)
    return Solution(chosen, _lora_on_host(update), first, slope, energy)


def _groups(projections: Sequence[Projection], width: int) -> Iterator[list[Projection]]:
    """Of one shape each, as many as do not take too much of the device."""
    for _, own in alike(projections, shape_of):
        yield from at_a_time(own, partial(sketch_numbers, width=width))


def _weight(model: StableDiffusion, projection: Projection) -> Tensor:
    """`[m, d]`."""
    return model.unet.get_submodule(projection.name).weight.detach().flatten(1)


def _ranks(
    projections: Sequence[Projection], scores: Mapping[str, Tensor], config: CalibrationConfig
) -> dict[str, int]:
    if config.rank_rule == "uniform":
        return uniform_ranks(projections, config.rank)
    budget = shared_budget(projections, config.rank)
    return data_ranks(projections, scores, budget, max_rank=MAX_RANK_FACTOR * config.rank)


def _factors(parts: Sequence[Components], C: SecondMoment) -> tuple[list[Factors], Tensor]:
    """Of g layers of one shape, with unit response; and how far their update D moves the outputs,
    ||D C^1/2||^2, of its first term, of its first two, and so on `[g, k]`."""
    up, sigma, down = (
        torch.stack([getattr(own, name) for own in parts]) for name in ("up", "sigma", "down")
    )
    up, down = unit_response(up * sigma[:, None], down, C)
    terms = up.mT @ up * (down @ C.matmul(down.mT))
    first = torch.ones_like(terms[0]).tril()
    moved = ((first @ terms) * first).sum(-1)
    return [Factors(*own) for own in zip(up, down, strict=True)], moved


def _cut(factors: Factors, rank: int) -> Factors:
    return Factors(factors.up[:, :rank], factors.down[:rank])


def _lora_on_host(update: Mapping[str, Factors]) -> LoRA:
    parts = iter(on_host([part for own in update.values() for part in (own.up, own.down)]))
    return {name: Factors(next(parts), next(parts)) for name in update}


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each its own memory; all of one dtype and device, for which the host waits once."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(own.shape).clone() for part, own in zip(parts, tensors, strict=True)]
