"""The options of `cntlora train` and `cntlora calibrate`, and the settings they make."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ..config import (
    EFFORTS,
    INITS,
    OPTIMIZERS,
    RANK_RULES,
    SCHEDULES,
    TARGETS,
    CalibrationConfig,
    DataConfig,
    TrainConfig,
)

PRIORS = ("none", "images", "base")
CLASS_COUNT = 32
CLASS_STEPS = (
    25  # these are trained on, so they are drawn with more care than those that are only measured
)

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
        "--images",
        required=True,
        metavar="DIR",
        help="3-20 pictures; captions in .txt files beside them",
    )
    data.add_argument(
        "--prompt",
        required=True,
        help=(
            'what the pictures show, with a rare word for the subject: "a sks '
            'cat", or "a {trigger} {class}"'
        ),
    )
    data.add_argument(
        "--trigger", default="", help="fills {trigger} in the prompt and the captions"
    )
    data.add_argument("--class-name", default="", help="fills {class}")
    _settings(data, DataConfig, DATA_HELP)
    data.add_argument("--cache", metavar="DIR", help="keep encoded pictures here for the next run")
    start = parser.add_argument_group("start")
    start.add_argument("--init", choices=INITS, default=CalibrationConfig.init)
    start.add_argument(
        "--rank", type=int, default=CalibrationConfig.rank, help="mean rank (default: %(default)s)"
    )
    start.add_argument("--rank-rule", choices=RANK_RULES, default=CalibrationConfig.rank_rule)
    start.add_argument(
        "--effort",
        choices=list(EFFORTS),
        default=CalibrationConfig.effort,
        help="how long target calibrates",
    )
    start.add_argument(
        "--targets",
        choices=TARGETS,
        default=CalibrationConfig.targets,
        help="layers that get an adapter; auto: with feed-forward for target and data ranks, but "
        "not in SDXL",
    )
    prior = parser.add_argument_group("what the model should keep knowing")
    prior.add_argument(
        "--class-prompt",
        help='the class alone ("a cat"): calibration disturbs it as little as it can',
    )
    prior.add_argument(
        "--class-images",
        metavar="DIR",
        help="pictures of the class (default: the model draws them)",
    )
    prior.add_argument(
        "--class-count",
        type=int,
        default=CLASS_COUNT,
        help="pictures to draw (default: %(default)s)",
    )
    parser.set_defaults(
        prior="none",
        steps=None if training else 0,
        lr=None,
        continue_from=None,
        save_every=0,
        resume=False,
    )
    both_kinds = parser.add_argument_group("run")
    both_kinds.add_argument(
        "--batch-size", type=int, default=TrainConfig.batch_size, help="of each process"
    )
    both_kinds.add_argument(
        "--gradient-checkpointing", action="store_true", help="far less memory, a third slower"
    )
    if training:
        prior.add_argument(
            "--prior",
            choices=PRIORS,
            default="none",
            help="prior loss while training: on class images, or towards the base model's "
            "prediction (no images)",
        )
        start.add_argument(
            "--continue-from", metavar="FILE", help="train on from this LoRA, with its ranks"
        )
        loop = parser.add_argument_group("training")
        loop.add_argument(
            "--steps", type=int, help="optimiser steps (default: by model and pictures)"
        )
        loop.add_argument("--lr", type=float, help="learning rate (default: by model and start)")
        _settings(loop, TrainConfig, TRAIN_HELP)
        both_kinds.add_argument(
            "--save-every", type=int, default=0, metavar="STEPS", help="write a checkpoint"
        )
        both_kinds.add_argument(
            "--resume", action="store_true", help="go on from the checkpoint, where there is one"
        )
    both_kinds.add_argument(
        "--validation-images", metavar="DIR", help="held-out pictures of the subject"
    )
    both_kinds.add_argument(
        "--train-on-all",
        action="store_true",
        help="without --validation-images: do not leave the last of 5 or more out",
    )
    both_kinds.add_argument(
        "--validate-every",
        type=int,
        default=TrainConfig.validate_every,
        metavar="STEPS",
        help="0: never",
    )
    both_kinds.add_argument("--output", required=True, metavar="FILE.safetensors")
    both_kinds.add_argument(
        "--overwrite", action="store_true", help="replace an existing output file"
    )
    both_kinds.add_argument("--save-precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    both_kinds.add_argument(
        "--events", metavar="FILE.jsonl", help="write what happens, one JSON object a line"
    )


def _settings(
    group: Any, config: type[DataConfig] | type[TrainConfig], texts: dict[str, str]
) -> None:
    """An option for each field that has a text, with the field's default."""
    for field in fields(config):
        if field.name not in texts:
            continue
        option, text, default = (
            f"--{field.name.replace('_', '-')}",
            texts[field.name],
            field.default,
        )
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(
                option, action=action, default=default, help=f"{text} (default: {default})"
            )
        else:
            kind = int if default is None else type(default)
            shown = text if default is None else f"{text} (default: {default})"
            group.add_argument(
                option, type=kind, default=default, choices=CHOICES.get(field.name), help=shown
            )


def settings_from(kind: type[Any], args: argparse.Namespace, **more: Any) -> Any:
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in vars(args).items() if name in known} | more)
