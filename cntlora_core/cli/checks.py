"""What `cntlora train` and `cntlora calibrate` refuse before the first pass."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import CalibrationConfig
from ..effects import class_matters, without_effect_in_calibration
from ..errors import SettingError
from ..files import Disk, check_output, check_space
from .options import CLASS_COUNT, settings_from

if TYPE_CHECKING:
    from ..lora.adapter import LoRA
    from ..model.loader import StableDiffusion
    from ..training.resume import RunSnapshots


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused before the model is loaded."""
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


def class_used(args: argparse.Namespace) -> bool:
    """Whether anything asks for the class: calibration, to preserve it, or the prior loss."""
    if not args.class_prompt:
        return False
    calibration = settings_from(CalibrationConfig, args)
    preserved = class_matters(calibration, continued=bool(args.continue_from))
    return preserved or args.prior != "none"


def without_effect(args: argparse.Namespace, calibration: CalibrationConfig) -> list[str]:
    """Options that do nothing beside the others, a sentence each."""
    used, drawn = class_used(args), args.prior == "images" and not args.class_images
    rules = [
        (
            bool(args.class_prompt) and not used,
            "--class-prompt has no effect here: nothing is calibrated that would preserve the "
            "class. Add --prior images or --prior base.",
        ),
        (
            args.class_count != CLASS_COUNT and not drawn,
            "--class-count has no effect: pictures are drawn for --prior images without "
            "--class-images.",
        ),
        (
            bool(args.validation_images) and not args.validate_every,
            "--validation-images has no effect with --validate-every 0.",
        ),
        (
            args.continue_shared and not args.continue_from,
            "--continue-shared has no effect without --continue-from.",
        ),
        (
            bool(args.class_images) and not used,
            "--class-images has no effect: nothing asks for the class.",
        ),
    ]
    continued = bool(args.continue_from)
    return [text for holds, text in rules if holds] + without_effect_in_calibration(
        calibration, continued=continued, has_class=used
    )


def check_outputs(args: argparse.Namespace, disk: Disk) -> tuple[Path, bool, RunSnapshots | None]:
    """Where the LoRA goes, whether it may replace what is there, and the checkpoints. Raises
    OutputError for what could not be written in the end."""
    from ..training.resume import RunSnapshots, state_path

    state = state_path(Path(args.output))
    checkpoints = None
    if args.save_every or args.resume:
        checkpoints = RunSnapshots(
            state, {}, args.save_every, args.resume, overwrite=args.overwrite, disk=disk
        )
        check_output(args.output, overwrite=True, beside=[state])
        checkpoints.check()
    # What an interrupted run wrote is replaced by the run that goes on.
    overwrite = args.overwrite or (args.resume and state.is_file())
    if args.events:  # --resume goes on with them too, wherever the run was stopped
        check_output(args.events, overwrite=overwrite or args.resume, suffix=".jsonl")
    return check_output(args.output, overwrite=overwrite), overwrite, checkpoints


# Of each parameter a checkpoint holds the weight, the best one, that before the last step and two
# moments, fp32.
STATE_BYTES = 5 * 4


def check_room(
    args: argparse.Namespace,
    output: Path,
    model: StableDiffusion,
    lora: LoRA | None,
    checkpoints: bool,
) -> None:
    from ..calibration.ranks import budget_of
    from ..devices import DTYPES
    from ..lora.adapter import parameter_count
    from ..lora.targets import find_projections

    parameters = (
        parameter_count(lora) if lora else budget_of(find_projections(model.unet), args.rank)
    )
    needed, what = parameters * DTYPES[args.save_precision].itemsize, "the LoRA"
    if checkpoints:  # while one is written, the one before it is there too
        needed, what = needed + 2 * parameters * STATE_BYTES, "the LoRA with its checkpoints"
    check_space(output, needed, what)
