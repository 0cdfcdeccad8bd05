"""`cntlora train` and `cntlora calibrate`: a folder of pictures in, a LoRA file out."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import (
    EFFORTS,
    INITS,
    OPTIMIZERS,
    RANK_RULES,
    SCHEDULES,
    CalibrationConfig,
    DataConfig,
    TrainConfig,
    to_dict,
)
from .console import Console, EventFile, both
from .errors import CNTLoRAError, Interrupted, SettingError
from .events import Done, Observer, ignore
from .interrupts import Interrupts
from .projections import TARGETS

if TYPE_CHECKING:
    from .checkpoint import StableDiffusion
    from .prior_loss import PriorLoss
    from .runs import Personalised
    from .state_file import Checkpoints
    from .subject import Subject
    from .triples import Triples

PRIORS = ("none", "images", "base")
CLASS_COUNT = 32
CLASS_STEPS = 25  # these are trained on, so they are drawn with more care than those that are only measured

# What can be set of the data and the training, in the configs' own names.
DATA_HELP = {
    "resolution": "side of a square picture, area of others (default: the model's)",
    "buckets": "keep the pictures' shapes, else cut out the centred square",
    "upscale": "enlarge small pictures to the resolution",
    "random_crop": "several crops of each picture instead of the centre",
    "flip": "mirrored pictures too; not for faces or writing",
    "masked": "learn only what the alpha channel shows",
}
TRAIN_HELP = {
    "accumulation": "batches a step, for a larger batch in the same memory",
    "optimizer": "adamw, or where installed adamw8bit, prodigy (with --lr 1)",
    "weight_decay": "pull towards zero",
    "max_grad_norm": "longest gradient",
    "schedule": "of the learning rate",
    "warmup": "steps of rising learning rate",
    "min_snr_gamma": "weigh timesteps; 5 is usual, 0: off",
    "noise_offset": "learn darker and brighter pictures; 0.03 to 0.1, 0: off",
    "caption_dropout": "share of pictures trained without words",
    "prior_weight": "of the prior loss",
    "keep_best": "keep the weights of the lowest validation loss",
    "patience": "stop after so many validations without a better one; 0: never",
}
CHOICES: dict[str, tuple[str, ...]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


def add_arguments(parser: argparse.ArgumentParser, *, training: bool) -> None:
    data = parser.add_argument_group("pictures")
    data.add_argument(
        "--images", required=True, metavar="DIR", help="3-20 pictures; captions in .txt files beside them"
    )
    data.add_argument(
        "--prompt",
        required=True,
        help='what the pictures show, with a rare word for the subject: "a sks cat", or "a {trigger} {class}"',
    )
    data.add_argument("--trigger", default="", help="fills {trigger} in the prompt and the captions")
    data.add_argument("--class-name", default="", help="fills {class}")
    _settings(data, DataConfig, DATA_HELP)
    data.add_argument("--cache", metavar="DIR", help="keep encoded pictures here for the next run")
    start = parser.add_argument_group("start")
    start.add_argument("--init", choices=INITS, default=CalibrationConfig.init)
    start.add_argument("--rank", type=int, default=CalibrationConfig.rank, help="mean rank (default: %(default)s)")
    start.add_argument("--rank-rule", choices=RANK_RULES, default=CalibrationConfig.rank_rule)
    start.add_argument(
        "--effort", choices=list(EFFORTS), default=CalibrationConfig.effort, help="how long target calibrates"
    )
    start.add_argument(
        "--targets",
        choices=TARGETS,
        default=CalibrationConfig.targets,
        help="layers that get an adapter; auto: with feed-forward for target and data ranks, but not in SDXL",
    )
    prior = parser.add_argument_group("what the model should keep knowing")
    prior.add_argument("--class-prompt", help='the class alone ("a cat"): calibration disturbs it as little as it can')
    prior.add_argument("--class-images", metavar="DIR", help="pictures of the class (default: the model draws them)")
    prior.add_argument("--class-count", type=int, default=CLASS_COUNT, help="pictures to draw (default: %(default)s)")
    parser.set_defaults(
        prior="none", steps=None if training else 0, lr=None, continue_from=None, save_every=0, resume=False
    )
    both_kinds = parser.add_argument_group("run")
    both_kinds.add_argument("--batch-size", type=int, default=TrainConfig.batch_size, help="of each process")
    both_kinds.add_argument("--gradient-checkpointing", action="store_true", help="far less memory, a third slower")
    if training:
        prior.add_argument(
            "--prior",
            choices=PRIORS,
            default="none",
            help="prior loss while training: on class images, or towards the base model's prediction (no images)",
        )
        start.add_argument("--continue-from", metavar="FILE", help="train on from this LoRA, with its ranks")
        loop = parser.add_argument_group("training")
        loop.add_argument("--steps", type=int, help="optimiser steps (default: by model and pictures)")
        loop.add_argument("--lr", type=float, help="learning rate (default: by model and start)")
        _settings(loop, TrainConfig, TRAIN_HELP)
        both_kinds.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="write a checkpoint")
        both_kinds.add_argument("--resume", action="store_true", help="go on from the checkpoint, where there is one")
    both_kinds.add_argument("--validation-images", metavar="DIR", help="held-out pictures of the subject")
    both_kinds.add_argument(
        "--train-on-all",
        action="store_true",
        help="without --validation-images: do not leave the last of 5 or more out",
    )
    both_kinds.add_argument(
        "--validate-every", type=int, default=TrainConfig.validate_every, metavar="STEPS", help="0: never"
    )
    both_kinds.add_argument("--output", required=True, metavar="FILE.safetensors")
    both_kinds.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    both_kinds.add_argument("--save-precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    both_kinds.add_argument("--events", metavar="FILE.jsonl", help="write what happens, one JSON object a line")


def _settings(group: Any, config: type[DataConfig] | type[TrainConfig], texts: dict[str, str]) -> None:
    """An option for each field that has a text, with the field's default."""
    for field in fields(config):
        if field.name not in texts:
            continue
        option, text, default = f"--{field.name.replace('_', '-')}", texts[field.name], field.default
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(option, action=action, default=default, help=f"{text} (default: {default})")
        else:
            kind = int if default is None else type(default)
            shown = text if default is None else f"{text} (default: {default})"
            group.add_argument(option, type=kind, default=default, choices=CHOICES.get(field.name), help=shown)


