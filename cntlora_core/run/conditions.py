"""What every long computation needs around it, and what to try when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..config import CalibrationConfig, TrainConfig
from ..devices import memory_sufficing
from ..model.cpu_convolutions import convolutions_as_matmul
from ..training.memory_plan import smaller_precision

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


@contextmanager
def run_conditions(
    model: StableDiffusion, config: CalibrationConfig | TrainConfig, resolution: int
) -> Iterator[None]:
    """Convolutions as products on the CPU, and a sentence when memory runs out (OutOfMemory)."""
    with (
        memory_sufficing(model.device, _next_settings(model, config, resolution)),
        convolutions_as_matmul(model.unet),
    ):
        yield


def _next_settings(
    model: StableDiffusion, config: CalibrationConfig | TrainConfig, resolution: int
) -> str:
    """The next three settings to try, in the order of what they cost."""
    advice = [] if config.gradient_checkpointing else ["gradient checkpointing on"]
    half = config.batch_size // 2
    if half and isinstance(config, TrainConfig):
        accumulation = -(-config.batch_size * config.accumulation // half)
        advice.append(f"batch size {half} with accumulation {accumulation}")
    elif half:
        advice.append(f"batch size {half}")
    if precision := smaller_precision(model):
        advice.append(precision)
    advice += [f"a lower resolution than {resolution} px", "a lower rank"]
    return ", ".join(advice[:3])
