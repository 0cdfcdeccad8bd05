"""The sweep's answer, layer by layer: solved, cut to its rank, scaled to unit response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..lora.adapter import Factors, LoRA
from ..lora.targets import Projection
from .closed_form import Components, output_power, unit_response
from .constraints import Constraint, Metric
from .moments import Moments
from .ranks import MAX_RANK_FACTOR, budget_of, data_ranks, uniform_ranks

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
        return {name: factors.scaled(step) for name, factors in self.update.items()}


def solve(
    model: StableDiffusion,
    projections: Sequence[Projection],
    constraint: Constraint,
    moments: Moments,
    metric: Metric,
    config: CalibrationConfig,
    ranks: Mapping[str, int] | None,
    generator: torch.Generator,
) -> Solution:
    """The best update of every projection; `ranks` instead of the rule's."""
    most = config.rank * (MAX_RANK_FACTOR if config.rank_rule == "data" else 1)
    readers = {p.input_key: p for p in projections}  # those that read one input share its K
    K = {key: metric.K(p, moments) for key, p in readers.items()}
    solved = {
        p.name: constraint.components(
            p, _weight(model, p), moments, K[p.input_key], most, generator
        )
        for p in projections
    }
    ranks = ranks or _ranks(projections, solved, config)
    solved = {name: parts.truncated(ranks[name]) for name, parts in solved.items()}
    chosen = [p for p in projections if ranks[p.name]]
    update = {p.name: _factors(p, solved[p.name], moments) for p in chosen}
    energy = {p.name: float(solved[p.name].score.sum()) for p in chosen}
    slope = -sum(energy.values()) if constraint.backward else 0.0
    first = FIRST_CHANGE / max(_relative_change(model, chosen, update, moments), 1e-12)
    return Solution(chosen, update, first, slope, energy)


def _weight(model: StableDiffusion, projection: Projection) -> Tensor:
    return model.unet.get_submodule(projection.name).weight.detach()


def _ranks(
    projections: Sequence[Projection], solved: Mapping[str, Components], config: CalibrationConfig
) -> dict[str, int]:
    if config.rank_rule == "uniform":
        return uniform_ranks(projections, config.rank)
    scores = {name: components.score for name, components in solved.items()}
    budget = budget_of([p for p in projections if not p.feed_forward], config.rank)
    return data_ranks(projections, scores, budget, max_rank=MAX_RANK_FACTOR * config.rank)


def _factors(projection: Projection, components: Components, moments: Moments) -> Factors:
    up = components.up * components.sigma
    up, down = unit_response(up, components.down, moments.C(projection))
    return Factors(up.cpu(), down.cpu())


def _relative_change(
    model: StableDiffusion,
    projections: Sequence[Projection],
    update: Mapping[str, Factors],
    moments: Moments,
) -> float:
    """Root mean square over layers of ||D C^1/2|| / ||W C^1/2||: how far the update moves the
    outputs."""
    squares = []
    for p in projections:
        C, weight = moments.C(p), _weight(model, p).float()
        up, down = update[p.name].up.to(weight), update[p.name].down.to(weight)
        moved = (up.T @ up * (down @ C.matmul(down.T))).sum()
        squares.append(float(moved / output_power(weight, C).sum().clamp_min(1e-30)))
    return (sum(squares) / len(squares)) ** 0.5