def _config(kind: type[Any], args: argparse.Namespace, **more: Any) -> Any:
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in vars(args).items() if name in known} | more)


def run_train(args: argparse.Namespace, load: Any) -> None:
    """Everything `train` does. `load(args, device)` gives the model."""
    data = _config(DataConfig, args)
    calibration = _config(CalibrationConfig, args)
    given = {name: value for name in ("steps", "lr") if (value := getattr(args, name)) is not None}
    training = _config(TrainConfig, args, **({"steps": TrainConfig.steps, "lr": TrainConfig.lr} | given))
    _check(args)
    from .calibration import continued
    from .defaults import default_lr, default_steps
    from .devices import DTYPES, pick_device
    from .distributed import local_device, process_group
    from .lora_file import check_output, load_lora
    from .projections import ALL, find_projections
    from .runs import personalise, read_subject, validation_loss, with_validation, write
    from .state_file import state_path

    going_on = args.resume and state_path(Path(args.output)).is_file()
    overwrite = args.overwrite or going_on  # the interrupted run wrote it
    output = check_output(args.output, overwrite=overwrite)
    device = local_device(pick_device(args.device))
    with ExitStack() as stack:
        observer: Observer = stack.enter_context(Interrupts())
        group = stack.enter_context(process_group(device))
        if group.rank == 0:
            console = stack.enter_context(Console())
            observer = both(console, observer)
        if args.events and group.rank == 0:
            events = check_output(args.events, overwrite=overwrite, suffix=".jsonl")
            observer = both(stack.enter_context(EventFile(events)), observer)
        model = load(args, device)
        cache = _cache(args, model)
        words = (args.trigger, args.class_name)
        subject = read_subject(model, args.images, args.prompt, data, words=words, cache=cache, observer=observer)
        held_out = subject
        if args.validation_images:
            held_out = read_subject(
                model, args.validation_images, args.prompt, data, words=words, cache=cache, observer=observer
            )
        elif args.validate_every and not args.train_on_all:
            subject, held_out = with_validation(subject)
        training = replace(
            training,
            steps=given.get("steps", default_steps(model.name, args.init, subject.picture_count)),
            lr=given.get("lr", default_lr(model.name, args.init)),
        )
        if group.rank == 0:
            console.total_steps = training.steps
        preserve, prior = _priors(args, model, subject, data, observer)
        model.drop_encoders()
        checkpoints = _checkpoints(args, output, subject, calibration, training, data, model)

        kept: list[Path] = []

        def save(run: Personalised, tell: Observer) -> None:
            if group.rank == 0 and (run.steps or not training.steps):
                kept.append(output)
                write(
                    output, run.lora, model, subject,
                    steps=run.kept, calibration=calibration, training=training if training.steps else None,
                    dtype=DTYPES[args.save_precision], overwrite=overwrite, observer=tell,
                )  # fmt: skip

        try:
            start = None
            if args.continue_from:
                start = continued(load_lora(args.continue_from, find_projections(model.unet, ALL), model.family)[0])
            run = personalise(
                model, subject, calibration, training,
                preserve=preserve, prior=prior, start=start,
                validate=validation_loss(model, held_out, args.batch_size, group) if args.validate_every else None,
                checkpoints=checkpoints, on_stop=lambda run: save(run, ignore), observer=observer, group=group,
            )  # fmt: skip
        except CNTLoRAError as error:
            error.args = (_told(error, kept, checkpoints),)
            raise
        save(run, observer)
        if group.rank:
            return
        if checkpoints:
            checkpoints.remove()
        result = {"lora": str(output), "steps": run.steps, "kept": run.kept, "loss": _loss_at(run)}
        observer(Done(result))
    sys.stdout.write(json.dumps(result) + "\n")


