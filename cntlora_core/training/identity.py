"""What a run is made from and with: only the same run goes on from its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import CalibrationConfig, DataConfig, TrainConfig, to_dict
from ..data.encoded import EncodedImages
from ..model.fingerprint import fingerprint

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


def run_identity(
    model: StableDiffusion,
    subject: EncodedImages,
    held_out: EncodedImages | None,
    data: Sequence[DataConfig],
    calibration: CalibrationConfig,
    training: TrainConfig,
    **others: Any,
) -> dict[str, Any]:
    """By name, in JSON's types. `data` is of each subject; `others` is what else the run depends
    on."""
    # More steps may be asked for, unless the learning rate depends on their number.
    follows = training.schedule != "constant" or 0 < training.warmup < 1
    changing = () if follows else ("steps",)
    return {
        **others,
        "checkpoint": model.name,
        "checkpoint's content": fingerprint(model)[:16],
        "prediction": model.schedule.prediction,
        "clip skip": model.prompts.clip_skip,
        "max tokens": model.prompts.max_tokens,
        "pictures": subject.digest,
        "validation": held_out and _shown(held_out),
        "prompt": subject.prompt,
        "trigger": subject.trigger,
        "captions": _digest("\n".join(subject.captions)),
        **({"repeats": [*subject.repeats]} if set(subject.repeats) != {1} else {}),
        **{
            f"data {name}" + f" of subject {n}" * (n > 1): value
            for n, one in enumerate(data, 1)
            for name, value in asdict(one).items()
        },
        **{f"calibration {name}": value for name, value in to_dict(calibration).items()},
        **{k: v for k, v in to_dict(training).items() if k not in changing},
    }


def _shown(held_out: EncodedImages) -> list[Any]:
    """All that a validation's loss depends on."""
    masks = [mask.flatten().tolist() for mask in held_out.masks or ()]
    words = json.dumps([held_out.prompt, held_out.captions, held_out.repeats, masks])
    return [held_out.digest, *held_out.names, held_out.resolution, _digest(words)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
