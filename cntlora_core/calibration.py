"""Checkpoint + subject -> a LoRA that already fits, in closed form. Reads like docs/method.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .config import CalibrationConfig
from .constraints import Constraint, make_constraint, preservation_metric
from .distributed import ALONE, Group
from .errors import NonFiniteError
from .events import Calibrated, Notice, Observer, Progress, ignore
from .lora import Factors, LoRA, attached, concatenate, default_init, gaussian_init
from .memory import checkpointed
from .projections import Projection, find_projections
from .ranks import MAX_RANK_FACTOR, budget_of, data_ranks, uniform_ranks
from .solve import Components, line_search, unit_response
from .statistics import Moments, record
from .triples import Triples, draw_triples, mean_loss

if TYPE_CHECKING:
    from .checkpoint import StableDiffusion
    from .subject import Subject

# First step tried, as the mean relative change of the layers' outputs; the line search doubles or halves it.
FIRST_CHANGE = 0.05


@dataclass(frozen=True)
class Calibration:
    """The start: a LoRA, and the report of how it came about."""

    lora: LoRA
    report: Calibrated


def calibrate(
    model: StableDiffusion,
    subject: Subject,
    config: CalibrationConfig,
    *,
    prior: Triples | None = None,
    projections: Sequence[Projection] | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> Calibration:
    """Compute the LoRA's start. No weight of the model is trained or changed.

    `projections`: which layers get an adapter; all attention projections when None.
    `prior`: triples of what the model should keep (class pictures under the class prompt); their activations give C_p.
    The processes of `group` share the pictures (`batch_size` is that of each) and add up what they measured.
    Raises NonFiniteError when the model's loss is not a number.
    """
    started = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    projections = projections or find_projections(model.unet)
    _tell_clipped(projections, config.rank, observer)
    if config.init in ("gaussian", "default"):
        return _plain_start(projections, config, generator, started)
    constraint = make_constraint(config.init, config.rho)
    kept = (
        None
        if prior is None
        else _measure(model, projections, prior, config, False, observer, "measuring the prior", group)[0]
    )
    cost = _Cost(forward=0 if prior is None else len(prior))
    lora: LoRA = {}
    energy = {p.name: 0.0 for p in projections}
    base_loss = loss = None
    step_sizes = []
    for sweep, share in enumerate(_shares(config.rank, config.sweeps)):
        triples = draw_triples(subject, config.passes * config.batch_size * group.size, len(model.schedule), generator)
        phase = f"calibrating {sweep + 1}/{config.sweeps}"
        with attached(model.unet, lora):
            moments, before = _measure(model, projections, triples, config, constraint.backward, observer, phase, group)
        cost.sweep(len(triples), constraint.backward)
        base_loss = before if base_loss is None else base_loss
        solved = _solve(model, projections, constraint, moments, kept, config, share, generator)
        ranks = _ranks(projections, solved, config, share)
        update = {p.name: _factors(p, solved[p.name].truncated(ranks[p.name]), moments) for p in projections}
        first = FIRST_CHANGE / max(_relative_change(model, projections, update, moments), 1e-12)
        evaluate = cost.counted(len(triples), _loss_of_step(model, lora, update, triples, config.batch_size, group))
        step, loss = line_search(evaluate, before, first, signed=constraint.signed)
        step_sizes.append(step)
        lora = concatenate(lora, {name: factors.scaled(step) for name, factors in update.items()})
        for p in projections:
            energy[p.name] += float(solved[p.name].score[: ranks[p.name]].sum())
    return _finish(config, projections, lora, energy, base_loss, loss, step_sizes, cost, started)


def continued(lora: LoRA) -> Calibration:
    """A start that was trained before: its ranks are its own, nothing is measured."""
    ranks = {name: factors.rank for name, factors in lora.items()}
    return Calibration(lora, Calibrated("continued", None, None, [], ranks, {}, 0, 0, 0.0))


class _Cost:
    """Passes made, in single pictures."""

    def __init__(self, forward: int = 0) -> None:
        self.forward, self.backward = forward, 0

    def sweep(self, pictures: int, backward: bool) -> None:
        self.forward += pictures
        self.backward += pictures if backward else 0

    def counted(self, pictures: int, evaluate: Callable[[float], float]) -> Callable[[float], float]:
        def counting(step: float) -> float:
            self.forward += pictures
            return evaluate(step)

        return counting


def _plain_start(
    projections: Sequence[Projection], config: CalibrationConfig, generator: torch.Generator, started: float
) -> Calibration:
    init = gaussian_init if config.init == "gaussian" else default_init
    lora = init(projections, uniform_ranks(projections, config.rank), generator)
    return _finish(config, projections, lora, {}, None, None, [], _Cost(), started)


def _measure(
    model: StableDiffusion,
    projections: Sequence[Projection],
    triples: Triples,
    config: CalibrationConfig,
    backward: bool,
    observer: Observer,
    phase: str,
    group: Group,
) -> tuple[Moments, float]:
    """One sweep: the moments, and the mean loss of the model as it stands."""
    total, done = torch.zeros(1, dtype=torch.float64), 0
    mine = triples.share(group)
    recompute = checkpointed(model.unet, config.gradient_checkpointing and backward)
    with record(model.unet, projections, backward=backward) as moments, recompute:
        for batch in mine.batches(config.batch_size):
            with torch.set_grad_enabled(backward):
                losses = batch.loss(model)
            if backward:
                (losses.sum() * _gradient_scale(model.dtype)).backward()
            total += losses.detach().double().sum().cpu()
            done += len(batch)
            observer(Progress(phase, done, len(mine)))
    group.sum_([total])
    moments.combine(group)
    loss = float(total) / len(triples)
    if not torch.isfinite(torch.tensor(loss)):
        raise NonFiniteError(_why_not_finite(model), step=0)
    return moments, loss


def _gradient_scale(dtype: torch.dtype) -> float:
    """fp16 gradients would underflow. The update does not depend on the scale: it cancels between G and S, and in the step size."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _why_not_finite(model: StableDiffusion) -> str:
    for name, parameter in model.unet.named_parameters():
        if not torch.isfinite(parameter).all():
            return (
                f"The checkpoint '{model.name}' is damaged: the UNet's weight '{name}' holds NaN or infinite values. "
                "Download it again or choose another."
            )
    return f"The loss of '{model.name}' is not finite before training. Try precision fp32 or bf16, or another VAE."


