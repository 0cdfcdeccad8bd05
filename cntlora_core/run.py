"""Whole runs: pictures and a checkpoint in, a LoRA out. What the command line and the ComfyUI nodes
share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .calibration.calibrate import Calibration, calibrate, continued
from .config import CalibrationConfig, TrainConfig
from .data.batches import NoisedSet
from .data.dataset import EncodedImages
from .distributed import ALONE, Group
from .errors import NonFiniteError, OutOfMemory
from .events import Base, Observer, Saved, Status, Training, ignore
from .lora.adapter import Adapters, LoRA, attached_lora
from .lora.file import save_lora
from .lora.metadata import describe
from .model.cpu_convolutions import convolutions_as_matmul
from .model.gradient_checkpointing import recomputing_activations
from .training.loop import train
from .training.prior_loss import PriorLoss
from .training.resume import RunSnapshots
from .training.state import TrainState, start_state

if TYPE_CHECKING:
    from .model.loader import StableDiffusion


@dataclass(frozen=True)
class RunResult:
    """A run as far as it went: the LoRA as calibrated, and as trained (the best weights, or the
    last; of step `kept_step`).

    `base_loss` is the untouched model's, None without a validation; `steps` were made.
    """

    start: Calibration
    lora: LoRA
    kept_step: int
    steps: int
    base_loss: float | None
    validations: list[tuple[int, float]]


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

    `preserve` feeds the calibration's preservation, which training keeps up (a resumed run measures
    it again); `prior` is a second loss on pictures. When training ends early, by a host's Cancel
    (an exception of `observer`), NaN or want of memory, nothing is lost: the checkpoint is written,
    `on_stop` gets the run as far as it went, and the exception goes on. Raises OutOfMemory with
    what to try next.
    """
    with convolutions_as_matmul(model.unet):
        base_loss = validate() if validate else None
        if base_loss is not None:
            observer(Base(base_loss))
        saved = checkpoints.read() if checkpoints else None
        if start is None and (saved is None or preserve is not None):
            observer(Status(f"Calibrating ({calibration.init}) on {len(subject)} pictures"))
            start = calibrate(
                model, subject, calibration, prior=preserve, observer=observer, group=group
            )
        if saved:  # what to preserve is not in the file: it was measured again, to the same numbers
            start = continued(saved.lora, start.preservation if start else None)
        assert start is not None
        observer(start.report)
        with (
            attached_lora(model.unet, start.lora, trainable=True) as adapters,
            recomputing_activations(model.unet, training.gradient_checkpointing),
        ):
            state = start_state(model, adapters, training)
            if saved:
                saved.restore(state)
            observer(Training(training.steps, state.step))

            preservation = start.preservation and start.preservation.on(model.device)

            def save(state: TrainState) -> None:
                if checkpoints and checkpoints.due(state.step) and group.rank == 0:
                    checkpoints.write(state)

            def result(best: bool) -> RunResult:
                weights, kept = (
                    state.weights(training) if best else (adapters.factors(), state.step)
                )
                return RunResult(start, weights, kept, state.step, base_loss, state.validations)

            try:
                train(
                    model,
                    subject,
                    state,
                    training,
                    prior=prior,
                    preservation=preservation,
                    validate=validate,
                    save=save,
                    observer=observer,
                    group=group,
                )
            except BaseException as error:
                worthless = isinstance(error, NonFiniteError) or _out_of_memory(error)
                if checkpoints and group.rank == 0 and not worthless:
                    checkpoints.write(state)
                if on_stop:
                    on_stop(result(best=isinstance(error, NonFiniteError)))
                if _out_of_memory(error):
                    raise _free(model, adapters, training, subject.resolution) from error
                raise
            return result(best=True)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)  # how the CPU's allocator says it
    )


def _free(
    model: StableDiffusion, adapters: Adapters, training: TrainConfig, resolution: int
) -> OutOfMemory:
    for parameter in adapters.parameters():
        parameter.grad = None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return OutOfMemory(
        f"The memory of {model.device} did not suffice. "
        f"Next to try: {_next_settings(training, resolution)}."
    )


def _next_settings(training: TrainConfig, resolution: int) -> str:
    """The next three settings to try, in the order of what they cost."""
    advice = [] if training.gradient_checkpointing else ["gradient checkpointing on"]
    if training.batch_size > 1:
        half = training.batch_size // 2
        advice.append(
            f"batch size {half} with accumulation "
            f"{-(-training.batch_size * training.accumulation // half)}"
        )
    advice += ["precision bf16", f"a lower resolution than {resolution} px", "a lower rank"]
    return ", ".join(advice[:3])


def save_run(
    path: str | os.PathLike[str],
    lora: LoRA,
    model: StableDiffusion,
    subject: EncodedImages,
    *,
    steps: int,
    calibration: CalibrationConfig,
    training: TrainConfig | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    observer: Observer = ignore,
) -> Path:
    """Save a LoRA with its whole story in the metadata."""
    metadata = describe(
        lora,
        family=model.family,
        title=Path(path).stem,
        model_name=model.name,
        trigger=subject.prompt,
        resolution=subject.resolution,
        pictures=subject.picture_count,
        data_digest=subject.digest,
        steps=steps,
        calibration=calibration,
        training=training,
    )
    saved = save_lora(path, lora, model.family, metadata, dtype=dtype, overwrite=overwrite)
    observer(Saved(str(saved)))
    return saved
