"""What a run is made from and with: a checkpoint of another is not resumed."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import CalibrationConfig, DataConfig, TrainConfig, to_dict

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion
    from .inputs import Inputs

OPTIONS = ("prior", "class_prompt", "class_count", "continue_from", "continue_shared", "precision")


def made_from(args: argparse.Namespace, model: StableDiffusion, inputs: Inputs) -> dict[str, Any]:
    from ..model.fingerprint import fingerprint

    held_out = inputs.held_out if args.validate_every else None
    return {
        **{name: getattr(args, name) for name in OPTIONS},
        "checkpoint": model.name,
        "checkpoint's content": fingerprint(model)[:16],
        "prediction": model.schedule.prediction,
        "clip skip": model.prompts.clip_skip,
        "max tokens": model.prompts.max_tokens,
        "pictures": inputs.subject.digest,
        "class pictures": _digest(args.class_images),
        "validation": held_out and [held_out.digest, *held_out.names],
        "prompt": inputs.subject.prompt,
    }


def made_with(
    data: DataConfig, calibration: CalibrationConfig, training: TrainConfig
) -> dict[str, Any]:
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


def _digest(folder: str | None) -> str | None:
    """Of the pictures there."""
    if not folder:
        return None
    from ..data.folder import picture_files

    digest = hashlib.sha256()
    for picture in picture_files(folder):
        for path in picture.sources:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