def _solve(
    model: StableDiffusion,
    projections: Sequence[Projection],
    constraint: Constraint,
    moments: Moments,
    prior: Moments | None,
    config: CalibrationConfig,
    rank: int,
    generator: torch.Generator,
) -> dict[str, Components]:
    """The leading components of every projection's update; as many as its rank could become."""
    most = rank * (MAX_RANK_FACTOR if config.rank_rule == "data" else 1)
    solved = {}
    for p in projections:
        weight = model.unet.get_submodule(p.name).weight.detach().cpu()
        K = preservation_metric(p, moments, prior, config.rho, config.preservation)
        solved[p.name] = constraint.components(p, weight, moments, K, most, generator)
    return solved


def _ranks(
    projections: Sequence[Projection], solved: Mapping[str, Components], config: CalibrationConfig, share: int
) -> dict[str, int]:
    if config.rank_rule == "uniform":
        return uniform_ranks(projections, share)
    scores = {name: components.score for name, components in solved.items()}
    return data_ranks(projections, scores, budget_of(projections, share), max_rank=MAX_RANK_FACTOR * share)


def _factors(projection: Projection, components: Components, moments: Moments) -> Factors:
    up, down = unit_response(
        components.up * components.sigma, components.down, moments.C(projection).to(components.down)
    )
    return Factors(up.float(), down.float())


def _relative_change(
    model: StableDiffusion, projections: Sequence[Projection], update: Mapping[str, Factors], moments: Moments
) -> float:
    """Root mean square over layers of ||D C^1/2|| / ||W C^1/2||: how far the update moves the outputs."""
    squares = []
    for p in projections:
        C = moments.C(p)
        weight = model.unet.get_submodule(p.name).weight.detach().cpu().float()
        delta = update[p.name].delta()
        squares.append(float(((delta @ C) * delta).sum() / ((weight @ C) * weight).sum().clamp_min(1e-30)))
    return (sum(squares) / len(squares)) ** 0.5


def _loss_of_step(
    model: StableDiffusion, lora: LoRA, update: LoRA, triples: Triples, batch_size: int, group: Group
) -> Callable[[float], float]:
    def loss(step: float) -> float:
        trial = concatenate(lora, {name: factors.scaled(step) for name, factors in update.items()})
        with attached(model.unet, trial):
            return mean_loss(model, triples, batch_size, group)

    return loss


def _shares(rank: int, sweeps: int) -> list[int]:
    """`rank` in `sweeps` near-equal parts, the larger first: each sweep's share of the mean rank."""
    return [rank // sweeps + (1 if sweep < rank % sweeps else 0) for sweep in range(sweeps)]


def _tell_clipped(projections: Sequence[Projection], rank: int, observer: Observer) -> None:
    smallest = min(min(p.in_features, p.out_features) for p in projections)
    if rank > smallest:
        observer(Notice(f"Rank {rank} is larger than the smallest layer ({smallest}): it was clipped there."))


def _finish(
    config: CalibrationConfig,
    projections: Sequence[Projection],
    lora: LoRA,
    energy: dict[str, float],
    base_loss: float | None,
    loss: float | None,
    step_sizes: list[float],
    cost: _Cost,
    started: float,
) -> Calibration:
    report = Calibrated(
        mode=config.init,
        base_loss=base_loss,
        loss=loss,
        step_sizes=step_sizes,
        ranks={p.name: lora[p.name].rank for p in projections},
        energy=energy,
        forward_passes=cost.forward,
        backward_passes=cost.backward,
        seconds=time.monotonic() - started,
    )
    return Calibration(lora, report)
