"""The options of `cntlora train` and `cntlora calibrate`, and the settings they make."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..config import CalibrationConfig, DataConfig, RunConfig, TrainConfig
from ..presets import NONE, PRESETS, help_text, with_preset
from ..settings import Setting, read_settings, settings_of

# One option sets these of both calibration and training.
COMMON = tuple(n for n in settings_of(CalibrationConfig) if n in settings_of(TrainConfig))


def add_arguments(parser: argparse.ArgumentParser, *, training: bool) -> None:
    parser.set_defaults(
        trains=training,
        prior_loss="none",
        continue_from=None,
        continue_shared=False,
        resume=False,
    )
    _pictures(parser)
    start = parser.add_argument_group("start")
    add_settings(start, CalibrationConfig, _without(CalibrationConfig, COMMON))
    prior = _prior(parser)
    run = parser.add_argument_group("run")
    add_settings(run, TrainConfig, COMMON)
    if training:
        _training(parser, start, prior, run)
    else:
        add_settings(run, TrainConfig, ["validate_every"])
    _files(run)


def _pictures(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("pictures")
    data.add_argument(
        "--preset", choices=tuple(PRESETS), default=NONE, help=f"{help_text()} (default: {NONE})"
    )
    data.add_argument(
        "--images",
        required=True,
        metavar="DIR",
        help="3-20 pictures; captions in .txt files beside them",
    )
    data.add_argument(
        "--masks",
        metavar="DIR",
        help="masks with the pictures' names, white where the subject is (with --masked)",
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
    data.add_argument(
        "--and-subject",
        nargs=3,
        action="append",
        default=[],
        metavar=("DIR", "TRIGGER", "CLASS"),
        help="another subject, learnt in the same run; may be given several times",
    )
    add_settings(data, DataConfig, settings_of(DataConfig))
    data.add_argument("--cache", metavar="DIR", help="keep encoded pictures here for the next run")
    data.add_argument("--validation-images", metavar="DIR", help="held-out pictures of the subject")


def _prior(parser: argparse.ArgumentParser) -> Any:
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
    add_settings(prior, RunConfig, ["class_count", "class_steps"])
    return prior


def _training(parser: argparse.ArgumentParser, start: Any, prior: Any, run: Any) -> None:
    # a class prompt alone is for calibration; in a graph a wire says that training reads it too
    add_settings(prior, RunConfig, ["prior_loss"], prior_loss="none")
    start.add_argument(
        "--continue-from", metavar="FILE", help="train on from this LoRA, with its ranks"
    )
    add_settings(start, RunConfig, ["continue_shared"])
    loop = parser.add_argument_group("training")
    add_settings(loop, TrainConfig, _without(TrainConfig, COMMON))
    add_settings(run, RunConfig, ["checkpoint_every"])
    run.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, where there is one"
    )


def _files(run: Any) -> None:
    run.add_argument("--output", required=True, metavar="FILE.safetensors")
    run.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    add_settings(run, RunConfig, ["save_precision"])
    run.add_argument(
        "--events", metavar="FILE.jsonl", help="write what happens, one JSON object a line"
    )


def add_settings(group: Any, config: type[Any], names: Iterable[str], **defaults: Any) -> None:
    """An option for each of a settings class's fields that is named."""
    for name in names:
        known = settings_of(config)[name]
        _add(group, replace(known, default=defaults.get(name, known.default)))


def _add(group: Any, setting: Setting) -> None:
    option = f"--{setting.name.replace('_', '-')}"
    shown = f"{setting.text} (default: {setting.shown_default})".replace("%", "%%")
    common = {"default": setting.default, "help": shown}
    if setting.kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
    elif setting.choices:
        group.add_argument(option, choices=setting.choices, **common)
    else:
        metavar = setting.unit.upper() or ("N" if setting.kind is int else "X")
        kind = str if setting.auto else setting.kind
        group.add_argument(option, type=kind, metavar=metavar, **common)


def _without(config: type[Any], names: Iterable[str]) -> list[str]:
    return [name for name in settings_of(config) if name not in set(names)]


def settings_from(kind: type[Any], args: argparse.Namespace, **more: Any) -> Any:
    """The settings of a class as the options and the preset say. Raises SettingError."""
    known = settings_of(kind)
    said = read_settings(kind, {n: v for n, v in vars(args).items() if n in known} | more)
    return with_preset(said, getattr(args, "preset", NONE))
