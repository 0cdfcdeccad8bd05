"""Whole runs: pictures and a checkpoint in, a LoRA out. What the command line and the ComfyUI nodes share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .calibration import Calibration, calibrate, continued
from .conditioning import encode_prompts
from .config import CalibrationConfig, DataConfig, TrainConfig
from .convolutions import as_products
from .distributed import ALONE, Group
from .errors import NonFiniteError, OutOfMemory
from .events import Base, Notice, Observer, Saved, Status, Training, ignore
from .latent_cache import LatentCache
from .lora import Adapters, LoRA, attached
from .lora_file import save_lora
from .memory import checkpointed
from .metadata import describe
from .pictures import check_pictures, fill_words, find_pictures, with_words
from .prior_loss import PriorLoss
from .sampling import sample_latents
from .state_file import Checkpoints
from .subject import Subject, check_resolution, encode_subject
from .train import train
from .train_state import TrainState, start_state
from .triples import Triples, draw_triples, fixed_triples, mean_loss

if TYPE_CHECKING:
    from .checkpoint import StableDiffusion

PRIOR_PICTURES = 8
PRIOR_STEPS = 12  # enough for activations; nobody looks at these latents
PRIOR_SEED = 1000


def read_subject(
    model: StableDiffusion,
    folder: str | os.PathLike[str],
    prompt: str,
    data: DataConfig | None = None,
    *,
    words: tuple[str, str] = ("", ""),
    cache: LatentCache | None = None,
    observer: Observer = ignore,
) -> Subject:
    """A folder of pictures as the trainer reads it. `words` fill `{trigger}` and `{class}` in the prompt and the captions."""
    pictures = with_words(find_pictures(folder, observer), *words)
    for finding in check_pictures(pictures, check_resolution(model, data.resolution if data else None)):
        observer(Notice(finding))
    return encode_subject(model, pictures, fill_words(prompt, *words), data, cache=cache, observer=observer)


HOLD_OUT_FROM = 5  # pictures; with fewer each is needed for training


def with_validation(subject: Subject) -> tuple[Subject, Subject]:
    """What to train on and what to validate with, when nobody gave pictures for it: the last picture where there are 5 or
    more, else the same pictures for both."""
    return subject.hold_out() if subject.picture_count >= HOLD_OUT_FROM else (subject, subject)


def validation_loss(
    model: StableDiffusion, subject: Subject, batch_size: int, group: Group = ALONE
) -> Callable[[], float]:
    """The loss on the subject's pictures at fixed timesteps and noise, of the model as it stands when called."""
    triples = fixed_triples(subject, len(model.schedule))
    return lambda: mean_loss(model, triples, batch_size, group)


def class_pictures(
    model: StableDiffusion,
    prompt: str,
    resolution: int | None = None,
    *,
    count: int = PRIOR_PICTURES,
    steps: int = PRIOR_STEPS,
    guidance: float = 1.0,
    folder: Path | None = None,
    observer: Observer = ignore,
) -> Subject:
    """What the model itself draws for the class prompt, as a subject: for the prior loss and for C_p.

    With `folder` the latents are kept there, under a hash of the model and the request, and found again.
    """
    side = check_resolution(model, resolution)
    cache = LatentCache(folder, model.unet) if folder else None
    keys = [("class", prompt, side, steps, guidance, PRIOR_SEED + n) for n in range(count)]
    held = [found[0].to(model.device) for key in keys if cache and (found := cache.get(key))]
    if len(held) < count:
        observer(Status(f"Drawing {count} pictures of '{prompt}' to preserve"))
        latents = sample_latents(
            model,
            [prompt] * count,
            range(PRIOR_SEED, PRIOR_SEED + count),
            steps=steps,
            guidance=guidance,
            size=(side, side),
            observer=observer,
        )
        held = list(latents.float())
        for key, latent in zip(keys, held, strict=True) if cache else ():
            cache.put(key, latent, torch.zeros_like(latent))  # type: ignore[union-attr]
    rows = torch.zeros(count, dtype=torch.long)
    return Subject(
        names=tuple(f"drawn {n}" for n in range(count)),
        pictures=tuple(range(count)),
        mean=tuple(held),
        std=tuple(torch.zeros_like(latent) for latent in held),
        masks=None,
        repeats=(1,) * count,
        conditioning=encode_prompts(model, [prompt], size=(side, side))[rows],
        wordless=encode_prompts(model, [""], size=(side, side)),
        prompt=prompt,
        resolution=side,
        digest=hashlib.sha256(repr(keys).encode()).hexdigest(),
    )


