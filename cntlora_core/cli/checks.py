"""What `cntlora train` and `cntlora calibrate` refuse or tell before the first pass."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import CalibrationConfig, DataConfig, RunConfig, TrainConfig
from ..data.captions import has_words
from ..data.folder import counted
from ..effects import class_matters, without_effect_in_calibration, without_effect_in_data
from ..errors import SettingError
from ..files import Disk, check_output, check_space
from .options import settings_from

if TYPE_CHECKING:
    from ..lora.adapter import LoRA
    from ..model.loader import StableDiffusion
    from ..training.resume import RunSnapshots


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused before the model is loaded."""
    if args.prior_loss in ("images", "base") and not args.class_prompt:
        raise SettingError(
            f"--prior-loss {args.prior_loss} needs --class-prompt: say the class without the "
            "trigger, e.g. 'a cat'."
        )
    if args.class_images and not args.class_prompt:
        raise SettingError(
            "--class-images needs --class-prompt: say what the pictures show, e.g. 'a cat'."
        )
    from ..data.folder import picture_files
    from ..lora.file import read_lora
    from ..training.optimizers import optional_optimizer

    for folder in (args.images, args.validation_images, args.class_images):
        if folder:
            picture_files(folder)
    if args.continue_from:
        read_lora(args.continue_from)
    if args.trains:
        optional_optimizer(args.optimizer)


def class_preserved(args: argparse.Namespace) -> bool:
    """Whether calibration preserves the class."""
    calibration = settings_from(CalibrationConfig, args)
    matters = class_matters(calibration, continued=bool(args.continue_from))
    return bool(args.class_prompt) and matters


def without_effect(
    args: argparse.Namespace, data: DataConfig, calibration: CalibrationConfig
) -> list[str]:
    """Options that do nothing beside the others, a sentence each."""
    preserved, trained = class_preserved(args), args.prior_loss == "images"
    how = settings_from(RunConfig, args)
    drawn = [
        (
            bool(asked) and (bool(args.class_images) or not (preserved or trained)),
            f"--{name} has no effect: the model draws no pictures of the class.",
        )
        for name, asked in (("class-count", how.class_count), ("class-steps", how.class_steps))
    ]
    rules = [
        (
            bool(args.class_prompt) and not preserved and args.prior_loss in ("none", "masked"),
            "--class-prompt has no effect here: nothing is calibrated that would preserve the "
            "class. Add --prior-loss images or --prior-loss base.",
        ),
        *drawn,
        (
            bool(args.class_images) and not preserved and not trained,
            "--class-images has no effect: nothing asks for pictures of the class.",
        ),
        (
            bool(args.masks) and not data.masked,
            "--masks has no effect without --masked.",
        ),
        (
            bool(args.validation_images) and not args.validate_every,
            "--validation-images has no effect with --validate-every 0.",
        ),
        (
            not data.hold_out and (bool(args.validation_images) or not args.validate_every),
            "--no-hold-out has no effect: nothing is held out of these pictures anyway.",
        ),
        (
            args.continue_shared and not args.continue_from,
            "--continue-shared has no effect without --continue-from.",
        ),
    ]
    return [
        *(text for holds, text in rules if holds),
        *without_effect_in_data(data),
        *without_effect_in_calibration(
            calibration, continued=bool(args.continue_from), has_class=preserved
        ),
    ]


def check_outputs(args: argparse.Namespace, disk: Disk) -> tuple[Path, bool, RunSnapshots | None]:
    """Where the LoRA goes, whether it may replace what is there, and the checkpoints. Raises
    OutputError for what could not be written in the end."""
    from ..training.resume import RunSnapshots, state_path

    state = state_path(Path(args.output))
    checkpoints = None
    if args.trains:
        how = {"resume": args.resume, "overwrite": args.overwrite, "disk": disk}
        checkpoints = RunSnapshots(state, {}, args.checkpoint_every, **how)
        check_output(args.output, overwrite=True, beside=[state])
        checkpoints.check()
    # What an interrupted run wrote is replaced by the run that goes on.
    overwrite = args.overwrite or (args.resume and state.is_file())
    if args.events:  # --resume goes on with them too, wherever the run was stopped
        check_output(args.events, overwrite=overwrite or args.resume, suffix=".jsonl")
    return check_output(args.output, overwrite=overwrite), overwrite, checkpoints


def check_room(
    args: argparse.Namespace,
    output: Path,
    model: StableDiffusion,
    lora: LoRA | None,
    calibration: CalibrationConfig,
    training: TrainConfig,
) -> None:
    """Space for the LoRA, and its checkpoints where there will be some. Raises OutputError."""
    from ..devices import DTYPES
    from ..training.state_size import parameters_of, state_bytes

    parameters = parameters_of(model, calibration, lora)
    needed, what = parameters * DTYPES[args.save_precision].itemsize, "the LoRA"
    if args.trains and 0 < args.checkpoint_every <= training.steps:  # two while one is written
        state = state_bytes(model, calibration, training, lora)
        needed, what = needed + 2 * state, "the LoRA with its checkpoints"
    check_space(output, needed, what)


def uncalled(captions: Sequence[str], prompt: str, trigger: str) -> list[str]:
    """A sentence where captions stand in the place of a prompt whose words they lack, and nobody
    named a trigger to put in front of them."""
    lacking = [text for text in captions if not has_words(text, prompt)]
    if trigger.strip() or not lacking:
        return []
    are = counted(len(lacking), "caption is", "captions are")
    return [
        f"{are} read in place of the prompt '{prompt}': what they show will not answer to its "
        "words. Give --trigger, or --no-use-captions."
    ]
