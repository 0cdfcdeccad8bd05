"""Before a run: does it fit into the device's memory, what makes it fit, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..calibration.moments import moment_bytes
from ..calibration.recording import recorded_bytes
from ..calibration.sketch import SKETCHING_BYTES, sketch_bytes, sketch_width
from ..config import CalibrationConfig, TrainConfig
from ..devices import RESERVE, free_memory, taken
from ..distributed import ALONE, Group, least
from ..events import Notice, Observer, Status
from ..lora.targets import Projection, find_projections, targets_for
from ..model.eight_bits import is_in_eight_bits
from ..model.families import config_of

if TYPE_CHECKING:
    from ..calibration.calibrate import Calibration
    from ..model.loader import StableDiffusion

# Adapter, gradient, two AdamW moments, last good copy: fp32 each.
COPIES_OF_ADAPTERS = 5
# Of all second moments, in steps (counted by shapes): a basis for each layer, whoever else reads
# its input, on which the moments stand too; where a prior is kept its own moments, and bases of
# twice as many directions for the inputs, which start with those of the moments.
METRIC_COPIES, PRIOR_COPIES = 1.55, 1.25
LOWER_RESOLUTION = "a lower resolution"
PLAN = (
    "{free} GB of memory free: gradient checkpointing {checkpointing}, batch {batch}, about "
    "{needed} GB beside the model."
)
TIMED_PLAN = PLAN.removesuffix(".") + ", about {minutes} min without samples."


@dataclass(frozen=True)
class Needs:
    """A family's UNet in half precision, bytes: its weights, and what a forward and backward pass
    takes for each latent place of a picture, `plain` or with gradient checkpointing. Fp32 takes
    twice that.

    All layers adapted, the convolutions too, with attention kernels that never keep all pairs of
    places (CUDA's): what `estimate_training_memory` counts, which takes seconds. Without the
    convolutions, which is 2 to 12 % less, an H100 held 2 % more than that at most.
    """

    weights: int
    plain: int
    checkpointed: int


NEEDS = {
    "sd1": Needs(1_719_041_928, 232_000, 59_500),
    "sd2": Needs(1_731_821_448, 221_000, 48_800),
    "sd2-v": Needs(1_731_821_448, 221_000, 48_800),
    "sdxl": Needs(5_134_927_368, 418_000, 38_900),
}


@dataclass(frozen=True)
class MemoryPlan:
    """`needed` bytes beside the model, of `free` ones; `minutes` where a pass was timed;
    `next_to_try` where it does not fit."""

    gradient_checkpointing: bool
    batch_size: int
    accumulation: int
    needed: int
    free: int
    minutes: float | None = None
    next_to_try: str = LOWER_RESOLUTION

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    @property
    def status(self) -> Status:
        """The plan in words."""
        values = {
            "free": f"{self.free / 1e9:.1f}",
            "checkpointing": "on" if self.gradient_checkpointing else "off",
            "batch": f"{self.batch_size} x {self.accumulation}",
            "needed": f"{self.needed / 1e9:.1f}",
        }
        if self.minutes is None:
            return Status(PLAN, values)
        return Status(TIMED_PLAN, values | {"minutes": f"{max(1.0, self.minutes):.0f}"})

    def __str__(self) -> str:
        advice = f" That may be too little: try {self.next_to_try}."
        return self.status.text if self.fits else self.status.text + advice


def described(batch: str | int, gradient_checkpointing: bool) -> str:
    """How a run goes, in a sentence."""
    return f"gradient checkpointing {'on' if gradient_checkpointing else 'off'}, batch {batch}"


def ways_to_run(batch_size: int, gradient_checkpointing: bool) -> list[tuple[int, bool]]:
    """Pictures at once and whether with gradient checkpointing, from the largest to the
    smallest."""
    parts = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    ways = [(batch_size, gradient_checkpointing), *((n, True) for n in parts)]
    return list(dict.fromkeys(ways))


@dataclass(frozen=True)
class Bytes:
    """Beside the model: of no picture, and of `each` that passes at once."""

    fixed: int
    each: int = 0


def plan_memory(
    free: int,
    plain: Bytes,
    checkpointed: Bytes,
    *,
    batch_size: int,
    accumulation: int,
    gradient_checkpointing: bool,
) -> MemoryPlan:
    """The first that fits into `free` bytes, else the smallest: as asked; with gradient
    checkpointing, which takes what `checkpointed` says; with the batch cut into accumulated
    parts."""
    plans = []
    for size, recomputing in ways_to_run(batch_size, gradient_checkpointing):
        own = checkpointed if recomputing else plain
        needed, parts = own.fixed + size * own.each, accumulation * batch_size // size
        plans.append(MemoryPlan(recomputing, size, parts, needed, free))
    return next((plan for plan in plans if plan.fits), plans[-1])


def fitted_calibration(
    model: StableDiffusion,
    config: CalibrationConfig,
    resolution: int,
    observer: Observer,
    group: Group = ALONE,
    *,
    preserves: bool = False,
) -> tuple[CalibrationConfig, int]:
    """`config` so that the calibration fits into the memory of every process, and how many pictures
    of a batch to look at at once; told in a sentence. `preserves`: it measures a prior."""
    projections = find_projections(model.unet, targets_for(config))
    adapters = 4 * config.rank * sum(p.parameters_per_rank for p in projections if p.attention)
    preserves = preserves and config.preservation > 0
    steps = natural_bytes(projections, config.batch_size, model.dtype, preserves)
    sweep = sweep_bytes(projections, config.rank)
    phases = (
        Bytes(COPIES_OF_ADAPTERS * adapters + steps),
        Bytes(sweep, recorded_bytes(projections, model.dtype)),
    )
    plan = _plan(model, config, resolution, observer, phases, group)
    if plan is None:
        return config, config.batch_size
    fitted = replace(config, gradient_checkpointing=plan.gradient_checkpointing)
    return fitted, plan.batch_size


def fitted_training(
    model: StableDiffusion,
    config: TrainConfig,
    start: Calibration,
    resolution: int,
    observer: Observer,
    group: Group = ALONE,
    *,
    prior: bool = False,
) -> TrainConfig:
    """`config` so that the training fits into the memory of every process, told in a sentence, with
    the minutes that it takes by those of the calibration, twice as many with a loss of a `prior`. A
    step sees the same pictures either way."""
    fixed = COPIES_OF_ADAPTERS * sum(f.up.nbytes + f.down.nbytes for f in start.lora.values())
    if start.natural and config.optimizer in ("auto", "natural"):
        pictures = config.batch_size * config.accumulation
        preserves = start.natural.metric.prior is not None
        fixed += natural_bytes(start.natural.projections, pictures, model.dtype, preserves)
    report = start.report
    passes = report.forward_passes + 2 * report.backward_passes
    each = (1 + prior) * report.seconds / passes if report.backward_passes else None
    plan = _plan(model, config, resolution, observer, (Bytes(fixed),), group, each)
    if plan is None:
        return config
    return replace(
        config,
        gradient_checkpointing=plan.gradient_checkpointing,
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
    )


def _plan(
    model: StableDiffusion,
    config: CalibrationConfig | TrainConfig,
    resolution: int,
    observer: Observer,
    phases: Sequence[Bytes],
    group: Group,
    seconds: float | None = None,
) -> MemoryPlan | None:
    """Of the phase that takes most, told in a sentence; None where nothing is known of the device
    or the model. `seconds`: of one picture's forward pass."""
    free, each = free_memory(model.device), picture_bytes(model, resolution)
    if free is None or each is None:
        return None
    free, (plain, checkpointed) = least(free, group), each
    accumulation = config.accumulation if isinstance(config, TrainConfig) else 1
    # weights that are brought back to the model's precision stay until the backward pass
    copies = taken(NEEDS[model.family].weights) if is_in_eight_bits(model.unet) else 0
    plans = [
        plan_memory(
            free,
            Bytes(RESERVE + taken(phase.fixed) + copies, taken(plain + phase.each)),
            Bytes(
                RESERVE + taken(phase.fixed, recomputing=True),
                taken(checkpointed + phase.each, recomputing=True),
            ),
            batch_size=config.batch_size,
            accumulation=accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        for phase in phases
    ]
    plan = max(plans, key=lambda p: (p.gradient_checkpointing, p.accumulation, p.needed))
    if seconds and isinstance(config, TrainConfig):
        forwards = 4 if plan.gradient_checkpointing else 3  # a backward pass is as long as two
        pictures = config.steps * config.batch_size * accumulation
        plan = replace(plan, minutes=pictures * forwards * seconds / 60)
    asked = config.gradient_checkpointing, config.batch_size
    plan = replace(plan, next_to_try=smaller_precision(model) or LOWER_RESOLUTION)
    changed = (plan.gradient_checkpointing, plan.batch_size) != asked
    observer(Notice(str(plan)) if changed or not plan.fits else plan.status)
    return plan


def smaller_precision(model: StableDiffusion) -> str | None:
    """The next that takes less memory, where there is one. What others have loaded is not stored in
    8 bits."""
    if is_in_eight_bits(model.unet):
        return None
    if model.dtype == torch.float32:
        return "precision bf16"
    return None if model.lender else "precision int8"


def natural_bytes(
    projections: Sequence[Projection], pictures: int, dtype: torch.dtype, preserves: bool
) -> int:
    """Of natural-gradient steps that see so many pictures: the metric, and the rows it is brought
    up to date by."""
    return metric_bytes(projections, preserves) + pictures * recorded_bytes(projections, dtype)


def sweep_bytes(projections: Sequence[Projection], rank: int) -> int:
    """Of a sweep: sketches of the gradients, the layer that is sketched, second moments. Those of a
    prior wait on the host."""
    sketches = sketch_bytes(projections, sketch_width(rank)) + SKETCHING_BYTES
    return sketches + moment_bytes(projections)


def metric_bytes(projections: Sequence[Projection], preserves: bool = False) -> int:
    """Of natural-gradient steps: the second moments and what is computed from them."""
    copies = METRIC_COPIES + preserves * PRIOR_COPIES
    return int(copies * moment_bytes(projections))


def picture_bytes(model: StableDiffusion, resolution: int) -> tuple[int, int] | None:
    """What a pass takes for each picture, plain and with gradient checkpointing; None when the UNet
    has not its family's shape."""
    widths = config_of(model.family)["unet"]["block_out_channels"]
    if list(model.unet.config.block_out_channels) != list(widths):
        return None
    needs = NEEDS[model.family]
    halves = (resolution // model.vae_scale) ** 2 * model.dtype.itemsize // 2
    return halves * needs.plain, halves * needs.checkpointed


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
