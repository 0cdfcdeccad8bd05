"""What a run is made from and with: a checkpoint of another is not resumed."""

from __future__ import annotations

import argparse
import hashlib
from typing import TYPE_CHECKING, Any

from ..config import CalibrationConfig, DataConfig, TrainConfig

if TYPE_CHECKING:
    from ..distributed import Group
    from ..model.loader import StableDiffusion
    from .inputs import Inputs

OPTIONS = (
    "prior_loss",
    "class_prompt",
    "class_count",
    "class_steps",
    "continue_from",
    "continue_shared",
    "precision",
)


def identity_of(
    args: argparse.Namespace,
    model: StableDiffusion,
    inputs: Inputs,
    data: DataConfig,
    calibration: CalibrationConfig,
    training: TrainConfig,
    group: Group,
) -> dict[str, Any]:
    from ..training.identity import run_identity

    others = {name: getattr(args, name) for name in OPTIONS}
    others["class pictures"] = _digest(args.class_images)
    # Each has a batch of its own. (One alone has nothing to tell: it had not before this was told.)
    others["processes"] = group.size if group.size > 1 else None
    held_out = inputs.held_out if args.validate_every else None
    return run_identity(model, inputs.subject, held_out, [data], calibration, training, **others)


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
