"""Checkpoint + subject -> a LoRA that already fits, in closed form. Reads like docs/method.md."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..data.batches import Batch, NoisedSet, batch_order, draw_batch, draw_noised, mean_loss
from ..data.importance import Importance
from ..distributed import ALONE, Group
from ..events import Calibrated, Notice, Observer, ignore
from ..lora.adapter import Factors, LoRA, attached_lora, default_init, gaussian_init
from ..lora.targets import Projection, find_projections, targets_for
from .closed_form import Components, output_power, parabola_step, unit_response
from .constraints import Constraint, Metric, make_constraint
from .measure import Sweep, measure
from .moments import Moments
from .natural import NaturalStart
from .preservation import Preservation, preserve
from .ranks import MAX_RANK_FACTOR, budget_of, data_ranks, uniform_ranks
from .refine import refine

if TYPE_CHECKING:
    from ..data.encoded import EncodedImages
    from ..model.loader import StableDiffusion

# First step tried, as the mean relative change of the layers' outputs: near where the parabola's
# minimum was on every subject.
FIRST_CHANGE = 0.17


@dataclass(frozen=True)
class Calibration:
    """The start: a LoRA, the report of how it came about, and what training goes on with: what to
    preserve, where in the schedule to draw, the metric of natural-gradient steps."""

    lora: LoRA
    report: Calibrated
    preservation: Preservation | None = None
    importance: Importance | None = None
    natural: NaturalStart | None = None


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

    `projections`: which layers get an adapter; those of `config.targets` when None. `ranks`: of
    every projection, instead of the rule's. `prior`: triples of what the model should keep (class
    pictures under the class prompt); their activations give C_p. The processes of `group` share the
    pictures (`batch_size` is that of each) and add up what they measured. Raises NonFiniteError
    when the model's loss is not a number.
    """
    started = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    projections = projections or find_projections(model.unet, targets_for(model.family, config))
    _tell_clipped(projections, config.rank, observer)
    if config.init in ("gaussian", "default"):
        return _plain_start(projections, config, generator, started)
    constraint, timesteps = make_constraint(config.init, config.rho), len(model.schedule)
    passes = _Passes(model, config, observer, group)

    # measure
    metric = passes.metric(projections, prior)
    count = config.passes * config.batch_size * group.size
    triples = draw_noised(subject, count, timesteps, generator, Importance.usual())
    swept = passes.measure(projections, triples, constraint.backward, "calibrating")
    moments, base = swept.moments, swept.loss

    # solve, choose ranks
    solved = _solve(model, projections, constraint, moments, metric, config, generator)
    ranks = ranks or _ranks(projections, solved, config)
    projections = [p for p in projections if ranks[p.name]]
    update = {
        p.name: _factors(p, solved[p.name].truncated(ranks[p.name]), moments) for p in projections
    }

    # fit the step
    slope = _slope(projections, solved, ranks, moments, count) if constraint.backward else None
    first = FIRST_CHANGE / max(_relative_change(model, projections, update, moments), 1e-12)
    step, loss = parabola_step(
        lambda step: passes.loss(triples, _scaled(update, step)), base, first, slope
    )
    lora = _scaled(update, step)
    energy = {p.name: float(solved[p.name].score[: ranks[p.name]].sum()) for p in projections}
    if swept.norms is None or not step:
        return _finish(config, lora, energy, base, loss, step, passes, started)

    # refine
    importance = Importance.measured(swept.timesteps, swept.norms, timesteps)
    natural = NaturalStart(projections, metric, moments.on(torch.device("cpu")), step)
    if config.refinements:
        refined, reached = passes.refined(subject, lora, natural, importance, generator)
        # Against the base, not the start: the start was fitted to these very triples, so its loss
        # on them flatters it.
        if (after := passes.loss(triples, refined)) < base:
            lora, loss, natural = refined, after, reached
    done = _finish(config, lora, energy, base, loss, step, passes, started)
    done = replace(done, importance=importance, natural=natural)
    if metric.prior is None:
        return done
    preservation = preserve(
        projections, metric.prior, swept.moments,
        weight=config.preservation, rho=config.rho, step=abs(step), pictures=count,
    )  # fmt: skip
    return replace(done, preservation=preservation)


def continued(lora: LoRA, preservation: Preservation | None = None) -> Calibration:
    """A start that was made before: its ranks are its own, nothing is measured."""
    ranks = {name: factors.rank for name, factors in lora.items()}
    return Calibration(
        lora, Calibrated("continued", None, None, None, ranks, {}, 0, 0, 0.0), preservation
    )


