"""What every long computation needs around it, and what to try when memory runs out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..config import CalibrationConfig, TrainConfig
from ..errors import OutOfMemory
from ..model.cpu_convolutions import convolutions_as_matmul

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


@contextmanager
def run_conditions(
    model: StableDiffusion, config: CalibrationConfig | TrainConfig, resolution: int
) -> Iterator[None]:
    """Convolutions as products on the CPU, and a sentence when memory runs out (OutOfMemory)."""
    try:
        with convolutions_as_matmul(model.unet):
            yield
    except BaseException as error:
        if not _out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(
            f"The memory of {model.device} did not suffice. "
            f"Next to try: {_next_settings(config, resolution)}."
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)  # how the CPU's allocator says it
    )


def _next_settings(config: CalibrationConfig | TrainConfig, resolution: int) -> str:
    """The next three settings to try, in the order of what they cost."""
    advice = [] if config.gradient_checkpointing else ["gradient checkpointing on"]
    half = config.batch_size // 2
    if half and isinstance(config, TrainConfig):
        accumulation = -(-config.batch_size * config.accumulation // half)
        advice.append(f"batch size {half} with accumulation {accumulation}")
    elif half:
        advice.append(f"batch size {half}")
    advice += ["precision bf16", f"a lower resolution than {resolution} px", "a lower rank"]
    return ", ".join(advice[:3])
