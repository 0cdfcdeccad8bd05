"""`cntlora train` and `cntlora calibrate`: a folder of pictures in, a LoRA file out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import (
    CalibrationConfig,
    DataConfig,
    TrainConfig,
    to_dict,
)
from ..errors import CNTLoRAError
from ..events import Done, Notice, Observer, ignore
from ..files import DISK, Disk
from .checks import check_arguments, check_outputs, check_room, class_used, without_effect
from .console import Console, EventFile, broadcast, print_json
from .interrupts import Interrupts
from .keeper import Keeper
from .options import CLASS_STEPS, settings_from

if TYPE_CHECKING:
    from ..data.batches import NoisedSet
    from ..data.encoded import EncodedImages
    from ..distributed import Group
    from ..lora.adapter import LoRA
    from ..lora.metadata import Source
    from ..model.loader import StableDiffusion
    from ..run import RunResult
    from ..training.prior_loss import PriorLoss


def run_train(args: argparse.Namespace, load: Any, disk: Disk = DISK) -> None:
    """Everything `train` does. `load(args, device, observer)` gives the model."""
    data = settings_from(DataConfig, args)
    calibration = settings_from(CalibrationConfig, args)
    training = settings_from(TrainConfig, args)
    check_arguments(args)
    from ..defaults import resolve
    from ..devices import DTYPES, pick_device
    from ..distributed import local_device, process_group

    output, overwrite, checkpoints = check_outputs(args, disk)
    device = local_device(pick_device(args.device))
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        group = stack.enter_context(process_group(device))
        tell = _reports(args, stack) if group.rank == 0 else ignore
        observer = broadcast(tell, interrupts)
        model = load(args, device, observer)
        for text in without_effect(args, calibration):
            observer(Notice(text))
        source, lora = _source(args, model)
        subject, held_out = _pictures(args, model, data, observer)
        if args.trains:
            if args.continue_from and training.optimizer == "auto":
                training = replace(training, optimizer="adamw")  # a LoRA file holds no metric
            training = resolve(training, model.name, args.init, subject.picture_count, observer)
        if checkpoints:
            held = held_out if args.validate_every else None
            made_from = _identity(args, model, subject, held)
            checkpoints.identity = made_from | _settings(data, calibration, training)
            checkpoints.read()  # refuses another run's before anything is drawn or measured
        preserve, prior = _priors(args, model, subject, data, observer)
        model.drop_encoders()
        check_room(args, output, model, lora, bool(checkpoints))
        story = {
            "model": model,
            "subject": subject,
            "calibration": calibration,
            "training": training if args.trains else None,
            "source": source,
            "dtype": DTYPES[args.save_precision],
        }
        keeper = Keeper(output, story, args.trains, overwrite, checkpoints, tell, disk)
        shared = {
            "preserve": preserve,
            "validate": _validation(args, model, held_out, group),
            "observer": observer,
            "group": group,
        }
        try:
            run = _run(args, keeper, prior, lora, shared)
            interrupts.finish()
            if group.rank:
                return
            keeper.keep(run)
        except CNTLoRAError as error:
            if group.rank == 0:
                keeper.locate(error)
            raise
        if checkpoints:
            checkpoints.remove()
        result = {
            "lora": str(keeper.saved),
            "steps": run.steps,
            "kept": run.kept_step,
            "loss": _loss_at(run),
        }
        tell(Done(result))
    print_json(result)


def _run(
    args: argparse.Namespace,
    keeper: Keeper,
    prior: PriorLoss | None,
    lora: LoRA | None,
    shared: dict[str, Any],
) -> RunResult:
    from ..calibration.calibrate import continued
    from ..run import run_training, run_untrained

    model, subject = keeper.story["model"], keeper.story["subject"]
    calibration, training = keeper.story["calibration"], keeper.story["training"]
    if not args.trains:
        return run_untrained(model, subject, calibration, **shared)
    return run_training(
        model,
        subject,
        calibration,
        training,
        prior=prior,
        start=continued(lora) if lora else None,
        checkpoints=keeper.checkpoints,
        on_stop=keeper.keep if shared["group"].rank == 0 else None,
        **shared,
    )


def _reports(args: argparse.Namespace, stack: ExitStack) -> Observer:
    """The console and the file of events; neither stops a run."""
    console = stack.enter_context(Console())
    if not args.events:
        return console
    events = stack.enter_context(EventFile(args.events, console, append=args.resume))
    return broadcast(console, events)


def _source(args: argparse.Namespace, model: StableDiffusion) -> tuple[Source | None, LoRA | None]:
    """The LoRA to go on from, and what the metadata will say of it."""
    if not args.continue_from:
        return None, None
    from ..lora.file import load_lora
    from ..lora.metadata import Source
    from ..lora.targets import ALL, find_projections

    lora, _ = load_lora(
        args.continue_from,
        find_projections(model.unet, ALL),
        model.family,
        shared=args.continue_shared,
    )
    return Source.of(args.continue_from), lora


def _pictures(
    args: argparse.Namespace, model: StableDiffusion, data: DataConfig, observer: Observer
) -> tuple[EncodedImages, EncodedImages]:
    """What to train on, of --images and every --and-subject, and what to validate with."""
    from ..data.concepts import join_concepts
    from ..data.dataset import read_subject
    from ..data.encoded import with_validation
    from ..data.latent_cache import LatentCache

    cache = LatentCache(args.cache, *model.pictures.modules) if args.cache else None

    def read(folder: str, trigger: str, class_name: str, masks: str | None = None) -> EncodedImages:
        words = (trigger, class_name)
        return read_subject(
            model,
            folder,
            args.prompt,
            data,
            words=words,
            masks=masks,
            cache=cache,
            observer=observer,
        )

    parts = [read(args.images, args.trigger, args.class_name, args.masks)]
    parts += [read(*other) for other in args.and_subject]
    subject = join_concepts(parts, observer=observer)
    if args.validation_images:
        return subject, read(args.validation_images, args.trigger, args.class_name)
    if args.validate_every and data.hold_out:
        return with_validation(subject)
    return subject, subject


def _validation(
    args: argparse.Namespace, model: StableDiffusion, held_out: EncodedImages, group: Group
) -> Callable[[], float] | None:
    from ..training.validation import validation_loss

    if not args.validate_every:
        return None
    return validation_loss(model, held_out, args.batch_size, group)


def _priors(
    args: argparse.Namespace,
    model: StableDiffusion,
    subject: EncodedImages,
    data: DataConfig,
    observer: Observer,
) -> tuple[NoisedSet | None, PriorLoss | None]:
    """What calibration preserves, and the second loss of training."""
    if not class_used(args):
        return None, None
    from ..data.class_images import PRIOR_PICTURES, PRIOR_STEPS, class_images, class_noised
    from ..data.dataset import read_subject
    from ..model.conditioning import encode_prompts
    from ..training.prior_loss import BasePrediction, ClassImages

    if args.class_images:
        drawn = read_subject(
            model,
            args.class_images,
            args.class_prompt,
            data,
            words=("", args.class_name),
            observer=observer,
        )
    else:
        many = args.prior == "images"
        drawn = class_images(
            model,
            args.class_prompt,
            subject.resolution,
            count=args.class_count if many else PRIOR_PICTURES,
            steps=CLASS_STEPS if many else PRIOR_STEPS,
            folder=Path(args.cache) if args.cache else None,
            observer=observer,
        )
    side = (subject.resolution, subject.resolution)
    prior: dict[str, Any] = {
        "none": lambda: None,
        "images": lambda: ClassImages(drawn),
        "base": lambda: BasePrediction(encode_prompts(model, [args.class_prompt], size=side)),
    }
    return class_noised(model, drawn), prior[args.prior]()


def _identity(
    args: argparse.Namespace,
    model: StableDiffusion,
    subject: EncodedImages,
    held_out: EncodedImages | None,
) -> dict[str, Any]:
    """What a run is made from: a checkpoint of another is not resumed."""
    from ..model.fingerprint import fingerprint

    options = (
        "prior",
        "class_prompt",
        "class_count",
        "continue_from",
        "continue_shared",
        "precision",
    )
    return {
        **{name: getattr(args, name) for name in options},
        "checkpoint": model.name,
        "checkpoint's content": fingerprint(model)[:16],
        "prediction": model.schedule.prediction,
        "clip skip": model.prompts.clip_skip,
        "max tokens": model.prompts.max_tokens,
        "pictures": subject.digest,
        "validation": held_out and [held_out.digest, *held_out.names],
        "prompt": subject.prompt,
    }


def _settings(
    data: DataConfig, calibration: CalibrationConfig, training: TrainConfig
) -> dict[str, Any]:
    """What a run is made with."""
    return {
        **{f"data {name}": value for name, value in asdict(data).items()},
        **{f"calibration {name}": value for name, value in to_dict(calibration).items()},
        # More steps may be asked for, unless the learning rate depends on their number.
        **{
            k: v
            for k, v in to_dict(training).items()
            if k != "steps" or training.schedule != "constant"
        },
    }


def _loss_at(run: RunResult) -> float | None:
    """The validation loss of the weights that were kept."""
    return dict(run.validations).get(run.kept_step)