@dataclass
class _Passes:
    """The passes of a calibration, and their number in single pictures."""

    model: StableDiffusion
    config: CalibrationConfig
    observer: Observer
    group: Group
    forward: int = 0
    backward: int = 0

    def add(self, pictures: int, *, backward: bool) -> None:
        self.forward += pictures
        self.backward += pictures if backward else 0

    def measure(
        self, projections: Sequence[Projection], triples: NoisedSet, backward: bool, phase: str
    ) -> Sweep:
        self.add(len(triples), backward=backward)
        return measure(
            self.model, projections, triples,
            batch_size=self.config.batch_size, backward=backward, phase=phase,
            gradient_checkpointing=self.config.gradient_checkpointing,
            observer=self.observer, group=self.group,
        )  # fmt: skip

    def metric(self, projections: Sequence[Projection], prior: NoisedSet | None) -> Metric:
        """That of the config, with C_p where there is a prior."""
        if prior is None or not self.config.preservation:
            return Metric(self.config.rho)
        kept = self.measure(projections, prior, backward=False, phase="measuring the prior").moments
        return Metric(self.config.rho, kept, self.config.preservation)

    def refined(
        self,
        subject: EncodedImages,
        lora: LoRA,
        start: NaturalStart,
        importance: Importance,
        generator: torch.Generator,
    ) -> tuple[LoRA, NaturalStart]:
        """After the config's number of small steps."""
        config, group = self.config, self.group
        self.add(config.refinements * config.batch_size * group.size, backward=True)
        timesteps = len(self.model.schedule)
        batches = _batches(subject, config, timesteps, generator, group, importance)
        return refine(
            self.model, lora, start, batches, config.refinements,
            gradient_checkpointing=config.gradient_checkpointing,
            observer=self.observer, group=group,
        )  # fmt: skip

    def loss(self, triples: NoisedSet, lora: LoRA) -> float:
        self.add(len(triples), backward=False)
        with attached_lora(self.model.unet, lora):
            return mean_loss(self.model, triples, self.config.batch_size, self.group)


def _plain_start(
    projections: Sequence[Projection],
    config: CalibrationConfig,
    generator: torch.Generator,
    started: float,
) -> Calibration:
    init = gaussian_init if config.init == "gaussian" else default_init
    lora = init(projections, uniform_ranks(projections, config.rank), generator)
    return _finish(config, lora, {}, None, None, None, None, started)


def _solve(
    model: StableDiffusion,
    projections: Sequence[Projection],
    constraint: Constraint,
    moments: Moments,
    metric: Metric,
    config: CalibrationConfig,
    generator: torch.Generator,
) -> dict[str, Components]:
    """The leading components of every projection's update; as many as its rank could become."""
    most = config.rank * (MAX_RANK_FACTOR if config.rank_rule == "data" else 1)
    return {
        p.name: constraint.components(
            p, _weight(model, p), moments, metric.K(p, moments), most, generator
        )
        for p in projections
    }


def _weight(model: StableDiffusion, projection: Projection) -> Tensor:
    return model.unet.get_submodule(projection.name).weight.detach().float()


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


def _scaled(update: LoRA, step: float) -> LoRA:
    return {name: factors.scaled(step) for name, factors in update.items()}


def _slope(
    projections: Sequence[Projection],
    solved: Mapping[str, Components],
    ranks: Mapping[str, int],
    moments: Moments,
    pictures: int,
) -> float:
    """How the mean loss starts to change along the update: the sum over layers of <dL/dW, D>, of
    which each component's part is its sigma^2."""
    falls = [
        float(solved[p.name].score[: ranks[p.name]].sum()) * moments.passed(p) for p in projections
    ]
    return -sum(falls) / pictures


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
        C, weight = moments.C(p), _weight(model, p)
        up, down = update[p.name].up.to(weight), update[p.name].down.to(weight)
        moved = (up.T @ up * (down @ C.matmul(down.T))).sum()
        squares.append(float(moved / output_power(weight, C).sum().clamp_min(1e-30)))
    return (sum(squares) / len(squares)) ** 0.5


def _batches(
    subject: EncodedImages,
    config: CalibrationConfig,
    timesteps: int,
    generator: torch.Generator,
    group: Group,
    importance: Importance | None,
) -> Iterator[Batch]:
    """This process's part of fresh batches for the refinement, drawn as they are asked for: more of
    them leave the first as they are."""
    order = batch_order(
        subject,
        config.batch_size * group.size,
        config.refinements,
        torch.Generator().manual_seed(config.seed),
        importance,
    )
    for turn, index in enumerate(order):
        batch = draw_batch(subject, index, timesteps, generator, importance, turn)
        yield batch[group.rank :: group.size]


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
    lora: LoRA,
    energy: dict[str, float],
    base_loss: float | None,
    loss: float | None,
    step: float | None,
    passes: _Passes | None,
    started: float,
) -> Calibration:
    report = Calibrated(
        init=config.init,
        base_loss=base_loss,
        loss=loss,
        step_size=step,
        ranks={name: factors.rank for name, factors in lora.items()},
        energy=energy,
        forward_passes=passes.forward if passes else 0,
        backward_passes=passes.backward if passes else 0,
        seconds=time.monotonic() - started,
    )
    return Calibration(lora, report)