def class_triples(model: StableDiffusion, pictures: Subject) -> Triples:
    """Class pictures at stratified timesteps, each once: their activations give the preservation constraint's C_p."""
    generator = torch.Generator().manual_seed(PRIOR_SEED)
    return draw_triples(pictures, len(pictures), len(model.schedule), generator)


@dataclass(frozen=True)
class Personalised:
    """A run as far as it went: the LoRA as calibrated, and as trained (the best weights, or the last; of step `kept`).

    `base_loss` is the untouched model's, None without a validation; `steps` were made.
    """

    start: Calibration
    lora: LoRA
    kept: int
    steps: int
    base_loss: float | None
    validations: list[tuple[int, float]]


def personalise(
    model: StableDiffusion,
    subject: Subject,
    calibration: CalibrationConfig,
    training: TrainConfig,
    *,
    preserve: Triples | None = None,
    prior: PriorLoss | None = None,
    start: Calibration | None = None,
    validate: Callable[[], float] | None = None,
    checkpoints: Checkpoints | None = None,
    on_stop: Callable[[Personalised], None] | None = None,
    observer: Observer = ignore,
    group: Group = ALONE,
) -> Personalised:
    """Calibrate, then train; or train on from `start`, with its own ranks. The base model is the same before and after.

    `preserve` feeds the calibration's preservation, which training keeps up (a resumed run measures it again); `prior` is a second loss
    on pictures. When training ends early, by a host's Cancel (an exception of `observer`), NaN or want of memory, nothing is lost: the
    checkpoint is written, `on_stop` gets the run as far as it went, and the exception goes on. Raises OutOfMemory with what to try next.
    """
    with as_products(model.unet):
        base_loss = validate() if validate else None
        if base_loss is not None:
            observer(Base(base_loss))
        saved = checkpoints.read() if checkpoints else None
        if start is None and (saved is None or preserve is not None):
            observer(Status(f"Calibrating ({calibration.init}) on {len(subject)} pictures"))
            start = calibrate(model, subject, calibration, prior=preserve, observer=observer, group=group)
        if saved:  # what to preserve is not in the file: it was measured again, to the same numbers
            start = continued(saved.lora, start.preservation if start else None)
        assert start is not None
        observer(start.report)
        with (
            attached(model.unet, start.lora, trainable=True) as adapters,
            checkpointed(model.unet, training.gradient_checkpointing),
        ):
            state = start_state(model, adapters, training)
            if saved:
                saved.restore(state)
            observer(Training(training.steps, state.step))

            preservation = start.preservation and start.preservation.on(model.device)

            def save(state: TrainState) -> None:
                if checkpoints and checkpoints.due(state.step) and group.rank == 0:
                    checkpoints.write(state)

            def result(best: bool) -> Personalised:
                weights, kept = state.weights(training) if best else (adapters.factors(), state.step)
                return Personalised(start, weights, kept, state.step, base_loss, state.validations)

            try:
                train(
                    model, subject, state, training,
                    prior=prior, preservation=preservation, validate=validate, save=save, observer=observer, group=group,
                )  # fmt: skip
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
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # how the CPU's allocator says it
    )


def _free(model: StableDiffusion, adapters: Adapters, training: TrainConfig, resolution: int) -> OutOfMemory:
    for parameter in adapters.parameters():
        parameter.grad = None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return OutOfMemory(
        f"The memory of {model.device} did not suffice. Next to try: {_next_settings(training, resolution)}."
    )


def _next_settings(training: TrainConfig, resolution: int) -> str:
    """The next three settings to try, in the order of what they cost."""
    advice = [] if training.gradient_checkpointing else ["gradient checkpointing on"]
    if training.batch_size > 1:
        half = training.batch_size // 2
        advice.append(f"batch size {half} with accumulation {-(-training.batch_size * training.accumulation // half)}")
    advice += ["precision bf16", f"a lower resolution than {resolution} px", "a lower rank"]
    return ", ".join(advice[:3])


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
        pictures=subject.picture_count,
        data_digest=subject.digest,
        steps=steps,
        calibration=calibration,
        training=training,
    )
    saved = save_lora(path, lora, model.family, metadata, dtype=dtype, overwrite=overwrite)
    observer(Saved(str(saved)))
    return saved
