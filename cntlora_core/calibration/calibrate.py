"""Checkpoint + subject -> a LoRA that already fits, in closed form. Reads like docs/method.md."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..config import CalibrationConfig
from ..data.batches import Batch, NoisedSet, batch_order, draw_batch, draw_noised, mean_loss
from ..distributed import ALONE, Group
from ..events import Calibrated, Notice, Observer, ignore
from ..lora.adapter import Factors, LoRA, attached_lora, default_init, gaussian_init
from ..lora.targets import Projection, find_projections, targets_for
from .closed_form import Components, cholesky, output_power, parabola_step, unit_response
from .constraints import Constraint, Metric, make_constraint
from .measure import measure
from .moments import Moments
from .preservation import Preservation, preserve
from .ranks import MAX_RANK_FACTOR, budget_of, data_ranks, uniform_ranks
from .refine import refine

if TYPE_CHECKING:
    from ..data.dataset import EncodedImages
    from ..model.loader import StableDiffusion

# First step tried, as the mean relative change of the layers' outputs: near where the parabola's
# minimum was on every subject.
FIRST_CHANGE = 0.17


@dataclass(frozen=True)
class Calibration:
    """The start: a LoRA, the report of how it came about, and what training should go on to
    preserve."""

    lora: LoRA
    report: Calibrated
    preservation: Preservation | None = None


def calibrate(
    model: StableDiffusion,
    subject: EncodedImages,
    config: CalibrationConfig,
    *,
    prior: NoisedSet | None = None,
    projections: Sequence[Projection] | None = None,
    ranks: Mapping[str, int] | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> Calibration:
    """Compute the LoRA's start. No weight of the model is trained or changed.

    `projections`: which layers get an adapter; those of `config.targets` when None.
    `ranks`: of every projection, instead of the rule's.
    `prior`: triples of what the model should keep (class pictures under the class prompt); their
    activations give C_p. The processes of `group` share the pictures (`batch_size` is that of each)
    and add up what they measured. Raises NonFiniteError when the model's loss is not a number.
    """
    started = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    projections = projections or find_projections(model.unet, targets_for(model.family, config))
    _tell_clipped(projections, config.rank, observer)
    if config.init in ("gaussian", "default"):
        return _plain_start(projections, config, generator, started)
    constraint = make_constraint(config.init, config.rho)
    sweep = partial(
        measure, model, projections, batch_size=config.batch_size,
        gradient_checkpointing=config.gradient_checkpointing, observer=observer, group=group,
    )  # fmt: skip
    cost = _Cost()
    kept = None
    if prior is not None and config.preservation:
        kept, _ = sweep(prior, backward=False, phase="measuring the prior")
        cost.add(len(prior), 0)
    metric = Metric(config.rho, kept, config.preservation)

    triples = draw_noised(
        subject, config.passes * config.batch_size * group.size, len(model.schedule), generator
    )
    moments, base = sweep(triples, backward=constraint.backward, phase="calibrating")
    cost.add(len(triples), len(triples) if constraint.backward else 0)
    solved = _solve(model, projections, constraint, moments, metric, config, generator)
    ranks = ranks or _ranks(projections, solved, config)
    projections = [p for p in projections if ranks[p.name]]
    update = {
        p.name: _factors(p, solved[p.name].truncated(ranks[p.name]), moments) for p in projections
    }
    slope = _slope(projections, update, moments, len(triples)) if constraint.backward else None
    first = FIRST_CHANGE / max(_relative_change(model, projections, update, moments), 1e-12)

    def loss_with(lora: LoRA) -> float:
        cost.add(len(triples), 0)
        with attached_lora(model.unet, lora):
            return mean_loss(model, triples, config.batch_size, group)

    step, loss = parabola_step(lambda step: loss_with(_scaled(update, step)), base, first, slope)
    lora = _scaled(update, step)
    if config.refinements and constraint.backward and step:
        batches = _batches(subject, config, len(model.schedule), generator, group)
        pictures = config.refinements * config.batch_size * group.size
        cost.add(pictures, pictures)
        refined = refine(
            model, projections, lora, moments, metric, step, batches, config.refinements,
            gradient_checkpointing=config.gradient_checkpointing, observer=observer, group=group,
        )  # fmt: skip
        # Against the base, not the start: the start was fitted to these very triples, so its loss
        # on them flatters it.
        if (after := loss_with(refined)) < base:
            lora, loss = refined, after
    energy = {p.name: float(solved[p.name].score[: ranks[p.name]].sum()) for p in projections}
    done = _finish(config, projections, lora, energy, base, loss, step, cost, started)
    if kept is None or not constraint.backward or not step:
        return done
    preservation = preserve(
        projections, kept, moments,
        weight=config.preservation, rho=config.rho, step=abs(step), pictures=len(triples),
    )  # fmt: skip
    return replace(done, preservation=preservation)


def continued(lora: LoRA, preservation: Preservation | None = None) -> Calibration:
    """A start that was made before: its ranks are its own, nothing is measured."""
    ranks = {name: factors.rank for name, factors in lora.items()}
    return Calibration(
        lora, Calibrated("continued", None, None, None, ranks, {}, 0, 0, 0.0), preservation
    )


class _Cost:
    """Passes made, in single pictures."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def add(self, forward: int, backward: int) -> None:
        self.forward += forward
        self.backward += backward


