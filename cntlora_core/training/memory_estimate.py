"""How much device memory a run's phases take, from shapes alone: each runs on torch's meta device,
and what would live at once is added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..calibration.ranks import shared_budget
from ..calibration.recording import recorded_bytes
from ..config import CalibrationConfig
from ..lora.adapter import Factors, LoRA, attached_lora
from ..lora.targets import Projection, find_projections, targets_for
from ..model.families import config_of
from ..model.gradient_checkpointing import recomputing_activations
from .memory_plan import COPIES_OF_ADAPTERS, metric_bytes, sweep_bytes
from .shapes import meta_unet, meta_vae, nbytes, peak_bytes, unet_inputs

# oneDNN reorders a convolution's weights in every call: a copy of the largest, and one in passing.
CPU_WEIGHT_COPIES = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `weights`: the frozen UNet; `activations`: what else lives at once in a forward and
    backward pass, the backward pass's own results included; `adapters`: factors, gradients and
    optimiser; `workspace`: a convolution in passing; `metric`: of natural-gradient steps."""

    weights: int
    activations: int
    adapters: int = 0
    workspace: int = 0
    metric: int = 0

    @property
    def peak(self) -> int:
        return self.weights + self.beside

    @property
    def beside(self) -> int:
        """What comes to the weights."""
        return self.activations + self.adapters + self.workspace + self.metric


@dataclass(frozen=True)
class Adapted:
    """A UNet with adapters and what passes through it: latents of `side` x `side`, `device` the
    kind whose attention kernels run."""

    side: int
    batch_size: int
    rank: int
    targets: str
    dtype: torch.dtype
    gradient_checkpointing: bool
    device: str


def estimate_training_memory(
    family: str,
    *,
    resolution: int,
    batch_size: int = 1,
    rank: int = 4,
    targets: str | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    device: str = "cuda",
) -> MemoryEstimate:
    """Peak device memory of a training step of the family's full-size UNet, beside the framework's
    own.

    `rank`: of attention alone; more layers share as many parameters. `targets`: layers with an
    adapter, the default's when None. `device`: the kind whose attention
    kernels run.
    """
    targets = targets or targets_for(CalibrationConfig())
    side, config = resolution // 8, config_of(family)["unet"]
    adapted = Adapted(side, batch_size, rank, targets, dtype, gradient_checkpointing, device)
    return unet_training_memory(config, adapted)


def unet_training_memory(config: Mapping[str, Any], adapted: Adapted) -> MemoryEstimate:
    """The same for any UNet by its diffusers configuration."""
    unet = meta_unet(config, adapted.dtype, adapted.device)
    projections = find_projections(unet, adapted.targets)
    inputs = unet_inputs(config, adapted.batch_size, adapted.side, adapted.dtype)
    with attached_lora(unet, meta_lora(projections, adapted.rank), trainable=True) as adapters:

        def step() -> None:
            with recomputing_activations(unet, adapted.gradient_checkpointing):
                (predicted,) = unet(return_dict=False, **inputs)
                predicted.float().square().mean().backward()

        held = [*unet.parameters(), *unet.buffers(), adapters.flat]
        activations = peak_bytes(step, held)
    copies = COPIES_OF_ADAPTERS * adapters.flat.nbytes
    largest = max(p.numel() * p.element_size() for p in unet.parameters())
    workspace = CPU_WEIGHT_COPIES * largest if adapted.device == "cpu" else 0
    return MemoryEstimate(nbytes(unet), activations, copies, workspace)


def meta_lora(projections: Sequence[Projection], rank: int) -> LoRA:
    """Factors on the meta device, of equal ranks, in about as many parameters as attention alone
    has at `rank`."""
    budget = shared_budget(projections, rank)
    each = max(1, round(budget / sum(p.parameters_per_rank for p in projections)))
    return {
        p.name: Factors(
            torch.empty(p.out_features, each, device="meta"),
            torch.empty(each, p.in_features, device="meta"),
        )
        for p in projections
    }


def unet_calibration_memory(config: Mapping[str, Any], adapted: Adapted) -> MemoryEstimate:
    """Peak of a calibration: of its sweep, or of the steps after it.

    Both pass as a training step does and keep rows of what they see. A sweep holds sketches of the
    gradients and takes one layer to fp32 in passing, the steps hold adapters and metric.
    """
    step = unet_training_memory(config, adapted)
    unet = meta_unet(config, adapted.dtype, adapted.device)
    projections = find_projections(unet, adapted.targets)
    rows = adapted.batch_size * recorded_bytes(projections, adapted.dtype)
    step = replace(step, activations=step.activations + rows)
    sweep, metric = sweep_bytes(projections, adapted.rank), metric_bytes(projections)
    if sweep < step.adapters + metric:
        return replace(step, metric=metric)
    return replace(step, adapters=0, metric=sweep)


def unet_sampling_memory(
    config: Mapping[str, Any], *, side: int, pictures: int, dtype: torch.dtype, device: str
) -> MemoryEstimate:
    """Peak of drawing so many pictures at once with guidance, which doubles the batch; decoding
    not included."""
    unet = meta_unet(config, dtype, device)
    inputs = unet_inputs(config, 2 * pictures, side, dtype)

    def step() -> None:
        with torch.no_grad():
            unet(return_dict=False, **inputs)

    return MemoryEstimate(nbytes(unet), peak_bytes(step, [*unet.parameters(), *unet.buffers()]))


def vae_memory(
    config: Mapping[str, Any], *, size_px: int, pictures: int, decode: bool, device: str
) -> MemoryEstimate:
    """Peak of encoding so many square pictures at once, or of decoding them; fp32."""
    vae = meta_vae(config, device)
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    side = size_px // scale if decode else size_px
    channels = config["latent_channels"] if decode else 3
    given = torch.empty(pictures, channels, side, side, device="meta")

    def run() -> None:
        with torch.no_grad():
            vae.decode(given) if decode else vae.encode(given)

    return MemoryEstimate(nbytes(vae), peak_bytes(run, vae.parameters()))
