"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from ..config import TrainConfig

FALLS = 3  # of schedule restarts, as trainers' examples have it


def lr_at(config: TrainConfig, step: int) -> float:
    """Of step 1, 2, ... `steps`."""
    warmup = config.warmup_steps
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - warmup - 1) / max(1, config.steps - warmup))
    if config.schedule == "restarts" and done < 1:
        done = done * FALLS % 1
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
