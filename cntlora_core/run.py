"""Whole runs: pictures and a checkpoint in, a LoRA out. What the command line and the ComfyUI nodes
share."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .calibration.calibrate import Calibration, calibrate, continued
from .calibration.constraints import Metric
from .calibration.natural import NaturalStart
from .config import CalibrationConfig, TrainConfig
from .data.batches import NoisedSet
from .data.encoded import EncodedImages
from .distributed import ALONE, Group
from .effects import without_effect_in_training
from .errors import CNTLoRAError, NonFiniteError, OutOfMemory, OutputError
from .events import Base, Event, Notice, Observer, Saved, Status, Training, Validation, ignore
from .files import DISK, Disk, other_places
from .lora.adapter import LoRA, attached_lora
from .lora.file import overflows, save_lora
from .lora.metadata import Source, Taught, describe
from .lora.targets import ALL, find_projections
from .model.cpu_convolutions import convolutions_as_matmul
from .model.gradient_checkpointing import recomputing_activations
from .training.loop import train
from .training.memory_plan import COPIES_OF_ADAPTERS, fitted_to_memory
from .training.prior_loss import PriorLoss
from .training.resume import RunSnapshots, SavedState
from .training.state import TrainState, start_state

if TYPE_CHECKING:
    from .model.loader import StableDiffusion


def _resumed(
    saved: SavedState,
    model: StableDiffusion,
    measured: Calibration | None,
    config: CalibrationConfig,
) -> Calibration:
    """The start of a run that goes on."""
    natural = measured.natural if measured else None
    metric = natural.metric if natural else Metric(config.rho)
    return replace(
        continued(saved.lora, measured.preservation if measured else None),
        importance=saved.importance,
        natural=saved.natural(metric, find_projections(model.unet, ALL)),
    )


def _natural(start: Calibration, training: TrainConfig, observer: Observer) -> NaturalStart | None:
    """The metric of natural-gradient steps, where they are wanted and can be made."""
    if training.optimizer not in ("auto", "natural"):
        return None
    if start.natural is None and training.optimizer == "natural":
        text = (
            "Natural-gradient steps go on from a calibration with init target that lowered the "
            "loss, of a model smaller than SDXL, and there is none: adamw trains instead."
        )
        observer(Notice(text))
    return start.natural


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


def run_calibration(
    model: StableDiffusion,
    subject: EncodedImages,
    config: CalibrationConfig,
    *,
    preserve: NoisedSet | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> Calibration:
    """Calibrate, with what a run needs around it. Raises OutOfMemory with what to try next."""
    config = fitted_to_memory(model, config, subject.resolution, fixed=0, observer=observer)
    observer(Status(f"Calibrating ({config.init}) on {len(subject)} pictures"))
    with _run_conditions(model, config, subject.resolution):
        start = calibrate(model, subject, config, prior=preserve, observer=observer, group=group)
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

    `preserve` feeds the calibration's preservation, which training keeps up (a resumed run measures
    it again); `prior` is a second loss on pictures. When training ends early, by a host's Cancel
    (an exception of `observer`), NaN or want of memory, nothing is lost: `on_stop` gets the run as
    far as it went, the checkpoint is written, and the exception goes on. A checkpoint that cannot
    be written is told, and training goes on. Raises OutOfMemory with what to try next.
    """
    validates, has_prior = validate is not None, prior is not None
    for text in without_effect_in_training(training, validates=validates, has_prior=has_prior):
        observer(Notice(text))
    saved = checkpoints.read() if checkpoints else None
    base_loss = _base_loss(model, validate, training, subject.resolution, observer)
    if start is None and (saved is None or preserve is not None):
        start = run_calibration(
            model, subject, calibration, preserve=preserve, observer=observer, group=group
        )
    if saved:  # what to preserve is not in the file: it was measured again, to the same numbers
        start = _resumed(saved, model, start, calibration)
    assert start is not None
    training = _fitted(model, training, start, subject.resolution, observer)

    with (
        _run_conditions(model, training, subject.resolution),
        attached_lora(model.unet, start.lora, trainable=True) as adapters,
        recomputing_activations(model.unet, training.gradient_checkpointing),
    ):
        natural = _natural(start, training, observer)
        state = start_state(model, adapters, training, natural, start.importance, group)
        if saved:
            saved.restore(state)
        observer(Training(training.steps, state.step))
        written = checkpoints if group.rank == 0 else None
        run = _Run(start, state, training, base_loss, written, observer)
        try:
            train(
                model,
                subject,
                state,
                training,
                prior=prior,
                preservation=start.preservation and start.preservation.on(model.device),
                validate=validate,
                save=run.save,
                observer=run.watch,
                group=group,
            )
        except BaseException as error:
            run.keep(error, on_stop)
            raise
        return run.result(best=True)