def _plain_start(
    projections: Sequence[Projection],
    config: CalibrationConfig,
    generator: torch.Generator,
    started: float,
) -> Calibration:
    init = gaussian_init if config.init == "gaussian" else default_init
    lora = init(projections, uniform_ranks(projections, config.rank), generator)
    return _finish(config, projections, lora, {}, None, None, None, _Cost(), started)


def _solve(
    model: StableDiffusion,
    projections: Sequence[Projection],
    constraint: Constraint,
    moments: Moments,
    metric: Metric,
    config: CalibrationConfig,
    generator: torch.Generator,
) -> dict[str, Components]:
    """The leading components of every projection's update; as many as its rank could become. fp64,
    on the CPU."""
    most = config.rank * (MAX_RANK_FACTOR if config.rank_rule == "data" else 1)
    like = torch.zeros((), dtype=torch.float64)
    solved, held = {}, ("", like)
    for p in sorted(
        projections, key=lambda p: p.input_key
    ):  # those that read one input share its factor
        if p.input_key != held[0]:
            held = p.input_key, cholesky(metric.K(p, moments, like))
        weight = model.unet.get_submodule(p.name).weight.detach().cpu()
        solved[p.name] = constraint.components(p, weight, moments, held[1], most, generator)
    return solved


def _ranks(
    projections: Sequence[Projection], solved: Mapping[str, Components], config: CalibrationConfig
) -> dict[str, int]:
    if config.rank_rule == "uniform":
        return uniform_ranks(projections, config.rank)
    scores = {name: components.score for name, components in solved.items()}
    budget = budget_of([p for p in projections if not p.feed_forward], config.rank)
    return data_ranks(projections, scores, budget, max_rank=MAX_RANK_FACTOR * config.rank)


def _factors(projection: Projection, components: Components, moments: Moments) -> Factors:
    up, down = unit_response(
        components.up * components.sigma, components.down, moments.C(projection).to(components.down)
    )
    return Factors(up.float(), down.float())


def _scaled(update: LoRA, step: float) -> LoRA:
    return {name: factors.scaled(step) for name, factors in update.items()}


def _slope(
    projections: Sequence[Projection], update: LoRA, moments: Moments, pictures: int
) -> float:
    """How the mean loss starts to change along the update: the sum over layers of <dL/dW, D>."""
    falls = [
        float((moments.G(p) * update[p.name].delta()).sum()) * moments.tokens(p)
        for p in projections
    ]
    return sum(falls) / pictures


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
        C = moments.C(p)
        weight = model.unet.get_submodule(p.name).weight.detach().cpu().float()
        squares.append(
            float(
                output_power(update[p.name].delta(), C).sum()
                / output_power(weight, C).sum().clamp_min(1e-30)
            )
        )
    return (sum(squares) / len(squares)) ** 0.5


def _batches(
    subject: EncodedImages,
    config: CalibrationConfig,
    timesteps: int,
    generator: torch.Generator,
    group: Group,
) -> Iterator[Batch]:
    """This process's part of fresh batches for the refinement, drawn as they are asked for: more of
    them leave the first as they are."""
    order = batch_order(
        subject,
        config.batch_size * group.size,
        config.refinements,
        torch.Generator().manual_seed(config.seed),
    )
    for index in order:
        yield draw_batch(subject, index, timesteps, generator)[group.rank :: group.size]


def _tell_clipped(projections: Sequence[Projection], rank: int, observer: Observer) -> None:
    smallest = min(min(p.in_features, p.out_features) for p in projections)
    if rank > smallest:
        observer(
            Notice(
                f"Rank {rank} is larger than the smallest layer ({smallest}): it was clipped there."
            )
        )


def _finish(
    config: CalibrationConfig,
    projections: Sequence[Projection],
    lora: LoRA,
    energy: dict[str, float],
    base_loss: float | None,
    loss: float | None,
    step: float | None,
    cost: _Cost,
    started: float,
) -> Calibration:
    report = Calibrated(
        mode=config.init,
        base_loss=base_loss,
        loss=loss,
        step_size=step,
        ranks={p.name: lora[p.name].rank for p in projections},
        energy=energy,
        forward_passes=cost.forward,
        backward_passes=cost.backward,
        seconds=time.monotonic() - started,
    )
    return Calibration(lora, report)
