"""Pictures and a checkpoint in, a LoRA out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..calibration.calibrate import Calibration, calibrate, continued
from ..calibration.constraints import Metric
from ..calibration.natural import NaturalStart
from ..config import CalibrationConfig, TrainConfig
from ..data.batches import NoisedSet
from ..data.encoded import EncodedImages
from ..defaults import default_learning_rate
from ..devices import finer_precision, first_that_fits
from ..distributed import ALONE, Group, gathered
from ..effects import without_effect_in_training, without_effect_on_natural_steps
from ..errors import NonFiniteError, SettingError
from ..events import Base, Notice, Observer, Resumed, Status, Training, Validation, ignore
from ..lora.adapter import attached_lora, scaled
from ..lora.targets import ALL, find_projections
from ..model.gradient_checkpointing import recomputing_activations
from ..training.loop import train
from ..training.memory_plan import described, fitted_calibration, fitted_training, ways_to_run
from ..training.prior_loss import PriorLoss
from ..training.resume import RunSnapshots, SavedState
from ..training.state import start_state
from ..training.strength import Strength, fitted_strength
from .conditions import run_conditions
from .outcome import Ongoing, RunResult

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

TOLD_BELOW = 0.9  # of the whole strength


def run_calibration(
    model: StableDiffusion,
    subject: EncodedImages,
    config: CalibrationConfig,
    *,
    preserve: NoisedSet | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> Calibration:
    """Calibrate, with what a run needs around it. Where memory runs out it begins again in the next
    smaller way; raises OutOfMemory with what to try next after the smallest."""
    config, at_once = fitted_calibration(
        model, config, subject.resolution, observer, group, preserves=preserve is not None
    )
    ways = _ways(at_once, config.gradient_checkpointing, group)

    def run(way: tuple[int, bool]) -> Calibration:
        at_once, recomputing = way
        if way != ways[0]:
            again = f"The calibration begins again with {described(*way)}."
            observer(Notice(f"The memory did not suffice. {again}"))
        return calibrate(
            model, subject, replace(config, gradient_checkpointing=recomputing),
            prior=preserve, at_once=at_once, observer=observer, group=group,
        )  # fmt: skip

    how = {"init": config.init, "count": len(subject)}
    observer(Status("Calibrating ({init}) on {count} pictures", how))
    smallest, recomputing = ways[-1]
    tried = replace(config, batch_size=smallest, gradient_checkpointing=recomputing)
    with run_conditions(model, tried, subject.resolution):
        start = first_that_fits(dict.fromkeys(ways, 0), run, model.device)
    observer(start.report)
    return start


def run_training(
    model: StableDiffusion,
    subject: EncodedImages,
    calibration: CalibrationConfig,
    training: TrainConfig,
    *,
    preserve: NoisedSet | None = None,
    prior: PriorLoss | None = None,
    start: Calibration | None = None,
    validate: Callable[[], float] | None = None,
    checkpoints: RunSnapshots | None = None,
    on_stop: Callable[[RunResult], None] | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> RunResult:
    """Calibrate, then train; or train on from `start`, with its own ranks. The base model is the
    same before and after.

    `preserve` feeds the calibration's preservation, which training keeps up; `prior` is a second
    loss on pictures. When training ends early, by a host's Cancel (an exception of `observer`), NaN
    or want of memory (OutOfMemory says what to try next), nothing is lost: `on_stop` gets the run
    as far as it went, the checkpoint is written, and the exception goes on.
    """
    for text in without_effect_in_training(training, validate is not None, prior is not None):
        observer(Notice(text))
    saved = _found_by_all(checkpoints.read() if checkpoints else None, group)
    if checkpoints and saved:
        checkpoints.check_steps(saved, training.steps)
    base_loss = _base_loss(model, validate, training, subject.resolution, observer)
    if start is None and (saved is None or preserve is not None):
        start = run_calibration(
            model, subject, calibration, preserve=preserve, observer=observer, group=group
        )
    start = _resumed(saved, model, start, calibration, observer) if saved else start
    assert start is not None
    training, natural = _optimizer(start, training, model.name, calibration.init, observer)
    training = fitted_training(
        model, training, start, subject.resolution, observer, group, prior=prior is not None
    )
    ways = _ways(training.batch_size, training.gradient_checkpointing, group)
    smallest = _in_this_way(training, ways[-1])
    with (
        run_conditions(model, smallest, subject.resolution),
        attached_lora(model.unet, start.lora, trainable=True) as adapters,
    ):
        state = start_state(model, adapters, training, natural, start.importance, group)
        state.strength = None if base_loss is None else Strength(base_loss)
        if saved:
            saved.restore(state)
        observer(Training(training.steps, state.step))
        if state.step:
            observer(Resumed(state.losses, state.validations))
        written = None if group.rank else checkpoints
        run = Ongoing(start, state, training, base_loss, written, observer, validate)
        preservation = start.preservation and start.preservation.on(model.device)

        def go_on(way: tuple[int, bool]) -> None:
            run.training = _in_this_way(training, way)
            if way != ways[0]:
                state.again()
                said = described(f"{way[0]} x {run.training.accumulation}", way[1])
                run.watch(Notice(f"The memory did not suffice. Training goes on with {said}."))
            with recomputing_activations(model.unet, run.training.gradient_checkpointing):
                train(
                    model, subject, state, run.training,
                    prior=prior, preservation=preservation, validate=validate and run.validated,
                    save=run.save, observer=run.watch, group=group,
                )  # fmt: skip

        with run.kept(on_stop):
            first_that_fits(dict.fromkeys(ways, 0), go_on, model.device)
            result = run.result(best=True)
            _tell_strength(result, run.watch)
    return result


def _found_by_all(saved: SavedState | None, group: Group) -> SavedState | None:
    """Raises SettingError where the processes would not go on from the same step."""
    steps = gathered(torch.tensor(float(saved.story["step"] if saved else -1)), group)
    if (steps != steps[0]).any():
        raise SettingError(
            "Not every process finds the same checkpoint to go on from: the output must be on a "
            "disk that all of them see. Or start afresh, without --resume."
        )
    return saved


def _ways(at_once: int, recomputing: bool, group: Group) -> list[tuple[int, bool]]:
    """Those to try one after another; one of several processes has one, the others would wait."""
    ways = ways_to_run(at_once, recomputing)
    return ways[:1] if group.size > 1 else ways


def _in_this_way(training: TrainConfig, way: tuple[int, bool]) -> TrainConfig:
    """So many pictures at once, with gradient checkpointing or not; a step sees as many as
    before."""
    at_once, recomputing = way
    return replace(
        training,
        batch_size=at_once,
        accumulation=training.accumulation * training.batch_size // at_once,
        gradient_checkpointing=recomputing,
    )


def _resumed(
    saved: SavedState,
    model: StableDiffusion,
    measured: Calibration | None,
    config: CalibrationConfig,
    observer: Observer,
) -> Calibration:
    """The start of a run that goes on. What to preserve is not in its file: it was measured again,
    to the same numbers, unless another rounding has given other layers a rank."""
    if measured and not saved.lora.keys() <= measured.lora.keys():
        if measured.preservation:
            said = (
                "Measured again, the prior is of other layers than the run that was stopped has: "
                "it goes on, and preserves no more."
            )
            observer(Notice(said))
        measured = None
    natural = measured.natural if measured else None
    metric = natural.metric if natural else Metric(config.rho)
    return replace(
        continued(saved.lora, measured.preservation if measured else None),
        importance=saved.importance,
        natural=saved.natural(metric, find_projections(model.unet, ALL)),
    )


def _optimizer(
    start: Calibration, training: TrainConfig, model: str, init: str, observer: Observer
) -> tuple[TrainConfig, NaturalStart | None]:
    """The settings with the optimiser that will make the steps, and the metric of natural-gradient
    steps, where they are wanted and can be made."""
    if training.optimizer not in ("auto", "natural"):
        return training, None
    if start.natural is None:
        if training.optimizer == "natural":
            text = (
                "Natural-gradient steps go on from a calibration with init target, and there is "
                "none: adamw trains instead."
            )
            observer(Notice(text))
        return replace(training, optimizer="adamw"), None
    rate = default_learning_rate(model, init)
    for text in without_effect_on_natural_steps(training, rate):
        observer(Notice(text))
    return replace(training, optimizer="natural"), start.natural


def run_untrained(
    model: StableDiffusion,
    subject: EncodedImages,
    calibration: CalibrationConfig,
    *,
    preserve: NoisedSet | None = None,
    validate: Callable[[], float] | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> RunResult:
    """Calibrate alone, validated before and after; the LoRA at the strength that fits what
    validates."""
    base_loss = _base_loss(model, validate, calibration, subject.resolution, observer)
    start = run_calibration(
        model, subject, calibration, preserve=preserve, observer=observer, group=group
    )
    if validate is None or base_loss is None:
        return RunResult(start, start.lora, 0, 0, base_loss, [])
    with run_conditions(model, calibration, subject.resolution):
        strength, loss = fitted_strength(model, start.lora, validate, base_loss)
    observer(Validation(0, loss))
    lora = scaled(start.lora, strength)
    result = RunResult(start, lora, 0, 0, base_loss, [(0, loss)], strength=strength)
    _tell_strength(result, observer)
    return result


def _tell_strength(result: RunResult, observer: Observer) -> None:
    if result.strength < TOLD_BELOW:
        said = (
            f"The LoRA is given out at {result.strength:.2f} of its strength, which fits the "
            "validating pictures best. For more of the subject use it above strength 1."
        )
        observer(Notice(said))


def _base_loss(
    model: StableDiffusion,
    validate: Callable[[], float] | None,
    config: CalibrationConfig | TrainConfig,
    resolution: int,
    observer: Observer,
) -> float | None:
    """The validation loss of the untouched model."""
    if validate is None:
        return None
    with run_conditions(model, config, resolution):
        loss = validate()
    if not math.isfinite(loss):
        ways = " or ".join([*finer_precision(model.dtype), "another VAE"])
        raise NonFiniteError(
            f"The loss of '{model.name}' is not finite before training: nothing was trained. Try "
            f"{ways}."
        )
    observer(Base(loss))
    return loss
