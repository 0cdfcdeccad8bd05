"""One pass over the pictures that measures: moments of activations and gradients, and the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batches import Batch, NoisedSet
from ..devices import finer_precision
from ..distributed import ALONE, Group
from ..errors import NonFiniteError
from ..events import Observer, Progress
from ..lora.targets import Projection
from ..model.gradient_checkpointing import recomputing_activations
from .moments import Moments
from .recording import record
from .sketch import Sketches

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
    width: int,
    gradient_checkpointing: bool,
    phase: str,
    observer: Observer,
    group: Group,
) -> Sweep:
    """One pass; `backward` adds what needs gradients, of which `width` directions are kept.

    Raises NonFiniteError when a loss or a gradient is not a number.
    """
    total, done, norms = torch.zeros(1, dtype=torch.float64), 0, []
    recomputes = gradient_checkpointing and backward
    scale = gradient_scale(model.dtype)
    sketches = Sketches(width)
    moments = Moments(gradients=sketches if backward else None)
    gradient = sketches.add if backward else None
    with (
        record(
            model.unet,
            projections,
            backward=backward,
            gradient=gradient,
            loss_scale=scale,
            recomputes=recomputes,
        ) as recording,
        recomputing_activations(model.unet, recomputes),
    ):
        for batch, sharing in _shared(triples, batch_size, group):
            counts = sharing is group or group.rank == 0
            mine = batch[sharing.rank :: sharing.size]
            recording.copies = mine.conditioning.copies
            with torch.set_grad_enabled(backward):
                losses = mine.loss(model)
            seen = losses.detach().cpu().double().sum()
            if backward:
                recording.gradient = partial(sketches.add, counts=counts)
                (losses.sum() * scale).backward()
                weights = 1 if mine.weights is None else mine.weights
                norms.append(_everyones(recording.gradient_norms() / weights, len(batch), sharing))
                if not torch.isfinite(seen + norms[-1].sum()):  # so on every process
                    raise NonFiniteError(_why_not_finite(model), step=0)
            total += seen if counts else 0
            moments.take_in(recording.take().together(sharing))
            done += len(batch)
            observer(Progress(phase, done, len(triples)))
    group.sum_([total])
    if not torch.isfinite(total):
        raise NonFiniteError(_why_not_finite(model), step=0)
    sketches.combine(group)
    loss = float(total) / len(triples)
    timesteps = torch.cat([batch.timesteps.cpu() for batch in triples.sizes])
    return Sweep(moments, loss, timesteps, torch.cat(norms) if backward else None)


def _shared(triples: NoisedSet, batch_size: int, group: Group) -> Iterator[tuple[Batch, Group]]:
    """Batches of `batch_size` for each process, and who shares them. What cannot be shared out
    everyone looks at, and the first process counts."""
    for batch in triples.batches(batch_size * group.size):
        even = len(batch) - len(batch) % group.size
        if even:
            yield batch[:even], group
        for rest in batch[even:].split(batch_size):
            yield rest, ALONE


def _everyones(own: Tensor, count: int, sharing: Group) -> Tensor:
    """The norms of all processes' parts of a batch, in its order `[count]`."""
    every = torch.zeros(count)
    every[sharing.rank :: sharing.size] = own
    sharing.sum_([every])
    return every


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
    ways = " or ".join([*finer_precision(model.dtype), "another VAE"])
    return f"The loss of '{model.name}' or its gradient is not finite before training. Try {ways}."
