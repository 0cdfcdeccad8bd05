"""`cntlora train` and `cntlora calibrate`: a folder of pictures in, a LoRA file out."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import (
    CalibrationConfig,
    DataConfig,
    TrainConfig,
    to_dict,
)
from ..errors import CNTLoRAError, Interrupted, SettingError
from ..events import Done, Observer, ignore
from .console import Console, EventFile, broadcast
from .interrupts import Interrupts
from .options import CLASS_STEPS, settings_from

if TYPE_CHECKING:
    from ..data.batches import NoisedSet
    from ..data.dataset import EncodedImages
    from ..lora.adapter import LoRA
    from ..lora.metadata import Source
    from ..model.loader import StableDiffusion
    from ..run import RunResult
    from ..training.prior_loss import PriorLoss
    from ..training.resume import RunSnapshots


def run_train(args: argparse.Namespace, load: Any) -> None:
    """Everything `train` does. `load(args, device, observer)` gives the model."""
    data = settings_from(DataConfig, args)
    calibration = settings_from(CalibrationConfig, args)
    training = settings_from(TrainConfig, args)
    _check(args)
    from ..calibration.calibrate import continued
    from ..data.dataset import read_subject, with_validation
    from ..defaults import resolve
    from ..devices import DTYPES, pick_device
    from ..distributed import local_device, process_group
    from ..files import check_output
    from ..run import run_training, run_untrained, save_run
    from ..training.resume import state_path
    from ..training.validation import validation_loss

    going_on = args.resume and state_path(Path(args.output)).is_file()
    overwrite = args.overwrite or going_on  # the interrupted run wrote it
    output = check_output(args.output, overwrite=overwrite)
    device = local_device(pick_device(args.device))
    with ExitStack() as stack:
        observer: Observer = stack.enter_context(Interrupts())
        group = stack.enter_context(process_group(device))
        if group.rank == 0:
            console = stack.enter_context(Console())
            observer = broadcast(console, observer)
        if args.events and group.rank == 0:
            events = check_output(args.events, overwrite=overwrite, suffix=".jsonl")
            observer = broadcast(stack.enter_context(EventFile(events)), observer)
        model = load(args, device, observer)
        source, source_lora = _source(args, model)
        cache = _cache(args, model)
        words = (args.trigger, args.class_name)
        subject = read_subject(
            model, args.images, args.prompt, data, words=words, cache=cache, observer=observer
        )
        held_out = subject
        if args.validation_images:
            held_out = read_subject(
                model,
                args.validation_images,
                args.prompt,
                data,
                words=words,
                cache=cache,
                observer=observer,
            )
        elif args.validate_every and data.hold_out:
            subject, held_out = with_validation(subject)
        if args.trains:
            training = resolve(training, model.name, args.init, subject.picture_count, observer)
            if group.rank == 0:
                console.total_steps = training.steps
        preserve, prior = _priors(args, model, subject, data, observer)
        model.drop_encoders()
        checkpoints = _checkpoints(args, output, subject, calibration, training, data, model)

        kept: list[Path] = []

        def save(run: RunResult, tell: Observer) -> None:
            if group.rank == 0 and (run.steps or not args.trains):
                kept.append(output)
                save_run(
                    output,
                    run.lora,
                    model,
                    subject,
                    steps=run.kept_step,
                    calibration=calibration,
                    source=source,
                    training=training if args.trains else None,
                    dtype=DTYPES[args.save_precision],
                    overwrite=overwrite,
                    observer=tell,
                )

        validate = None
        if args.validate_every:
            validate = validation_loss(model, held_out, args.batch_size, group)
        try:
            start = continued(source_lora) if source_lora else None
            if args.trains:
                run = run_training(
                    model,
                    subject,
                    calibration,
                    training,
                    preserve=preserve,
                    prior=prior,
                    start=start,
                    validate=validate,
                    checkpoints=checkpoints,
                    on_stop=lambda run: save(run, ignore),
                    observer=observer,
                    group=group,
                )
            else:
                run = run_untrained(
                    model,
                    subject,
                    calibration,
                    preserve=preserve,
                    validate=validate,
                    observer=observer,
                    group=group,
                )
        except CNTLoRAError as error:
            error.args = (_with_location(error, kept, checkpoints),)
            raise
        save(run, observer)
        if group.rank:
            return
        if checkpoints:
            checkpoints.remove()
        result = {
            "lora": str(output),
            "steps": run.steps,
            "kept": run.kept_step,
            "loss": _loss_at(run),
        }
        observer(Done(result))
    sys.stdout.write(json.dumps(result) + "\n")


def _check(args: argparse.Namespace) -> None:
    if args.prior != "none" and not args.class_prompt:
        raise SettingError(
            f"--prior {args.prior} needs --class-prompt: say the class without the trigger, e.g. "
            "'a cat'."
        )
    if args.class_images and not args.class_prompt:
        raise SettingError(
            "--class-images needs --class-prompt: say what the pictures show, e.g. 'a cat'."
        )
    if not 1 <= args.class_count <= 1000:
        raise SettingError(f"class-count is {args.class_count}: it must be between 1 and 1000.")
    if args.save_every < 0:
        raise SettingError(f"save-every is {args.save_every}: it must be 0 (never) or more.")


def _source(args: argparse.Namespace, model: StableDiffusion) -> tuple[Source | None, LoRA | None]:
    """The LoRA to go on from, and what the metadata will say of it."""
    if not args.continue_from:
        return None, None
    from ..lora.file import load_lora
    from ..lora.metadata import Source
    from ..lora.targets import ALL, find_projections

    lora, _ = load_lora(args.continue_from, find_projections(model.unet, ALL), model.family)
    return Source.of(args.continue_from), lora


def _cache(args: argparse.Namespace, model: StableDiffusion) -> Any:
    from ..data.latent_cache import LatentCache

    return LatentCache(args.cache, model.vae) if args.cache else None


def _priors(
    args: argparse.Namespace,
    model: StableDiffusion,
    subject: EncodedImages,
    data: DataConfig,
    observer: Observer,
) -> tuple[NoisedSet | None, PriorLoss | None]:
    """What calibration preserves, and the second loss of training."""
    if not args.class_prompt:
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


def _checkpoints(
    args: argparse.Namespace,
    output: Path,
    subject: EncodedImages,
    calibration: CalibrationConfig,
    training: TrainConfig,
    data: DataConfig,
    model: StableDiffusion,
) -> RunSnapshots | None:
    if not (args.save_every or args.resume):
        return None
    from ..training.resume import RunSnapshots, state_path

    identity = {
        **{
            name: getattr(args, name)
            for name in ("prior", "class_prompt", "class_count", "continue_from", "precision")
        },
        "checkpoint": model.name,
        "prediction": model.schedule.prediction,
        "pictures": subject.digest,
        "prompt": subject.prompt,
        **{f"data {name}": value for name, value in asdict(data).items()},
        **{f"calibration {name}": value for name, value in to_dict(calibration).items()},
        # More steps may be asked for, unless the learning rate depends on their number.
        **{
            k: v
            for k, v in to_dict(training).items()
            if k != "steps" or training.schedule != "constant"
        },
    }
    return RunSnapshots(state_path(output), identity, args.save_every, args.resume)


def _with_location(error: CNTLoRAError, kept: list[Path], checkpoints: RunSnapshots | None) -> str:
    """The error, and where the work is."""
    text = str(error)
    if kept:
        text += f" What was trained is in '{kept[0]}'."
    elif isinstance(error, Interrupted):
        text += " No step was finished."
    if isinstance(error, Interrupted) and checkpoints:
        text += " The same command with --resume goes on."
    return text


def _loss_at(run: RunResult) -> float | None:
    """The validation loss of the weights that were kept."""
    return dict(run.validations).get(run.kept_step)
