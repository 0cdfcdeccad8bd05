"""How long and how fast to train when nobody says.

For the miniature model the numbers were measured (benchmarks/learning_rate.py). For real families
the ordinary start takes what diffusers and kohya document for rank-4 LoRAs, 1e-4 and about 100
steps a picture. A calibrated start is scaled to unit response: its A x has variance 1, where the
ordinary one has |x| / r, about 5 for a normalised input of 320 channels and rank 4. Adam's steps
move B alike in both, so that the same change of the output takes 5 times the learning rate (derived
here, not measured on real checkpoints), and it starts nearer: half the steps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from .config import CALIBRATED, TrainConfig
from .events import Observer, Status, ignore

MINI_SD = "mini-sd"  # the embedded model's name
RESPONSE = 5.0
ORDINARY_LR = 1e-4
PRODIGY_LR = 1.0  # a factor on the rate that it finds by itself
VALIDATION_TIMESTEPS = 8  # of each picture that validates
VALIDATION_LOOKS = 2  # at two strengths (training/strength.py)
VALIDATION_SHARE = 0.1  # of a run's passes, where nobody asks for more


def resolve(
    config: TrainConfig,
    model: str,
    init: str,
    pictures: int,
    observer: Observer = ignore,
    *,
    share: float = 1.0,
    held_out: int = 0,
) -> TrainConfig:
    """The settings with a number wherever they say auto: by the model's name, the start, the
    optimiser and the number of pictures; steps are that `share` of the usual, and validations
    seldom enough that the `held_out` pictures take a tenth of the run at most. What was chosen is
    told."""
    chosen: dict[str, Any] = {}
    if not config.steps:
        chosen["steps"] = round(share * default_steps(model, init, pictures))
    optimizer = config.optimizer
    if optimizer == "auto":
        chosen["optimizer"] = optimizer = "natural" if init == "target" else "adamw"
    if not config.learning_rate:
        chosen["learning_rate"] = default_learning_rate(model, init, optimizer)
    if config.validate_every == TrainConfig().validate_every:
        every = validation_interval(config, held_out)
        chosen |= {"validate_every": every} if every > config.validate_every else {}
    told = {k: v for k, v in chosen.items() if (k, optimizer) != ("learning_rate", "natural")}
    if told:
        words = ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"
            for name, value in told.items()
        )
        observer(Status("Chosen by model and pictures: {settings}", {"settings": words}))
    return replace(config, **chosen)


def default_learning_rate(model: str, init: str, optimizer: str = "adamw") -> float:
    """The optimiser's learning rate for a model's name and a start."""
    if optimizer == "prodigy":
        return PRODIGY_LR
    calibrated = init in CALIBRATED
    if model == MINI_SD:
        return 3e-3 if calibrated else 1e-2
    return ORDINARY_LR * (RESPONSE if calibrated else 1.0)


def default_steps(model: str, init: str, pictures: int) -> int:
    """Optimiser steps for a model's name, a start and a number of pictures."""
    if model == MINI_SD:
        return 100
    steps = min(max(100 * pictures, 400), 1200)
    return steps // 2 if init in CALIBRATED else steps


def validation_interval(config: TrainConfig, held_out: int) -> int:
    """Steps between validations of so many pictures, in fives."""
    validation = VALIDATION_LOOKS * VALIDATION_TIMESTEPS * held_out  # forward passes
    step = 3 * config.batch_size * config.accumulation  # a backward pass is as long as two
    fewest = validation * (1 - VALIDATION_SHARE) / VALIDATION_SHARE / step
    return 5 * math.ceil(fewest / 5 - 1e-9)
