"""Fields that calibration and training have in common."""

from __future__ import annotations

from typing import Any

from ..settings import setting

MOST_STEPS = 1_000_000


def batch_size() -> Any:
    return setting(
        2,
        "Pictures a batch. Lower it when memory runs out; higher is steadier and slower.",
        low=1,
        high=1024,
        advanced=True,
    )


def gradient_checkpointing() -> Any:
    return setting(
        False,
        "Far less memory, a third to twice as slow. Off: on CUDA still on where the run would not "
        "fit without.",
        advanced=True,
    )


def seed() -> Any:
    return setting(0, "Same seed, same pictures: the same result.", high=2**32 - 1, advanced=True)
