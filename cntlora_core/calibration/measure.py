"""One pass over the pictures that measures: moments of activations and gradients, and the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batches import NoisedSet
from ..distributed import Group
from ..errors import NonFiniteError
from ..events import Observer, Progress
from ..lora.targets import Projection
from ..model.gradient_checkpointing import recomputing_activations
from .moments import Moments, record

if TYPE_CHECKING:
    from ..model.loader import StableDiffusion


@dataclass(frozen=True)
class Sweep:
    """What a pass measured: the moments over all triples, the mean `loss` of the model as it
    stands, and with gradients the norm of each triple's, `norms` `[n]` at `timesteps` `[n]`."""

    moments: Moments
    loss: float
    timesteps: Tensor
    norms: Tensor | None = None


def measure(
    model: StableDiffusion,
    projections: Sequence[Projection],
    triples: NoisedSet,
    *,
    batch_size: int,
    backward: bool,
    gradient_checkpointing: bool,
    phase: str,
    observer: Observer,
    group: Group,
) -> Sweep:
    """One pass; `backward` adds what needs gradients.

    Raises NonFiniteError when the loss is not a number.
    """
    total, done, norms = torch.zeros(1, dtype=torch.float64), 0, []
    mine = triples.share(group)
    recompute = recomputing_activations(model.unet, gradient_checkpointing and backward)
    scale = gradient_scale(model.dtype)
    with record(model.unet, projections, backward=backward, loss_scale=scale) as moments, recompute:
        for batch in mine.batches(batch_size):
            with torch.set_grad_enabled(backward):
                losses = batch.loss(model)
            if backward:
                (losses.sum() * scale).backward()
                weights = 1 if batch.weights is None else batch.weights
                norms.append(moments.gradient_norms() / weights)
            total += losses.detach().cpu().double().sum()
            done += len(batch)
            observer(Progress(phase, done, len(mine)))
    group.sum_([total])
    moments.combine(group)
    loss = float(total) / len(triples)
    if not math.isfinite(loss):
        raise NonFiniteError(_why_not_finite(model), step=0)
    timesteps = torch.cat([batch.timesteps.cpu() for batch in triples.sizes])
    return Sweep(moments, loss, timesteps, _gathered(norms, triples, group) if backward else None)


def _gathered(norms: list[Tensor], triples: NoisedSet, group: Group) -> Tensor:
    """The norms of all processes' triples, in the order of `triples`."""
    places = torch.arange(len(triples)).split([len(batch) for batch in triples.sizes])
    everyone = torch.zeros(len(triples))
    everyone[torch.cat([part[group.rank :: group.size] for part in places])] = torch.cat(norms)
    group.sum_([everyone])
    return everyone


def gradient_scale(dtype: torch.dtype) -> float:
    """What the loss is multiplied by before a backward pass: fp16 gradients would underflow."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _why_not_finite(model: StableDiffusion) -> str:
    for name, parameter in model.unet.named_parameters():
        if not torch.isfinite(parameter).all():
            return (
                f"The checkpoint '{model.name}' is damaged: the UNet's weight '{name}' holds NaN "
                "or infinite values. Download it again or choose another."
            )
    return (
        f"The loss of '{model.name}' is not finite before training. Try "
        "precision fp32 or bf16, or another VAE."
    )
