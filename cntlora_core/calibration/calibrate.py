"""Checkpoint + subject -> a LoRA that already fits, in closed form. Reads like docs/method.md."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..config import CalibrationConfig
from ..data.batches import NoisedSet, draw_noised
from ..data.importance import Importance
from ..distributed import ALONE, Group
from ..events import Calibrated, Notice, Observer, ignore
from ..lora.adapter import LoRA, default_init, gaussian_init
from ..lora.targets import Projection, find_projections, targets_for
from .closed_form import fitted_step
from .constraints import make_constraint
from .natural import NaturalStart
from .passes import Passes
from .preservation import Preservation, preserve
from .ranks import uniform_ranks
from .solution import solve

if TYPE_CHECKING:
    from ..data.encoded import EncodedImages
    from ..model.loader import StableDiffusion


NO_BETTER = (
    "The calibration's small steps ended no better than the base model: the LoRA is its first "
    "answer, and training goes on by adamw. Other pictures, or a smaller rank, may fit better."
)


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
    at_once: int | None = None,
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
    projections = projections or find_projections(model.unet, targets_for(config))
    _tell_clipped(projections, config.rank, observer)
    if config.init in ("gaussian", "default"):
        return _plain_start(projections, config, generator, started)
    passes = Passes(model, config, at_once or config.batch_size, observer, group)
    timesteps = len(model.schedule)

    # measure
    metric = passes.metric(projections, prior)
    constraint = make_constraint(config.init, metric)
    count = config.passes * config.batch_size * group.size
    triples = draw_noised(subject, count, timesteps, generator, Importance.usual())
    swept = passes.measure(projections, triples, constraint.backward, "calibrating")
    moments, base = swept.moments, swept.loss

    # solve, choose ranks
    solution = solve(model, projections, constraint, moments, config, ranks, generator)
    projections = solution.projections

    # fit the step
    slope = solution.slope / count if constraint.backward else None
    fitted = fitted_step(
        lambda step: passes.loss(triples, solution.scaled(step)), base, solution.first, slope
    )
    step, energy = fitted.step, solution.energy
    lora, loss = solution.scaled(step), fitted.loss
    if swept.norms is None or not step:
        if metric.prior:
            observer(Notice("Training after this start preserves nothing of the prior."))
        return _finish(config, lora, energy, base, loss, step, passes, started)

    # refine
    importance = Importance.measured(swept.timesteps, swept.norms, timesteps)
    host = torch.device("cpu")  # where it waits for the steps
    metric, moments = metric.only(projections).on(host), moments.only(projections).on(host)
    begun = NaturalStart(projections, metric, moments, fitted.least)
    natural: NaturalStart | None = begun
    del swept, constraint  # what they hold on the device the steps need more
    if config.refinements:
        start = solution.scaled(fitted.least)
        refined, reached = passes.refined(subject, start, begun, importance, generator)
        # Against the base, not the start: the start was fitted to these very triples, so its loss
        # on them flatters it.
        if (after := passes.loss(triples, refined)) < base:
            lora, loss, step, natural = refined, after, fitted.least, reached
        else:
            natural = None
            observer(Notice(NO_BETTER))
    done = _finish(config, lora, energy, base, loss, step, passes, started)
    preservation = preserve(projections, metric, moments, step=abs(fitted.step), pictures=count)
    return replace(done, importance=importance, natural=natural, preservation=preservation)


def continued(lora: LoRA, preservation: Preservation | None = None) -> Calibration:
    """A start that was made before: its ranks are its own, nothing is measured."""
    ranks = {name: factors.rank for name, factors in lora.items()}
    return Calibration(
        lora, Calibrated("continued", None, None, None, ranks, {}, 0, 0, 0.0), preservation
    )


def _plain_start(
    projections: Sequence[Projection],
    config: CalibrationConfig,
    generator: torch.Generator,
    started: float,
) -> Calibration:
    init = gaussian_init if config.init == "gaussian" else default_init
    lora = init(projections, uniform_ranks(projections, config.rank), generator)
    return _finish(config, lora, {}, None, None, None, None, started)


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
    passes: Passes | None,
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