def _check(args: argparse.Namespace) -> None:
    if args.prior != "none" and not args.class_prompt:
        raise SettingError(
            f"--prior {args.prior} needs --class-prompt: say the class without the trigger, e.g. 'a cat'."
        )
    if args.class_images and not args.class_prompt:
        raise SettingError("--class-images needs --class-prompt: say what the pictures show, e.g. 'a cat'.")
    if not 1 <= args.class_count <= 1000:
        raise SettingError(f"class-count is {args.class_count}: it must be between 1 and 1000.")
    if args.save_every < 0:
        raise SettingError(f"save-every is {args.save_every}: it must be 0 (never) or more.")


def _cache(args: argparse.Namespace, model: StableDiffusion) -> Any:
    from .latent_cache import LatentCache

    return LatentCache(args.cache, model.vae) if args.cache else None


def _priors(
    args: argparse.Namespace, model: StableDiffusion, subject: Subject, data: DataConfig, observer: Observer
) -> tuple[Triples | None, PriorLoss | None]:
    """What calibration preserves, and the second loss of training."""
    if not args.class_prompt:
        return None, None
    from .conditioning import encode_prompts
    from .prior_loss import BasePrediction, ClassImages
    from .runs import PRIOR_PICTURES, PRIOR_STEPS, class_pictures, class_triples, read_subject

    if args.class_images:
        drawn = read_subject(model, args.class_images, args.class_prompt, data, observer=observer)
    else:
        many = args.prior == "images"
        drawn = class_pictures(
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
    return class_triples(model, drawn), prior[args.prior]()


def _checkpoints(
    args: argparse.Namespace,
    output: Path,
    subject: Subject,
    calibration: CalibrationConfig,
    training: TrainConfig,
    data: DataConfig,
    model: StableDiffusion,
) -> Checkpoints | None:
    if not (args.save_every or args.resume):
        return None
    from .state_file import Checkpoints, state_path

    identity = {
        **{
            name: getattr(args, name) for name in ("prior", "class_prompt", "class_count", "continue_from", "precision")
        },
        "checkpoint": model.name,
        "pictures": subject.digest,
        "prompt": subject.prompt,
        **{f"data {name}": value for name, value in asdict(data).items()},
        **{f"calibration {name}": value for name, value in to_dict(calibration).items()},
        # More steps may be asked for, unless the learning rate depends on their number.
        **{k: v for k, v in to_dict(training).items() if k != "steps" or training.schedule != "constant"},
    }
    return Checkpoints(state_path(output), identity, args.save_every, args.resume)


def _told(error: CNTLoRAError, kept: list[Path], checkpoints: Checkpoints | None) -> str:
    """The error, and where the work is."""
    text = str(error)
    if kept:
        text += f" What was trained is in '{kept[0]}'."
    elif isinstance(error, Interrupted):
        text += " No step was finished."
    if isinstance(error, Interrupted) and checkpoints:
        text += " The same command with --resume goes on."
    return text


def _loss_at(run: Personalised) -> float | None:
    """The validation loss of the weights that were kept."""
    return dict(run.validations).get(run.kept)
