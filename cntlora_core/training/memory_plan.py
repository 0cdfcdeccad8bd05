"""Before a run: does it fit into the device's memory, and what makes it fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..config import CalibrationConfig, TrainConfig
from ..events import Notice, Observer, Status
from ..model.families import config_of

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion

Config = TypeVar("Config", CalibrationConfig, TrainConfig)

# Of cuDNN's workspaces and of what the allocator cannot use.
RESERVE = 1_000_000_000
# Adapter, gradient, two AdamW moments, last good copy: fp32 each.
COPIES_OF_ADAPTERS = 5


@dataclass(frozen=True)
class Needs:
    """A family's UNet in half precision, bytes: its weights, and what a forward and backward pass
    takes for each latent place of a picture, `plain` or with gradient checkpointing. Fp32 takes
    twice that.

    Attention and feed-forward layers adapted, with attention kernels that never keep all pairs of
    places (CUDA's): what `estimate_training_memory` counts, which takes seconds.
    """

    weights: int
    plain: int
    checkpointed: int


NEEDS = {
    "sd1": Needs(1_719_041_928, 228_000, 57_200),
    "sd2": Needs(1_731_821_448, 217_000, 46_700),
    "sd2-v": Needs(1_731_821_448, 217_000, 46_700),
    "sdxl": Needs(5_134_927_368, 411_000, 33_600),
}


@dataclass(frozen=True)
class MemoryPlan:
    """`needed` bytes beside the model, of `free` ones."""

    gradient_checkpointing: bool
    batch_size: int
    accumulation: int
    needed: int
    free: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        batch = f"{self.batch_size} x {self.accumulation}"
        text = (
            f"{self.free / 1e9:.1f} GB of memory free: gradient checkpointing "
            f"{'on' if self.gradient_checkpointing else 'off'}, batch {batch}, about "
            f"{self.needed / 1e9:.1f} GB beside the model."
        )
        return text if self.fits else text + " That may be too little: try a lower resolution."


def plan_memory(
    free: int,
    plain: int,
    checkpointed: int,
    *,
    batch_size: int,
    accumulation: int,
    gradient_checkpointing: bool,
    fixed: int = RESERVE,
    split: bool = True,
) -> MemoryPlan:
    """The first that fits into `free` bytes, else the smallest: as asked; with gradient
    checkpointing; with the batch cut into accumulated parts, where `split` allows that.

    `plain` and `checkpointed`: bytes of each picture in a batch; `fixed`: of none.
    """
    parts = [n for n in range(batch_size, 0, -1) if batch_size % n == 0] if split else [batch_size]
    ways = [(batch_size, gradient_checkpointing), *((n, True) for n in parts)]
    plans = [
        MemoryPlan(
            recomputing,
            size,
            accumulation * batch_size // size,
            fixed + size * (checkpointed if recomputing else plain),
            free,
        )
        for size, recomputing in ways
    ]
    return next((plan for plan in plans if plan.fits), plans[-1])


def fitted_to_memory(
    model: StableDiffusion, config: Config, resolution: int, *, fixed: int, observer: Observer
) -> Config:
    """`config` so that the run fits, told in a sentence; as it was where nothing is known of the
    device or the model. `fixed`: bytes beside the passes.

    A step sees the same pictures either way.
    """
    free, each = free_memory(model.device), picture_bytes(model, resolution)
    if free is None or each is None:
        return config
    training = isinstance(config, TrainConfig)
    plan = plan_memory(
        free,
        *each,
        batch_size=config.batch_size,
        accumulation=config.accumulation if isinstance(config, TrainConfig) else 1,
        gradient_checkpointing=config.gradient_checkpointing,
        fixed=RESERVE + fixed,
        split=training,
    )
    changes: dict[str, Any] = {
        "gradient_checkpointing": plan.gradient_checkpointing,
        "batch_size": plan.batch_size,
        **({"accumulation": plan.accumulation} if training else {}),
    }
    fitted = replace(config, **changes)
    observer(Notice(str(plan)) if fitted != config or not plan.fits else Status(str(plan)))
    return fitted


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may take on `device`; None where nobody says."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def picture_bytes(model: StableDiffusion, resolution: int) -> tuple[int, int] | None:
    """What a pass takes for each picture, plain and with gradient checkpointing; None when the UNet
    has not its family's shape."""
    widths = config_of(model.family)["unet"]["block_out_channels"]
    if list(model.unet.config.block_out_channels) != list(widths):
        return None
    needs = NEEDS[model.family]
    places = (resolution // model.vae_scale) ** 2 * model.dtype.itemsize // 2
    return places * needs.plain, places * needs.checkpointed


def describe_needs() -> dict[str, str]:
    """For `info`: peak of a training step on CUDA at each family's own resolution, batch 1, half
    precision."""
    described = {}
    for family, resolution in {"sd1": 512, "sd2-v": 768, "sdxl": 1024}.items():
        needs, places = NEEDS[family], (resolution // 8) ** 2
        for how, each in (
            ("", needs.plain),
            (" with gradient checkpointing", needs.checkpointed),
        ):
            total = needs.weights + places * each
            described[f"{family} {resolution} px{how}"] = f"{total / 1e9:.1f} GB"
    return described
