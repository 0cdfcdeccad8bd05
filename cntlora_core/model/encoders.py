"""What a model reads prompts and pictures with. Whoever has encoders of its own, as a host that has
loaded them already, gives them in these two shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..devices import first_that_fits, memory_sufficing
from .vae_tiles import DECODE_BYTES, ENCODE_BYTES, Way, in_tiles, ways


class PromptEncoder(Protocol):
    """Prompts -> what the UNet's cross-attention reads.

    `clip_skip` (1: the layer that the model was trained on, 2: one earlier) and `max_tokens` of a
    prompt are for the metadata, None where nobody says. `modules` are its own, which may be dropped
    when all is encoded; `content` is what tells it from another, weights by name.
    """

    @property
    def clip_skip(self) -> int | None: ...

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def modules(self) -> tuple[nn.Module, ...]: ...

    @property
    def content(self) -> list[dict[str, Tensor]]: ...

    def encode(
        self, prompts: Sequence[str], device: torch.device
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Of each prompt its token embeddings `[L, D]` and, where the model takes them, pooled
        `[P]`. Longer prompts have a longer L."""
        ...

    def cut(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The prompts that are too long, each with the ids of its tokens that are read."""
        ...


class PictureEncoder(Protocol):
    """Pictures -> latents and back. `scale` is pixels per latent cell along a side."""

    @property
    def scale(self) -> int: ...

    @property
    def modules(self) -> tuple[nn.Module, ...]: ...

    @property
    def content(self) -> list[dict[str, Tensor]]: ...

    def working(self, device: torch.device) -> AbstractContextManager[None]:
        """Around `encode` and `decode`, which run on `device`."""
        ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """RGB `[n, 3, h, w]` of -1 to 1 -> mean and standard deviation of the scaled latents, fp32
        `[n, c, h / scale, w / scale]`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> RGB of about -1 to 1, fp32 `[n, 3, h, w]`."""
        ...


@contextmanager
def temporarily_on(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The module in fp32 on `device` for a while, then back on the host as it was: text encoders
    and VAE take no room beside training, and fp16 (which overflows in SDXL's VAE) is only how they
    are stored."""
    stored = next(module.parameters()).dtype
    try:
        yield nn.Module.to(module, device, torch.float32)  # diffusers' own `to` warns about casts
    finally:
        nn.Module.to(module, "cpu", stored)


def fp32_bytes(module: nn.Module) -> int:
    """What it takes there."""
    return 4 * sum(p.numel() for p in module.parameters())


@dataclass
class VAEPictures:
    """A VAE of diffusers."""

    vae: Any  # diffusers.AutoencoderKL

    @property
    def scale(self) -> int:
        """8 in Stable Diffusion, 4 in the miniature."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.vae,)

    @property
    def content(self) -> list[dict[str, Tensor]]:
        return [self.vae.state_dict()]

    @contextmanager
    def working(self, device: torch.device) -> Iterator[None]:
        with memory_sufficing(device), temporarily_on(self.vae, device):
            yield

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As many pictures at once as the memory holds, one that it does not hold in tiles."""
        count, _, height, width = pixels.shape

        def run(way: Way) -> tuple[Tensor, Tensor]:
            with in_tiles(self.vae, way.tile_px):
                parts = [
                    self.vae.encode(part.to(self.vae.device, self.vae.dtype)).latent_dist
                    for part in pixels.split(way.at_once)
                ]
            mean, std = (torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "std"))
            scale = self.vae.config.scaling_factor
            return mean.float() * scale, std.float() * scale

        return first_that_fits(ways(count, height, width, ENCODE_BYTES), run, self.vae.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Likewise."""
        unscaled = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        count, _, *sides = latents.shape
        height, width = (side * self.scale for side in sides)

        def run(way: Way) -> Tensor:
            with in_tiles(self.vae, way.tile_px):
                parts = unscaled.split(way.at_once)
                return torch.cat([self.vae.decode(part).sample.float() for part in parts])

        return first_that_fits(ways(count, height, width, DECODE_BYTES), run, self.vae.device)
