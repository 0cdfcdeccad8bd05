"""Whole runs: pictures and a checkpoint in, a LoRA out. What the command line and the ComfyUI nodes share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .calibration import Calibration, calibrate, continued
from .conditioning import encode_prompts
from .config import CalibrationConfig, TrainConfig
from .errors import NonFiniteError
from .events import Base, Observer, Saved, Status, ignore
from .lora import LoRA, attached
from .lora_file import save_lora
from .memory import checkpointed
from .metadata import describe
from .sampling import sample_latents
from .schedule import stratified_timesteps
from .subject import Subject, check_resolution, encode_subject, find_pictures
from .train import train
from .triples import Triples, fixed_triples, mean_loss

if TYPE_CHECKING:
    from .checkpoint import StableDiffusion

PRIOR_PICTURES = 8
PRIOR_STEPS = 12  # enough for activations; nobody looks at these latents
PRIOR_SEED = 1000


def read_subject(
    model: StableDiffusion,
    folder: str | os.PathLike[str],
    prompt: str,
    *,
    resolution: int | None = None,
    observer: Observer = ignore,
) -> Subject:
    """A folder of pictures as the trainer reads it."""
    pictures = find_pictures(folder, observer)
    return encode_subject(model, pictures, prompt, resolution=resolution, observer=observer)


def validation_loss(model: StableDiffusion, subject: Subject, batch_size: int) -> Callable[[], float]:
    """The loss on the subject's pictures at fixed timesteps and noise, of the model as it stands when called."""
    triples = fixed_triples(subject, len(model.schedule))
    return lambda: mean_loss(model, triples, batch_size)


def class_prior(
    model: StableDiffusion,
    prompt: str,
    resolution: int | None = None,
    *,
    count: int = PRIOR_PICTURES,
    observer: Observer = ignore,
) -> Triples:
    """What the model already knows of the class: its own pictures for `prompt`, as latents, at stratified timesteps.

    Their activations give the preservation constraint's C_p without any class pictures on disk.
    """
    observer(Status(f"Drawing {count} pictures of '{prompt}' to preserve"))
    side = check_resolution(model, resolution)
    size = (side, side)
    latents = sample_latents(
        model,
        [prompt] * count,
        range(PRIOR_SEED, PRIOR_SEED + count),
        steps=PRIOR_STEPS,
        guidance=1.0,
        size=size,
        observer=observer,
    )
    generator = torch.Generator().manual_seed(PRIOR_SEED)
    t = stratified_timesteps(count, len(model.schedule), generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    rows = torch.zeros(count, dtype=torch.long)
    return Triples(latents, t, noise, encode_prompts(model, [prompt], size=size)[rows])


@dataclass(frozen=True)
class Personalised:
    """A finished run: the LoRA as calibrated and as trained, and its losses.

    `base_loss` is the untouched model's, None without a validation; `stopped` is the reason the training ended early with the last good weights, None when it ran to the end.
    """

    start: Calibration
    lora: LoRA
    steps: int
    base_loss: float | None
    validations: list[tuple[int, float]]
    stopped: NonFiniteError | None = None


def personalise(
    model: StableDiffusion,
    subject: Subject,
    calibration: CalibrationConfig,
    training: TrainConfig,
    *,
    prior: Triples | None = None,
    lora: LoRA | None = None,
    validate: Callable[[], float] | None = None,
    observer: Observer = ignore,
) -> Personalised:
    """Calibrate, then train; or train on from `lora`, with its own ranks. The base model is the same before and after."""
    base_loss = validate() if validate else None
    if base_loss is not None:
        observer(Base(base_loss))
    if lora is None:
        observer(Status(f"Calibrating ({calibration.init}) on {len(subject)} pictures"))
        start = calibrate(model, subject, calibration, prior=prior, observer=observer)
    else:
        start = continued(lora)
    observer(start.report)
    observer(Status(f"Training {training.steps} steps"))
    steps, stopped = 0, None
    validations: list[tuple[int, float]] = []
    recompute = checkpointed(model.unet, training.gradient_checkpointing)
    with attached(model.unet, start.lora, trainable=True) as adapters, recompute:
        try:
            result = train(model, subject, adapters, training, validate=validate, observer=observer)
            steps, validations = len(result.losses), result.validations
        except NonFiniteError as error:
            stopped, steps = error, max(0, error.step - 1)
        trained = adapters.factors()
    return Personalised(start, trained, steps, base_loss, validations, stopped)


def write(
    path: str | os.PathLike[str],
    lora: LoRA,
    model: StableDiffusion,
    subject: Subject,
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
        pictures=len(subject),
        data_digest=subject.digest,
        steps=steps,
        calibration=calibration,
        training=training,
    )
    saved = save_lora(path, lora, model.family, metadata, dtype=dtype, overwrite=overwrite)
    observer(Saved(str(saved)))
    return saved