@dataclass
class _Run:
    """A training while it is made: its checkpoints, and what is kept when it ends early."""

    start: Calibration
    state: TrainState
    training: TrainConfig
    base_loss: float | None
    checkpoints: RunSnapshots | None
    observer: Observer
    left: BaseException | None = None

    def watch(self, event: Event) -> None:
        """The observer; an exception of it leaves the run between two steps."""
        try:
            self.observer(event)
        except BaseException as error:
            self.left = error
            raise

    def save(self, state: TrainState) -> None:
        if self.checkpoints and self.checkpoints.due(state.step):
            self.checkpoints.try_to_write(state, self.watch)

    def result(self, best: bool) -> RunResult:
        state = self.state
        last = state.adapters.factors(), state.step
        weights, kept = state.weights(self.training) if best else last
        return RunResult(self.start, weights, kept, state.step, self.base_loss, state.validations)

    def keep(self, error: BaseException, on_stop: Callable[[RunResult], None] | None) -> None:
        """The LoRA first, then the checkpoint; what fails there is told with `error`."""
        try:
            if on_stop:
                on_stop(self.result(best=isinstance(error, NonFiniteError) or self.state.judged))
        finally:
            # Any other exception leaves half a step, and the checkpoint before it stays.
            if self.checkpoints and error is self.left:
                try:
                    self.checkpoints.write(self.state)
                except OutputError as failure:
                    if isinstance(error, CNTLoRAError):
                        error.add_sentence(str(failure))


def _fitted(
    model: StableDiffusion,
    training: TrainConfig,
    start: Calibration,
    resolution: int,
    observer: Observer,
) -> TrainConfig:
    """The settings with which the training fits the memory."""
    adapters = sum(f.up.nbytes + f.down.nbytes for f in start.lora.values())
    return fitted_to_memory(
        model, training, resolution, fixed=COPIES_OF_ADAPTERS * adapters, observer=observer
    )


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
    """Calibrate alone, validated before and after."""
    base_loss = _base_loss(model, validate, calibration, subject.resolution, observer)
    start = run_calibration(
        model, subject, calibration, preserve=preserve, observer=observer, group=group
    )
    validations = []
    if validate:
        with (
            _run_conditions(model, calibration, subject.resolution),
            attached_lora(model.unet, start.lora),
        ):
            validations.append((0, validate()))
        observer(Validation(*validations[0]))
    return RunResult(start, start.lora, 0, 0, base_loss, validations)


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
    with _run_conditions(model, config, resolution):
        loss = validate()
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The loss of '{model.name}' is not finite before training: nothing was trained. Try "
            "precision fp32 or bf16, or another VAE."
        )
    observer(Base(loss))
    return loss


@contextmanager
def _run_conditions(
    model: StableDiffusion, config: CalibrationConfig | TrainConfig, resolution: int
) -> Iterator[None]:
    """What every long computation needs around it: convolutions as products on the CPU, and a
    sentence when memory runs out (OutOfMemory)."""
    try:
        with convolutions_as_matmul(model.unet):
            yield
    except BaseException as error:
        if not _out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(
            f"The memory of {model.device} did not suffice. "
            f"Next to try: {_next_settings(config, resolution)}."
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)  # how the CPU's allocator says it
    )


def _next_settings(config: CalibrationConfig | TrainConfig, resolution: int) -> str:
    """The next three settings to try, in the order of what they cost."""
    advice = [] if config.gradient_checkpointing else ["gradient checkpointing on"]
    half = config.batch_size // 2
    if half and isinstance(config, TrainConfig):
        accumulation = -(-config.batch_size * config.accumulation // half)
        advice.append(f"batch size {half} with accumulation {accumulation}")
    elif half:
        advice.append(f"batch size {half}")
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
    source: Source | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    elsewhere: Sequence[Path] = (),
    disk: Disk = DISK,
    observer: Observer = ignore,
) -> Path:
    """Save a LoRA with its whole story in the metadata, and tell where it is.

    What cannot be written at `path` is written under a free name beside it, or in one of the
    folders `elsewhere`; weights too large for `dtype` are written in fp32. Raises OutputError when
    no place takes it.
    """
    if dtype != torch.float32 and overflows(lora, dtype):
        observer(Notice("Weights of the LoRA are too large for its precision: it is in fp32."))
        dtype = torch.float32

    def save(place: Path) -> Path:
        metadata = describe(
            lora,
            family=model.family,
            prediction=model.schedule.prediction,
            title=place.stem,
            model_name=model.name,
            taught=_taught(subject),
            steps=steps,
            calibration=calibration,
            training=training,
            source=source,
            clip_skip=model.prompts.clip_skip,
            max_tokens=model.prompts.max_tokens,
        )
        return save_lora(
            place, lora, model.family, metadata, dtype=dtype, overwrite=overwrite, disk=disk
        )

    try:
        saved = save(Path(path))
    except OutputError as error:
        saved = _save_elsewhere(save, other_places(Path(path), elsewhere), error)
        observer(Notice(f"{error} The LoRA is in '{saved}' instead."))
    observer(Saved(str(saved)))
    return saved


def _save_elsewhere(
    save: Callable[[Path], Path], places: Iterable[Path], first: OutputError
) -> Path:
    for place in places:
        with suppress(OutputError):
            return save(place)
        first.add_sentence(f"'{place}' failed too.")
    raise first


def _taught(subject: EncodedImages) -> Taught:
    """The pictures as the metadata tell of them; several views of a picture are one."""
    captions = subject.captions or (subject.prompt,) * len(subject)
    views = zip(captions, subject.repeats, strict=True)
    return Taught(
        subject.trigger or subject.prompt,
        tuple(dict(zip(subject.pictures, views, strict=True)).values()),
        subject.resolution,
        subject.digest,
    )
