"""(picture, timestep, noise) triples: drawn for a calibration, fixed for a validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .diffusion import denoising_loss
from .schedule import bin_centres, stratified_timesteps

if TYPE_CHECKING:
    from .checkpoint import StableDiffusion
    from .conditioning import Conditioning
    from .subject import Subject

VALIDATION_TIMESTEPS = 8
VALIDATION_SEED = 20250709  # one noise for every run of everybody, whatever its own seed


@dataclass(frozen=True)
class Triples:
    """n triples: `latents` and `noise` `[n, c, h, w]`, `timesteps` `[n]`, `conditioning` of n rows."""

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.timesteps)

    def batches(self, size: int) -> Iterator[Triples]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Triples(self.latents[part], self.timesteps[part], self.noise[part], self.conditioning[part])

    def loss(self, model: StableDiffusion) -> Tensor:
        """The denoising loss of each triple `[n]`, in one pass."""
        return denoising_loss(model, self.latents, self.timesteps, self.noise, self.conditioning)


def shuffled_cycle(count: int, of: int, generator: torch.Generator) -> Tensor:
    """`count` indices below `of`: whole shuffled passes one after another, so that each appears equally often."""
    passes = -(-count // of)
    return torch.cat([torch.randperm(of, generator=generator) for _ in range(passes)])[:count]


def draw_triples(subject: Subject, count: int, timesteps: int, generator: torch.Generator) -> Triples:
    """`count` triples: pictures equally often, timesteps stratified over the whole schedule, fresh noise."""
    index = shuffled_cycle(count, len(subject), generator)
    t = stratified_timesteps(count, timesteps, generator)
    return _gather(subject, index, t, generator, posterior_noise=True)


def fixed_triples(subject: Subject, timesteps: int) -> Triples:
    """Every picture at the centres of 8 equal timestep bins, with a noise that is the same in every run."""
    centres = bin_centres(VALIDATION_TIMESTEPS, timesteps)
    index = torch.arange(len(subject)).repeat_interleave(len(centres))
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    return _gather(subject, index, centres.repeat(len(subject)), generator, posterior_noise=False)


def _gather(
    subject: Subject, index: Tensor, t: Tensor, generator: torch.Generator, *, posterior_noise: bool
) -> Triples:
    latents = subject.sample_latents(index, generator) if posterior_noise else subject.mean[index]
    noise = torch.randn(latents.shape, generator=generator)
    device = subject.mean.device
    return Triples(latents, t.to(device), noise.to(device), subject.conditioning[index])


@torch.no_grad()
def mean_loss(model: StableDiffusion, triples: Triples, batch_size: int) -> float:
    """Mean denoising loss over all triples, forward passes only."""
    losses = [batch.loss(model) for batch in triples.batches(batch_size)]
    return float(torch.cat(losses).double().mean())
